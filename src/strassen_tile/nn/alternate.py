"""E, Ŵ and D of a layer fitted together to a dense weight on calibration inputs, by alternating least squares.

The layer is linear in each of its three factors, so each has its best for the other two in closed form: normal equations of
r·J unknowns for Ŵ (those of every output tile, one matrix), of r·p·q for E and of r for D. The error on the inputs never rises.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from strassen_tile.errors import ConfigError, ShapeError, shape_text
from strassen_tile.nn.alternate_tiles import fit_tiles
from strassen_tile.nn.normal_equations import step
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

    Raises:
        ShapeError: shapes that do not fit together, or samples of fewer rows than a tile.
        ConfigError: rounds below 1, or damping below 0.
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
    (p, q), s = encoder.shape[-2:], decoder.shape[-1]
    e, w, d = (factor.detach().double() for factor in (encoder, encoded_weight, decoder))
    rows = as_samples(inputs.detach().double())
    if (whole := rows.shape[1] // p * p) == 0:
        raise ShapeError(f"inputs must have p = {p} rows a sample or more; got {shape_text(inputs.shape)}")
    rows = rows[:, :whole]  # of a tile over the edge fewer rows count
    rows = _with_white_rows(rows.unflatten(1, (-1, p)).flatten(0, 1), damping)
    x = to_tiles(rows, p, q).flatten(0, 1)  # (T, J, p, q)
    y = to_tiles(rows @ weight.detach().double(), p, s).flatten(0, 1)  # (T, L, p, s)
    if encoder.ndim == 4:
        inside = to_tiles(torch.ones(p, weight.shape[1], dtype=torch.float64, device=d.device), p, s)[0]  # (L, p, s)
        e, w, d, errors = fit_tiles(x, y, e, w, d * inside[:, None], rounds)
        return Fitted(e.to(encoder), w.to(encoded_weight), d.to(decoder), tuple(errors))
    problem = _Problem(x, y, weight.shape[1], _moments(x))
    errors = [problem.error(e, w, d)]
    for _ in range(rounds):
        w = _weight(problem, e, w, d)
        e = _encoder(problem, e, w, d)
        d = _decoder(problem, e, w, d)
        e, w, d = _level(e, w, d)
        errors.append(problem.error(e, w, d))
    return Fitted(e.to(encoder), w.to(encoded_weight), d.to(decoder), tuple(errors))


def _with_white_rows(rows: Tensor, damping: float) -> Tensor:
    """Tile rows (T, p, K), and p·K more of one entry each, which together have that part of their energy."""
    _, p, k = rows.shape
    if not damping:
        return rows
    each = (damping * rows.square().sum() / max(1, p * k)).sqrt()
    return torch.cat([rows, each * torch.eye(p * k, dtype=rows.dtype, device=rows.device).view(p * k, p, k)])


class _Problem(NamedTuple):
    """Tiles of inputs and of what they should become, columns of the latter, and second moments of the former."""

    x: Tensor
    y: Tensor
    columns: int
    moments: Tensor

    def parts(self) -> list[tuple[slice, int]]:
        """Output tiles and the columns that count of them: all s, but of a last tile that hangs over the edge."""
        tiles, s = self.y.shape[1], self.y.shape[3]
        whole, rest = divmod(self.columns, s)
        return [(slice(0, whole), s)] * (whole > 0) + [(slice(whole, tiles), rest)] * (rest > 0)

    def error(self, e: Tensor, w: Tensor, d: Tensor) -> float:
        """The relative squared error of the layer."""
        found = torch.einsum("tkj,kjl,kps->tlps", _encoded(self.x, e), w, d)
        lost = sum(float((found - self.y)[:, at, :, :size].square().sum()) for at, size in self.parts())
        energy = float(self.y.square().sum())
        return lost / energy if energy else 0.0


def _encoded(x: Tensor, e: Tensor) -> Tensor:
    return torch.einsum("tjpq,kpq->tkj", x, e)


def _solved(matrix: Tensor, target: Tensor, now: Tensor) -> Tensor:
    """The solution of matrix · z = target that is near `now` where the matrix does not say."""
    return now + step(matrix, target - matrix @ now)


def _weight(problem: _Problem, e: Tensor, w: Tensor, d: Tensor) -> Tensor:
    features = _encoded(problem.x, e)
    r, j = features.shape[1:]
    second = (features.flatten(1).mT @ features.flatten(1)).view(r, j, r, j)
    found = torch.empty_like(w)
    for at, size in problem.parts():
        factor = d[:, :, :size]
        matrix = second * (factor.flatten(1) @ factor.flatten(1).mT)[:, None, :, None]
        decoded = torch.einsum("tlps,kps->tkl", problem.y[:, at, :, :size], factor)
        target = torch.einsum("tkj,tkl->kjl", features, decoded)
        now = w[:, :, at]
        found[:, :, at] = _solved(matrix.view(r * j, r * j), target.flatten(0, 1), now.flatten(0, 1)).view(now.shape)
    return found


def _moments(x: Tensor) -> Tensor:
    """Σ_t X_J ⊗ X_J' as (J·J', pq·pq)."""
    tiles, j, p, q = x.shape
    flat = x.reshape(tiles, j * p * q)
    return (flat.mT @ flat).view(j, p * q, j, p * q).transpose(1, 2).reshape(j * j, (p * q) ** 2)


def _encoder(problem: _Problem, e: Tensor, w: Tensor, d: Tensor) -> Tensor:
    r, size = len(e), e[0].numel()
    matrix, target = e.new_zeros(r, r, size, size), torch.zeros_like(e)
    for at, columns in problem.parts():
        factor, part = d[:, :, :columns], w[:, :, at]
        gram = factor.flatten(1) @ factor.flatten(1).mT
        for k in range(r):  # Σ_JJ' (Ŵ_k Ŵ_k'ᵀ)_JJ' X_J ⊗ X_J'
            across = (part[k] @ part.mT).flatten(1) @ problem.moments
            matrix[k] += across.view(r, size, size) * gram[k, :, None, None]
        decoded = torch.einsum("tlps,kps->tkl", problem.y[:, at, :, :columns], factor)
        target += torch.einsum("tjpq,tkj->kpq", problem.x, torch.einsum("tkl,kjl->tkj", decoded, part))
    whole = matrix.permute(0, 2, 1, 3).reshape(r * size, r * size)
    return _solved(whole, target.reshape(-1, 1), e.reshape(-1, 1)).view(e.shape)


def _decoder(problem: _Problem, e: Tensor, w: Tensor, d: Tensor) -> Tensor:
    products = torch.einsum("tkj,kjl->tkl", _encoded(problem.x, e), w)
    found, s = d.clone(), d.shape[2]
    ends = sorted({0, s, *(size for _, size in problem.parts())})
    for start, end in pairwise(ends):  # columns that as many output tiles have
        tiles = [at for at, size in problem.parts() if size >= end]
        if tiles:
            flat = torch.cat([products[:, :, at] for at in tiles], dim=2).transpose(0, 1).flatten(1)  # (r, T·L)
            wanted = torch.cat([problem.y[:, at, :, start:end] for at in tiles], dim=1).flatten(0, 1).flatten(1)
            now = d[:, :, start:end]
            found[:, :, start:end] = _solved(flat @ flat.mT, flat @ wanted, now.flatten(1)).view(now.shape)
    return found


def _level(e: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same layer with the three factors of each term of one root mean square: normal equations stay well-scaled."""
    sizes = torch.stack([part.flatten(1).square().mean(dim=1).sqrt().clamp_min(1e-30) for part in (e, w, d)])
    scales = sizes.log().mean(dim=0).exp() / sizes
    e, w, d = (part * scale[:, None, None] for part, scale in zip((e, w, d), scales, strict=True))
    return e, w, d
