"""`nn.alternate` for factors of each column tile: E (J, r, p, q) and D (L, r, p, s), fitted one tile after another.

The outputs of tile L depend on no other D and no other column of Ŵ, so these are least squares apart; the E_J add up, and each
is fitted to what the others leave. All that inputs and outputs say is in their second moments, so the rows are summed up once.
Notation is that of `nn.alternate`, in float64; tiles are flat, of A = p·q and B = p·s numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from strassen_tile.nn.normal_equations import step


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
    """Σ_t X̂_tkJ X̂_tk'J': (r, J, r, J)."""
    half = torch.einsum("jka,jaib->jkib", e, moments.inputs)
    return torch.einsum("jkib,iob->kjoi", half, e).contiguous()


def _target(moments: _Moments, e: Tensor, d: Tensor) -> Tensor:
    """Σ_t X̂_tkJ ⟨Y_tL, D_Lk⟩: (r, J, L)."""
    return torch.einsum("jklb,lkb->kjl", torch.einsum("jka,jalb->jklb", e, moments.across), d)


def _error(moments: _Moments, factors: _Factors) -> float:
    e, w, d = factors
    second, total = _second(moments, e), moments.energy - 2 * float((w * _target(moments, e, d)).sum())
    for at, gram in enumerate(d @ d.mT):
        column = w[:, :, at]
        total += float((column * torch.einsum("kjoi,ko,oi->kj", second, gram, column)).sum())
    return max(0.0, total) / moments.energy if moments.energy else 0.0


def _weight(moments: _Moments, e: Tensor, w: Tensor, d: Tensor) -> Tensor:
    second, target, found = _second(moments, e), _target(moments, e, d), torch.empty_like(w)
    r, j = w.shape[:2]
    for at, gram in enumerate(d @ d.mT):
        matrix = (second * gram[:, None, :, None]).view(r * j, r * j)
        now = w[:, :, at].reshape(-1, 1)
        found[:, :, at] = (now + step(matrix, target[:, :, at].reshape(-1, 1) - matrix @ now)).view(r, j)
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
    for at, column in enumerate(w.unbind(2)):
        matrix = torch.einsum("kj,kjoi,oi->ko", column, second, column)
        wanted = torch.einsum("kj,kjb->kb", column, reached[:, :, at])
        found[at] = d[at] + step(matrix, wanted - matrix @ d[at])
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
