"""Products through a random map of the inner dimension: x w ≈ (x S)(Sᵀ w), S (K, d) with E[S Sᵀ] = 1.

Each is unbiased, and its expected squared error on any x and w is about ‖x‖²‖w‖²/d: of Gaussian matrices K/d times the squared
norm of the product, more than the product itself has. They are here because the literature on approximate products
compares itself with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from strassen_tile import cost
from strassen_tile.baselines.products import FINISHED, Prepared, Product
from strassen_tile.cost import Cost
from strassen_tile.errors import ConfigError

_LEAST = 1e-2  # of the mean size of a feature: what the smallest counts for
_OSNAP = 4  # entries of a row of S


@dataclass(frozen=True)
class Map:
    """A map S (K, d) of rows: how it is applied to x (…, K), and its numbers as a matrix."""

    apply: Callable[[Tensor], Tensor]
    matrix: Tensor


@dataclass(frozen=True)
class Sketch:
    """A family of maps.

    Attributes:
        draw: (K, d, generator, weights) → Map; `weights` (K,) is how much each inner index matters.
        flops: (K, d) → FLOPs of applying one to a row.
        dense: whether S is a matrix of d·K numbers that a layer would have to hold.
    """

    draw: Callable[[int, int, torch.Generator, Tensor], Map]
    flops: Callable[[int, int], int]
    dense: bool = True


def sketched(kind: str, flop_ratio: float, *, seed: int = 0) -> Product:
    """The product through a map of that kind with as many dimensions as this fraction of dense's FLOPs pays for, all in.

    Args:
        kind: of `SKETCHES`.
        flop_ratio: FLOPs of map and product as a fraction of x @ w.
        seed: of the map.

    Raises:
        ConfigError: another kind, or a ratio that is not positive and finite.
    """
    if kind not in SKETCHES:
        raise ConfigError(f"unknown sketch {kind!r}; there are {', '.join(SKETCHES)}")
    if not 0 < flop_ratio < math.inf:
        raise ConfigError(f"flop_ratio must be positive and finite; got {flop_ratio}")
    sketch = SKETCHES[kind]

    def prepare(w: Tensor, rows: Tensor | None = None) -> Prepared:
        k, m = w.shape
        weights = w.detach().double().norm(dim=1)
        if rows is not None:
            seen = rows.detach().double().reshape(-1, k).norm(dim=0)
            weights = weights * seen.clamp_min(_LEAST * seen.mean())  # what was never seen may come yet
        generator = torch.Generator().manual_seed(seed)
        drawn = sketch.draw(k, inner(sketch, flop_ratio, k, m), generator, weights.cpu())
        matrix = drawn.matrix.to(w)
        right = matrix.mT @ w.detach()
        return Prepared(lambda x: drawn.apply(x) @ right, (), lambda x: x @ matrix.double() @ right.double())

    def counted(n: int, k: int, m: int) -> Cost:
        d = inner(sketch, flop_ratio, k, m)
        dense = cost.dense(n, k, m)
        params = d * m + (d * k if sketch.dense else 0)
        flops = n * (sketch.flops(k, d) + 2 * d * m)
        return replace(
            dense, flops=flops, product_flops=2 * n * d * m, params=params, bytes=4 * (n * (k + m + 2 * d) + params)
        )

    return Product(kind, "approximate", flop_ratio, counted, prepare, forward_only=FINISHED)


def inner(sketch: Sketch, flop_ratio: float, k: int, m: int) -> int:
    """The most dimensions with which map and product take that fraction of dense's FLOPs; at least one."""
    allowed, low, high = flop_ratio * 2 * k * m, 1, max(1, 4 * k)
    while low < high:
        middle = (low + high + 1) // 2
        if sketch.flops(k, middle) + 2 * middle * m <= allowed:
            low = middle
        else:
            high = middle - 1
    return low


def hadamard(x: Tensor) -> Tensor:
    """Rows x (…, P) times the P×P Walsh–Hadamard matrix over √P, P a power of two, in P log₂ P additions a row."""
    shape, size = x.shape, x.shape[-1]
    step = 1
    while step < size:
        pairs = x.reshape(-1, size // (2 * step), 2, step)
        x = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        step *= 2
    return x.reshape(shape) / math.sqrt(size)


def _as_matrix(matrix: Tensor) -> Map:
    cast = _once(matrix)
    return Map(lambda x: x @ cast(x), matrix)


def _once(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """The matrix in the dtype and on the device of x, cast at the first call for them and kept."""
    kept: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def cast(x: Tensor) -> Tensor:
        where = x.dtype, x.device
        if where not in kept:
            kept[where] = matrix.to(x)
        return kept[where]

    return cast


def _gaussian(k: int, d: int, generator: torch.Generator, weights: Tensor) -> Map:
    return _as_matrix(torch.randn(k, d, generator=generator, dtype=torch.float64) / math.sqrt(d))


def _orthogonal(k: int, d: int, generator: torch.Generator, weights: Tensor) -> Map:
    noise = torch.randn(k, min(d, k), generator=generator, dtype=torch.float64)
    return _as_matrix(torch.linalg.qr(noise)[0] * math.sqrt(k / min(d, k)))


def _rademacher(k: int, d: int, generator: torch.Generator, weights: Tensor) -> Map:
    return _as_matrix(_signs((k, d), generator) / math.sqrt(d))


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=generator).double() * 2 - 1


def _power(k: int) -> int:
    return 1 << max(0, k - 1).bit_length()


def _turned(k: int, generator: torch.Generator) -> tuple[Callable[[Tensor], Tensor], int]:
    """The map x ↦ H D x, padded to a power of two: signs, then the Hadamard transform, which spreads every entry over all."""
    signs, size = _signs((k,), generator), _power(k)
    return lambda x: hadamard(torch.nn.functional.pad(x * signs.to(x), (0, size - k))), size


def _subsampled(k: int, d: int, generator: torch.Generator, weights: Tensor) -> Map:
    turn, size = _turned(k, generator)
    d = min(d, size)
    kept, scale = torch.randperm(size, generator=generator)[:d], math.sqrt(size / d)

    def apply(x: Tensor) -> Tensor:
        return turn(x)[..., kept.to(x.device)] * scale

    return Map(apply, apply(torch.eye(k, dtype=torch.float64)))


def _fast_jl(k: int, d: int, generator: torch.Generator, weights: Tensor) -> Map:
    turn, size = _turned(k, generator)
    density = _density(k)
    sparse = torch.randn(size, d, generator=generator, dtype=torch.float64) / math.sqrt(density * d)
    cast = _once(sparse * (torch.rand(size, d, generator=generator) < density))

    def apply(x: Tensor) -> Tensor:
        return turn(x) @ cast(x)

    return Map(apply, apply(torch.eye(k, dtype=torch.float64)))


def _density(k: int) -> float:
    """Of the sparse Gaussian matrix of Ailon and Chazelle (2009): log² of the number of rows over K, up to 1."""
    return min(1.0, math.log(max(2, k)) ** 2 / max(1, k))


def _hashed(entries: int) -> Callable[[int, int, torch.Generator, Tensor], Map]:
    """Every inner index is added, with a sign, to `entries` different ones of the d: 1 is CountSketch, more OSNAP."""

    def draw(k: int, d: int, generator: torch.Generator, weights: Tensor) -> Map:
        each = min(entries, d)
        to = torch.rand(k, d, generator=generator).topk(each, dim=1).indices
        signs = _signs((k, each), generator) / math.sqrt(each)

        def apply(x: Tensor) -> Tensor:
            sums = x.new_zeros(*x.shape[:-1], d)
            for at in range(each):
                sums.index_add_(-1, to[:, at].to(x.device), x * signs[:, at].to(x))
            return sums

        return Map(apply, torch.zeros(k, d, dtype=torch.float64).scatter_(1, to, signs))

    return draw


def _sampled(k: int, d: int, generator: torch.Generator, weights: Tensor) -> Map:
    """As many inner indices as d, drawn with chances in proportion to ‖x_k‖‖w_k‖ (Drineas, Kannan and Mahoney 2006)."""
    chance = weights / weights.sum() if float(weights.sum()) > 0 else torch.full((k,), 1 / k, dtype=torch.float64)
    drawn = torch.multinomial(chance, d, replacement=True, generator=generator)
    scale = (d * chance[drawn]).rsqrt()
    matrix = torch.zeros(k, d, dtype=torch.float64)
    matrix[drawn, torch.arange(d)] = scale
    return Map(lambda x: x[..., drawn.to(x.device)] * scale.to(x), matrix)


def _transform_flops(k: int) -> int:
    return k + _power(k) * max(0, _power(k).bit_length() - 1)


SKETCHES: dict[str, Sketch] = {
    "gaussian": Sketch(_gaussian, lambda k, d: 2 * k * d),
    "orthogonal": Sketch(_orthogonal, lambda k, d: 2 * k * d),
    "rademacher": Sketch(_rademacher, lambda k, d: k * d),  # additions
    "hadamard": Sketch(_subsampled, lambda k, d: _transform_flops(k) + d, dense=False),
    "fast-jl": Sketch(_fast_jl, lambda k, d: _transform_flops(k) + int(2 * _density(k) * _power(k) * d)),
    "count-sketch": Sketch(_hashed(1), lambda k, d: 2 * k, dense=False),
    "osnap": Sketch(_hashed(_OSNAP), lambda k, d: 2 * _OSNAP * k, dense=False),
    "row-sampling": Sketch(_sampled, lambda k, d: d, dense=False),
}
