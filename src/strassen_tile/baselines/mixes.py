"""A cheap mix of rows before a linear layer, whatever its product is: the short convolution of `nn.TokenMix`, and two controls,
in tiles of p rows and 3×3 on a grid.

Part of what a row-mixing STL layer gains comes from the mixing, not from the encoding; any other layer that may mix rows for
a few FLOPs more shows how much. Every mix has weights of its own for each feature and is added to x, and starts at zero, so
that a mixed layer starts as the layer that it wraps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strassen_tile import cost
from strassen_tile.baselines.layers import layer_cost
from strassen_tile.convert import Mixing
from strassen_tile.convert.select import mixing_of
from strassen_tile.errors import ConfigError, ShapeError, shape_text
from strassen_tile.nn import PaddingMask, STLConfig, TokenMix, token_mix
from strassen_tile.nn.token_mix import BEFORE, TAPS
from strassen_tile.tiling import tile_count

Mix = Literal["causal", "symmetric", "tile", "grid"]
MIXES: tuple[Mix, ...] = get_args(Mix)


def mix_rows(x: Tensor, mix: Tensor) -> Tensor:
    """Mix the rows of x (…, N, K) in tiles of p: x[I, a, k] + Σ_b mix[k, a, b] x[I, b, k] for mix (K, p, p)."""
    n, p = x.shape[-2], mix.shape[-1]
    tiles = F.pad(x, (0, 0, 0, -n % p)).unflatten(-2, (-1, p))
    return x + torch.einsum("...ibk,kab->...iak", tiles, mix).flatten(-3, -2)[..., :n, :]


def mix_grid(x: Tensor, mix: Tensor) -> Tensor:
    """Mix 3×3 neighbours of x (…, N, K), rows of a square grid, by mix (K, 1, 3, 3); zeros outside the grid.

    x[i, j, k] + Σ_uv mix[k, 0, u, v] x[i + u − 1, j + v − 1, k]. Of N = side² + 1 rows the first is the class token, which
    is left as it is and reaches no other.

    Raises:
        ShapeError: N is neither a square nor a square + 1.
    """
    n = x.shape[-2]
    cells = grid_cells(n)
    side = math.isqrt(cells)
    tokens = x[..., n - cells :, :]
    grid = tokens.flatten(0, -3).unflatten(-2, (side, side))
    mixed = tokens + _depthwise(grid, mix, padding=1).reshape(tokens.shape)
    return torch.cat([x[..., : n - cells, :], mixed], dim=-2) if cells < n else mixed


def grid_cells(n: int) -> int:
    """How many of n rows are cells of a square grid: n, or n − 1 where the first is a class token. Raises ShapeError."""
    for cells in (n, n - 1):
        if cells >= 0 and math.isqrt(cells) ** 2 == cells:
            return cells
    raise ShapeError(f"a 3×3 mix wants rows of a square grid, with or without a class token before them; got N={n}")


def _depthwise(grid: Tensor, weight: Tensor, *, padding: int) -> Tensor:
    """(B, H, W, K), by weight (K, 1, h, w): features last in memory, before and after."""
    return F.conv2d(grid.movedim(-1, 1), weight, padding=padding, groups=weight.shape[0]).movedim(1, -1)


_CALLS: dict[Mix, Callable[[Tensor, Tensor], Tensor]] = {
    "causal": partial(token_mix, before=BEFORE["causal"]),
    "symmetric": partial(token_mix, before=BEFORE["symmetric"]),
    "tile": mix_rows,
    "grid": mix_grid,
}


def check_mix(kind: str, rows_mixed: int) -> None:
    """Raise ConfigError for a kind that there is not, or rows_mixed below 1."""
    if kind not in MIXES:
        raise ConfigError(f"kind must be one of {', '.join(MIXES)}; got {kind!r}")
    if rows_mixed < 1:
        raise ConfigError(f"rows_mixed must be >= 1; got {rows_mixed}")


def mix_shape(kind: Mix, k: int, rows_mixed: int) -> tuple[int, ...]:
    """The shape of the weights of a mix of k features."""
    shapes: dict[str, tuple[int, ...]] = {"tile": (k, rows_mixed, rows_mixed), "grid": (k, 1, 3, 3)}
    return shapes.get(kind, (k, TAPS))


def mixing_with(kind: Mix, rows_mixed: int, inner: Mixing | None) -> Mixing | None:
    """How rows mix in a layer after a mix of this kind, if in the layer itself they mix as `inner` says; None on a grid, whose
    rows meet all, from layer to layer.
    """
    rows, causal = (1, True) if inner is None else (inner.rows, inner.causal)
    if kind == "tile":
        return Mixing(math.lcm(rows, rows_mixed), causal=False)
    before = BEFORE.get(kind)
    return None if before is None else Mixing(rows, causal, before, TAPS - 1 - before)


def mixed_by(kind: Mix, x: Tensor, mix: Tensor) -> Tensor:
    """X (…, N, K) after the mix of this kind. Raises ShapeError for a 2-D input: its rows are a batch."""
    if x.ndim < 3:
        raise ShapeError(f"a 2-D input {shape_text(x.shape)} is a batch of rows, which this layer would mix")
    return _CALLS[kind](x, mix) if x.numel() else x


def add_mix(
    layer: cost.Cost, kind: Mix, rows_mixed: int, rows: int, k: int, *, batch: int = 1, itemsize: int = 4
) -> cost.Cost:
    """The cost of a layer fed (batch, rows, k), and of a mix before it: 2·rows·k FLOPs for each row that a row may see."""
    taps, each = {"tile": rows_mixed, "grid": 9}.get(kind, TAPS), math.prod(mix_shape(kind, 1, rows_mixed))
    mixed = tile_count(rows, rows_mixed) * rows_mixed if kind == "tile" else rows
    if kind == "grid" and math.isqrt(rows) ** 2 != rows:
        mixed = rows - 1  # the class token is not mixed
    found = cost.with_mix(layer, rows, k, taps, batch=batch, itemsize=itemsize)
    return replace(
        found,
        flops=found.flops + 2 * batch * (mixed - rows) * k * taps,
        bytes=found.bytes + itemsize * k * (each - taps),
        params=found.params + k * (each - taps),
    )


class MixedLinear(nn.Module):
    """A linear layer of any kind after a learned mix of rows, its own for every input feature.

    `mix` starts at zero, so the layer starts as `linear`, and weight decay pulls it there.

    Args:
        linear: the layer, (…, N, K) → (…, N, M), with `in_features` and `out_features`.
        kind: "causal" or "symmetric": four neighbouring rows (`nn.TokenMix`); "tile": the p×p mix of the rows of each tile
            (`mix_rows`); "grid": 3×3 on the square grid that the rows are (`mix_grid`).
        rows_mixed: p of "tile".

    Attributes:
        padding: which rows are padding, for the first two kinds; those of the others are to be real, all of them.

    Raises:
        ConfigError: an unknown kind, or rows_mixed < 1.
    """

    padding: PaddingMask | None
    mix: nn.Parameter | TokenMix

    def __init__(self, linear: nn.Module, kind: Mix = "tile", rows_mixed: int = 4) -> None:
        super().__init__()
        check_mix(kind, rows_mixed)
        self.kind, self.rows_mixed = kind, rows_mixed
        self.in_features, self.out_features = int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]
        like = next(t for t in (*linear.parameters(), *linear.buffers()) if t.is_floating_point())
        self.linear, self.padding = linear, None
        if kind == "causal" or kind == "symmetric":
            self.mix = TokenMix(self.in_features, kind, device=like.device, dtype=like.dtype)
        else:
            self.mix = nn.Parameter(like.new_zeros(mix_shape(kind, self.in_features, rows_mixed)))
        self.train(linear.training)

    @property
    def follows_padding(self) -> bool:
        """Whether it is to be told which rows are padding."""
        return isinstance(self.mix, TokenMix)

    @property
    def row_mixing(self) -> Mixing | None:
        """How its rows mix, those of the layer inside included: `mixing_with`."""
        config = getattr(self.linear, "config", None)
        inner = mixing_of(config) if isinstance(config, STLConfig) else None
        return mixing_with(self.kind, self.rows_mixed, inner)

    def forward(self, input: Tensor) -> Tensor:
        """(…, N, K) → (…, N, M). Raises ShapeError for a 2-D input, or for "grid" if N is no square (or a square + 1)."""
        if isinstance(self.mix, TokenMix):
            return self.linear(self.mix(input, self.padding))  # type: ignore[no-any-return]
        return self.linear(mixed_by(self.kind, input, self.mix))  # type: ignore[no-any-return]

    def cost(self, rows: int, batch: int = 1) -> cost.Cost:
        """That of the layer, and 2NK·(p, 4 or 9) FLOPs for the mix; `dense_…` are those of the layer."""
        inner = layer_cost(self.linear, rows, batch)
        size = next(self.parameters()).element_size()
        return add_mix(inner, self.kind, self.rows_mixed, rows, self.in_features, batch=batch, itemsize=size)

    def extra_repr(self) -> str:
        """The kind of mix."""
        return f"kind={self.kind!r}" + (f", rows_mixed={self.rows_mixed}" if self.kind == "tile" else "")
