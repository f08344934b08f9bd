"""`nn.alternate` for factors of each column tile: E (J, r, p, q) and D (L, r, p, s), fitted one tile after another.

The outputs of tile L depend on no other D and no other column of Ŵ, so these are least squares apart; the E_J add up, and each
is fitted to what the others leave. All that inputs and outputs say is in their second moments, so the rows are summed up once.
Notation is that of `nn.alternate`, in float64; tiles are flat, of A = p·q and B = p·s numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from strassen_tile.nn import normal_equations
from strassen_tile.nn.normal_equations import step

_ITERATIONS = 20  # of conjugate gradients in a round; the next goes on from there
_ENOUGH = 1e-24  # of the squared residual


def fit_tiles(
    x: Tensor, y: Tensor, e: Tensor, w: Tensor, d: Tensor, rounds: int
) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """E, Ŵ and D after `rounds` of each in turn, and the relative squared errors, the start's first.

    Args:
        x: (T, J, p, q) tiles of inputs.
        y: (T, L, p, s) what they should become, zero beyond the edge.
        e: (J, r, p, q).
        w: (r, J, L).
        d: (L, r, p, s), zero beyond the edge.
        rounds: at least one.
    """
    inputs, outputs = x.flatten(1), y.flatten(1)
    moments = _Moments(
        (inputs.mT @ inputs).view(*e[:, 0].flatten(1).shape * 2),
        (inputs.mT @ outputs).view(*e[:, 0].flatten(1).shape, *d[:, 0].flatten(1).shape),
        float(outputs.square().sum()),
    )
    factors = _Factors(e.flatten(2), w, d.flatten(2))
    errors = [_error(moments, factors)]
    for _ in range(rounds):
        factors = factors._replace(w=_weight(moments, *factors))
        factors = factors._replace(e=_encoder(moments, *factors))
        factors = _level(factors._replace(d=_decoder(moments, *factors)))
        errors.append(_error(moments, factors))
    return factors.e.view(e.shape), factors.w, factors.d.view(d.shape), errors


class _Moments(NamedTuple):
    """Σ_t X_tJ ⊗ X_tJ' (J, A, J, A), Σ_t X_tJ ⊗ Y_tL (J, A, L, B), and Σ ‖Y‖²."""

    inputs: Tensor
    across: Tensor
    energy: float


class _Factors(NamedTuple):
    e: Tensor  # (J, r, A)
    w: Tensor  # (r, J, L)
    d: Tensor  # (L, r, B)


def _second(moments: _Moments, e: Tensor) -> Tensor:
    """Σ_t X̂_tkJ X̂_tk'J': (r, r, J, J)."""
    half = torch.einsum("jka,jaib->jkib", e, moments.inputs)
    return torch.einsum("jkib,iob->koji", half, e).contiguous()


def _target(moments: _Moments, e: Tensor, d: Tensor) -> Tensor:
    """Σ_t X̂_tkJ ⟨Y_tL, D_Lk⟩: (r, J, L)."""
    return torch.einsum("jklb,lkb->kjl", torch.einsum("jka,jalb->jklb", e, moments.across), d)


def _applied(second: Tensor, gram: Tensor, w: Tensor) -> Tensor:
    """The normal equations' matrix of each column of Ŵ times it, Σ_k'J' second ⟨D_Lk, D_Lk'⟩ Ŵ_k'J'L: (r, J, L)."""
    total = torch.zeros_like(w)
    for at, term in enumerate(w):
        total += gram[:, :, at].mT[:, None] * (second[:, at].flatten(0, 1) @ term).view(w.shape)
    return total


def _error(moments: _Moments, factors: _Factors) -> float:
    e, w, d = factors
    reached = _applied(_second(moments, e), d @ d.mT, w)
    total = moments.energy + float((w * (reached - 2 * _target(moments, e, d))).sum())
    return max(0.0, total) / moments.energy if moments.energy else 0.0


def _weight(moments: _Moments, e: Tensor, w: Tensor, d: Tensor) -> Tensor:
    """By conjugate gradients, every column of Ŵ at once: of r·J unknowns each, a factorisation apiece takes minutes a layer."""
    second, gram = _second(moments, e), d @ d.mT
    blocks = (
        second.diagonal(dim1=2, dim2=3).permute(2, 0, 1)[:, None] * gram
    )  # (J, L, r, r): what terms of a tile share
    ridge = normal_equations.RIDGE * blocks.diagonal(dim1=2, dim2=3).mean(dim=(0, 2))  # (L,)
    ridge = torch.where(ridge > 0, ridge, 1.0)
    blocks.diagonal(dim1=2, dim2=3).add_(ridge[:, None])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(blocks))

    def conditioned(rest: Tensor) -> Tensor:
        return (inverse @ rest.permute(1, 2, 0)[..., None])[..., 0].permute(2, 0, 1)

    found, rest = w.clone(), _target(moments, e, d) - _applied(second, gram, w)
    towards = conditioned(rest)
    left = first = (rest * towards).sum(dim=(0, 1))  # of each column
    for _ in range(_ITERATIONS):
        going = left > _ENOUGH * first
        if not bool(going.any()):
            break
        across = _applied(second, gram, towards) + ridge * towards
        size = torch.where(going, left / (towards * across).sum(dim=(0, 1)), 0.0)
        found += size * towards
        rest = rest - size * across
        direction = conditioned(rest)
        before, left = left, torch.where(going, (rest * direction).sum(dim=(0, 1)), 0.0)
        towards = direction + torch.where(going, left / before, 0.0) * towards
    return found


def _encoder(moments: _Moments, e: Tensor, w: Tensor, d: Tensor) -> Tensor:
    gram, found = d @ d.mT, e.clone()
    for at, own in enumerate(w.unbind(1)):  # (r, L)
        weights = torch.einsum("kl,lko,oil->koi", own, gram, w)  # Σ_L Ŵ_kJL Ŵ_k'J'L ⟨D_Lk, D_Lk'⟩
        seen = torch.einsum("aib,iob->aoi", moments.inputs[at], found)
        wanted = torch.einsum("kl,alb,lkb->ka", own, moments.across[at], d)
        rest = wanted - torch.einsum("koi,aoi->ka", weights, seen)
        matrix = torch.einsum("ko,ab->kaob", weights[:, :, at], moments.inputs[at, :, at])
        found[at] += step(matrix.reshape(rest.numel(), rest.numel()), rest.reshape(-1, 1)).view(rest.shape)
    return found


def _decoder(moments: _Moments, e: Tensor, w: Tensor, d: Tensor) -> Tensor:
    second, found = _second(moments, e), torch.empty_like(d)
    reached = torch.einsum("jka,jalb->kjlb", e, moments.across)
    across = [(second[:, at].flatten(0, 1) @ term).view(w.shape) for at, term in enumerate(w)]
    matrices = torch.stack([torch.einsum("kjl,kjl->lk", w, one) for one in across], dim=2)  # (L, r, r)
    wanted = torch.einsum("kjl,kjlb->lkb", w, reached)
    for at, matrix in enumerate(matrices):
        found[at] = d[at] + step(matrix, wanted[at] - matrix @ d[at])
    return found


def _level(factors: _Factors) -> _Factors:
    """The same layer with terms of one root mean square in every tile of E and of D, and in Ŵ as a whole."""
    of_e, of_d = (
        part.square().mean(dim=2).sqrt().clamp_min(1e-30) for part in (factors.e, factors.d)
    )  # (J, r), (L, r)
    w = factors.w * of_e.mT[:, :, None] * of_d.mT[:, None, :]
    third = w.flatten(1).square().mean(dim=1).sqrt().clamp_min(1e-30) ** (1 / 3)  # (r,)
    e, d = (part * (third / size)[:, :, None] for part, size in ((factors.e, of_e), (factors.d, of_d)))
    return _Factors(e, w / third.square()[:, None, None], d)
