"""E, Ŵ and D of a layer fitted together to a dense weight on calibration inputs, by alternating least squares.

The layer is linear in each of its three factors, so each has its best for the other two by normal equations (`nn.alternating`).
The error on the inputs never rises.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from strassen_tile.errors import ConfigError, ShapeError, shape_text
from strassen_tile.nn.alternating import rounds_of
from strassen_tile.nn.low_rank_start import from_low_rank
from strassen_tile.nn.moments import Factors, Moments
from strassen_tile.tiling import as_samples, to_tiles


class Fitted(NamedTuple):
    """The factors, and the relative squared error on inputs and white rows after each round, the start's first."""

    encoder: Tensor
    encoded_weight: Tensor
    decoder: Tensor
    errors: tuple[float, ...]


@torch.no_grad()
def fit_factors(
    inputs: Tensor,
    weight: Tensor,
    encoder: Tensor,
    encoded_weight: Tensor,
    decoder: Tensor,
    *,
    rounds: int = 20,
    damping: float = 0.1,
    low_rank: bool = False,
) -> Fitted:
    """Factors that minimise ‖layer(x) − x @ weight‖ over calibration inputs, from those given.

    Args:
        inputs: (…, N, K); tiles are cut within samples, as the layer does, and those over the edge are left out.
        weight: (K, M) in maths.
        encoder: (r, p, q), or (J, r, p, q).
        encoded_weight: (r, J, L).
        decoder: (r, p, s), or (L, r, p, s) with an encoder for each tile.
        rounds: of Ŵ, E and D in turn.
        damping: white rows that are fitted to as well, as a fraction of the energy of the inputs: of few inputs far more is
            learnt by heart than is true of others.
        low_rank: start from the product of low rank instead where that is nearer; needs an encoder for each tile.

    Raises:
        ShapeError: shapes that do not fit together, or samples of fewer rows than a tile.
        ConfigError: rounds below 1, damping below 0, or low rank of one encoder for all tiles.
    """
    if encoder.ndim not in (3, 4) or decoder.ndim != encoder.ndim:
        raise ShapeError(
            f"encoder and decoder must be (r, p, q) and (r, p, s), or those of each tile; got "
            f"{shape_text(encoder.shape)} and {shape_text(decoder.shape)}"
        )
    if inputs.ndim < 2 or inputs.shape[-1] != weight.shape[0]:
        raise ShapeError(f"inputs must be (…, N, {weight.shape[0]}); got {shape_text(inputs.shape)}")
    if rounds < 1:
        raise ConfigError(f"rounds must be positive; got {rounds}")
    if not 0 <= damping < float("inf"):
        raise ConfigError(f"damping must be 0 or more; got {damping}")
    if low_rank and encoder.ndim == 3:
        raise ConfigError("low_rank needs an encoder for each tile: one for all does not come to a product of low rank")
    (p, q), s = encoder.shape[-2:], decoder.shape[-1]
    e, w, d = (factor.detach().double() for factor in (encoder, encoded_weight, decoder))
    rows = as_samples(inputs.detach().double())
    if (whole := rows.shape[1] // p * p) == 0:
        raise ShapeError(f"inputs must have p = {p} rows a sample or more; got {shape_text(inputs.shape)}")
    rows = rows[:, :whole]  # of a tile over the edge fewer rows count
    rows = _with_white_rows(rows.unflatten(1, (-1, p)).flatten(0, 1), damping)
    x = to_tiles(rows, p, q).flatten(0, 1)  # (T, J, p, q)
    matrix = weight.detach().double()
    y = to_tiles(rows @ matrix, p, s).flatten(0, 1)  # (T, L, p, s)
    inside = to_tiles(torch.ones(p, weight.shape[1], dtype=torch.float64, device=d.device), p, s)[0].flatten(
        1
    )  # (L, B)
    shared = encoder.ndim == 3
    if shared:
        e, d = e.expand(x.shape[1], -1, -1, -1), d.expand(len(inside), -1, -1, -1)
    factors, moments = Factors(e.flatten(2), w, d.flatten(2) * inside[:, None], inside, shared), Moments.of(x, y)
    starts = [factors, *([from_low_rank(moments, matrix, factors, p)] if low_rank else [])]  # an exact basis stays
    factors, errors = rounds_of(moments, starts, rounds)
    e, d = (part[0] if shared else part for part in (factors.e, factors.d))
    return Fitted(
        e.view(encoder.shape).to(encoder),
        factors.w.to(encoded_weight),
        d.view(decoder.shape).to(decoder),
        errors,
    )


def _with_white_rows(rows: Tensor, damping: float) -> Tensor:
    """Tile rows (T, p, K), and p·K more of one entry each, which together have that part of their energy."""
    _, p, k = rows.shape
    if not damping:
        return rows
    each = (damping * rows.square().sum() / max(1, p * k)).sqrt()
    return torch.cat([rows, each * torch.eye(p * k, dtype=rows.dtype, device=rows.device).view(p * k, p, k)])
