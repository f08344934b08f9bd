"""What a layer costs: FLOPs, bytes and parameters of the Strassen-Tile operator and of the dense product it replaces.

A multiply-add is two FLOPs. Encoding and decoding are always included; the count of the products alone, which the
paper quotes (pqs/r fewer), stands beside it under its own name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from strassen_tile.errors import ConfigError, ShapeError
from strassen_tile.tiling import as_integer, as_tile, tile_count


@dataclass(frozen=True)
class Cost:
    """Costs of one application of a layer to `n` rows a sample, and of its dense counterpart.

    Attributes:
        flops: encode, r products and decode, on padded sizes.
        product_flops: the r products alone.
        bytes: least traffic of the three steps: X, X̂ (written and read), Ŵ, Ŷ (written and read), Y.
        params: numbers in Ŵ, E and D; a bias is not counted, on either side.
        dense_flops, dense_bytes, dense_params: the same for x @ w.
    """

    flops: int
    product_flops: int
    bytes: int
    params: int
    dense_flops: int
    dense_bytes: int
    dense_params: int

    @property
    def flop_ratio(self) -> float:
        """FLOPs, all in, as a fraction of dense; its inverse bounds the speed-up of a compute-bound layer."""
        return self.flops / self.dense_flops if self.dense_flops else 1.0

    @property
    def product_flop_ratio(self) -> float:
        """FLOPs of the products alone as a fraction of dense: r/pqs when no side is padded."""
        return self.product_flops / self.dense_flops if self.dense_flops else 1.0

    @property
    def param_ratio(self) -> float:
        """Parameters as a fraction of dense."""
        return self.params / self.dense_params if self.dense_params else 1.0


def dense(n: int, k: int, m: int, *, itemsize: int = 4) -> Cost:
    """Cost of x @ w for x (n, k) and w (k, m): its own dense counterpart. Raises as `linear`."""
    n, k, m, itemsize = _sizes(n=n, k=k, m=m, itemsize=itemsize)
    flops, traffic, params = 2 * n * k * m, itemsize * (n * (k + m) + k * m), k * m
    return Cost(flops, flops, traffic, params, flops, traffic, params)


def linear(
    n: int,
    k: int,
    m: int,
    tile: int | Sequence[int],
    rank: int,
    *,
    batch: int = 1,
    itemsize: int = 4,
    encoder_scope: str = "layer",
) -> Cost:
    """Cost of (batch, n, k) → (batch, n, m).

    Args:
        n: rows of one sample; each sample is padded on its own.
        k: input features.
        m: output features.
        tile: (p, q, s) or one side.
        rank: r.
        batch: samples.
        itemsize: bytes a number, for the traffic.
        encoder_scope: "layer", or "tile" for an encoder of each column tile and a decoder of each output tile.

    Raises:
        ShapeError: a size or rank that is no integer, a negative size, or a rank below 1.
        ConfigError: an unknown encoder_scope.
    """
    p, q, s = as_tile(tile)
    n, k, m, batch, rank, itemsize = _sizes(n=n, k=k, m=m, batch=batch, rank=rank, itemsize=itemsize)
    if rank < 1:
        raise ShapeError(f"rank must be >= 1; got {rank}")
    if encoder_scope not in ("layer", "tile"):
        raise ConfigError(f"encoder_scope must be 'layer' or 'tile'; got {encoder_scope!r}")
    i, j, l = batch * tile_count(n, p), tile_count(k, q), tile_count(m, s)  # noqa: E741 - the tile indices I, J, L
    products = 2 * rank * i * j * l
    encode, decode = 2 * rank * i * p * j * q, 2 * rank * i * p * l * s
    encoded = rank * (i * j + i * l)
    weight = rank * j * l
    encoders, decoders = (j, l) if encoder_scope == "tile" else (1, 1)
    factors = rank * (p * q * encoders + p * s * decoders)
    return replace(
        dense(batch * n, k, m, itemsize=itemsize),
        flops=encode + products + decode,
        product_flops=products,
        bytes=itemsize * (batch * n * (k + m) + 2 * encoded + weight + factors),
        params=weight + factors,
    )


def with_mix(layer: Cost, rows: int, k: int, taps: int, *, batch: int = 1, itemsize: int = 4) -> Cost:
    """The cost of a layer fed (batch, rows, k) after a mix of its rows, one number for each feature and row that a row sees.

    2·rows·k·taps FLOPs, X read and written once more, and taps·k parameters; `dense_…` stay those of the layer.
    """
    rows, k, taps, batch, itemsize = _sizes(rows=rows, k=k, taps=taps, batch=batch, itemsize=itemsize)
    return replace(
        layer,
        flops=layer.flops + 2 * batch * rows * k * taps,
        bytes=layer.bytes + itemsize * (2 * batch * rows * k + taps * k),
        params=layer.params + taps * k,
    )


def _sizes(**given: int) -> tuple[int, ...]:
    """The values as Python's integers, which do not overflow as numpy's would."""
    sizes = tuple(size for size in map(as_integer, given.values()) if size is not None and size >= 0)
    if len(sizes) < len(given):
        raise ShapeError(f"sizes must be integers >= 0; got {', '.join(f'{n}={size!r}' for n, size in given.items())}")
    return sizes
