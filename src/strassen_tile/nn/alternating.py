"""The steps of `nn.alternate`: Ŵ, E and D of a layer, each by least squares for the other two.

All that inputs and outputs say is in their second moments, so the rows are summed up once. In maths, with flat tiles of A = p·q
and B = p·s numbers: X̂_tkJ = ⟨E_Jk, X_tJ⟩, Y_tL ≈ Σ_k D_Lk Σ_J X̂_tkJ Ŵ_kJL. One encoder and decoder for all tiles, or one
each, differ in nothing but their own steps: shared, one system has the equations of all tiles; apart, the outputs of tile L
depend on no other D, while the E_J add up, so that each is fitted to what the others leave. All in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from strassen_tile.nn import normal_equations
from strassen_tile.nn.normal_equations import step

_ITERATIONS = 6  # of conjugate gradients in a round; the next goes on from there, and more rounds of few reach more
_TOGETHER = 64  # tiles whose equations are written down at once
_ENOUGH = 1e-24  # of the squared residual


class Moments(NamedTuple):
    """Σ_t X_tJ ⊗ X_tJ' (J, A, J, A), Σ_t X_tJ ⊗ Y_tL (J, A, L, B), and Σ ‖Y‖²."""

    inputs: Tensor
    across: Tensor
    energy: float

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Moments:
        """Those of tiles x (T, J, p, q) and y (T, L, p, s), which is zero beyond the edge."""
        of_x, of_y = ((part.shape[1], part.shape[2] * part.shape[3]) for part in (x, y))
        x, y = x.flatten(1), y.flatten(1)
        return cls((x.mT @ x).view(*of_x, *of_x), (x.mT @ y).view(*of_x, *of_y), float(y.square().sum()))


class Factors(NamedTuple):
    """E of each tile, Ŵ, D of each tile, and what of an output tile lies inside the edge: 1 or 0.

    Where encoders are shared those of all tiles are the same, and so are decoders, but for what is cut off them.
    """

    e: Tensor  # (J, r, A)
    w: Tensor  # (r, J, L)
    d: Tensor  # (L, r, B), zero beyond the edge
    inside: Tensor  # (L, B)
    shared: bool


def rounds_of(moments: Moments, factors: Factors, rounds: int) -> tuple[Factors, tuple[float, ...]]:
    """The factors after so many rounds, and the relative squared error of the layer before them and after each.

    In a round Ŵ, E and D, in that order, take their best for the others; the error does not rise.
    """
    second = _second(moments, factors.e)
    target, gram = _target(moments, factors), factors.d @ factors.d.mT
    errors = [float((factors.w * (_applied(second, gram, factors.w) - 2 * target)).sum())]
    for _ in range(rounds):
        factors = factors._replace(w=_weight(moments, factors, second))
        factors = _level(factors._replace(e=_encoder(moments, factors)))
        second = _second(moments, factors.e)  # large, and the same until the next E
        matrices, wanted = _of_decoder(moments, factors, second)
        d = _decoder(factors, matrices, wanted)
        errors.append(float((d * (matrices @ d - 2 * wanted)).sum()))
        factors = factors._replace(d=d)
    energy = moments.energy
    return _level(factors), tuple(max(0.0, energy + one) / energy if energy else 0.0 for one in errors)


def _second(moments: Moments, e: Tensor) -> Tensor:
    """Σ_t X̂_tkJ X̂_tk'J': (r, r, J, J), first k' and then k, so that what `_applied` takes of it lies together."""
    half = torch.einsum("jka,jaib->jkib", e, moments.inputs)
    return torch.einsum("jkib,iob->okji", half, e).contiguous()


def _target(moments: Moments, factors: Factors) -> Tensor:
    """Σ_t X̂_tkJ ⟨Y_tL, D_Lk⟩: (r, J, L)."""
    encoded = torch.einsum("jka,jalb->jklb", factors.e, moments.across)
    return torch.einsum("jklb,lkb->kjl", encoded, factors.d)


def _applied(second: Tensor, gram: Tensor, w: Tensor) -> Tensor:
    """The normal equations' matrix of each column of Ŵ times it, Σ_k'J' second ⟨D_Lk, D_Lk'⟩ Ŵ_k'J'L: (r, J, L)."""
    total = torch.zeros_like(w)
    for at, term in enumerate(w):
        total.addcmul_(gram[:, :, at].mT[:, None], (second[at].flatten(0, 1) @ term).view(w.shape))
    return total


def _weight(moments: Moments, factors: Factors, second: Tensor) -> Tensor:
    gram, target = factors.d @ factors.d.mT, _target(moments, factors)
    if not factors.shared:
        return _by_gradients(second, gram, target, factors.w)
    found, whole = factors.w.clone(), factors.inside.bool().all(dim=1)
    for tiles in (at for at in (whole, ~whole) if at.any()):  # columns of Ŵ that have one matrix
        matrix = (second * gram[tiles][0][:, :, None, None]).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
        now = factors.w[:, :, tiles].flatten(0, 1)
        new = now + step(matrix, target[:, :, tiles].flatten(0, 1) - matrix @ now)
        found[:, :, tiles] = new.unflatten(0, found.shape[:2])
    return found


def _by_gradients(second: Tensor, gram: Tensor, target: Tensor, w: Tensor) -> Tensor:
    """Ŵ by conjugate gradients, every column at once: each has a matrix of r·J unknowns, and to factorise all takes minutes."""
    terms = second.diagonal(dim1=2, dim2=3).permute(2, 0, 1)  # (J, r, r)
    blocks = terms[:, None] * gram  # (J, L, r, r): what terms of a tile share
    ridge = normal_equations.RIDGE * blocks.diagonal(dim1=2, dim2=3).mean(dim=(0, 2))  # (L,)
    ridge = torch.where(ridge > 0, ridge, 1.0)
    blocks.diagonal(dim1=2, dim2=3).add_(ridge[:, None])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(blocks))

    def conditioned(rest: Tensor) -> Tensor:
        return (inverse @ rest.permute(1, 2, 0)[..., None])[..., 0].permute(2, 0, 1)

    found, rest = w.clone(), target - _applied(second, gram, w)
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


def _encoder(moments: Moments, factors: Factors) -> Tensor:
    found, size = factors.e.clone(), factors.e[0].numel()
    if factors.shared:
        matrix, target = found.new_zeros(size, size), torch.zeros_like(found[0])
        for at, (weights, wanted) in enumerate(_of_encoders(moments, factors)):
            matrix += torch.einsum("oki,aib->kaob", weights, moments.inputs[at]).reshape(size, size)
            target += wanted
        now = found[0].reshape(-1, 1)
        new = now + step(matrix, target.reshape(-1, 1) - matrix @ now)
        return new.view(found[0].shape).expand_as(found)
    for at, (weights, wanted) in enumerate(_of_encoders(moments, factors)):
        seen = torch.einsum("aib,iob->aoi", moments.inputs[at], found)
        rest = wanted - torch.einsum("oki,aoi->ka", weights, seen)
        matrix = torch.einsum("ok,ab->kaob", weights[:, :, at], moments.inputs[at, :, at])
        found[at] += step(matrix.reshape(size, size), rest.reshape(-1, 1)).view(rest.shape)
    return found


def _of_encoders(moments: Moments, factors: Factors) -> Iterator[tuple[Tensor, Tensor]]:
    """Of J after J, Σ_L Ŵ_kJL Ŵ_k'J'L ⟨D_Lk, D_Lk'⟩ (r of k', r of k, J'), and what E_J's normal equations should come to."""
    gram, across = (factors.d @ factors.d.mT).permute(2, 1, 0), moments.across
    for own, here in zip(factors.w.split(_TOGETHER, dim=1), across.split(_TOGETHER), strict=True):
        products = (own * gram[:, :, None]).flatten(1, 2) @ factors.w.mT
        wanted = torch.einsum("kjl,jalk->jka", own, torch.einsum("jalb,lkb->jalk", here, factors.d))
        yield from zip(products.unflatten(1, own.shape[:2]).unbind(2), wanted, strict=True)


def _of_decoder(moments: Moments, factors: Factors, second: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices of the normal equations of D, (L, r, r), and what they should come to, (L, r, B)."""
    reached = torch.einsum("jka,jalb->kjlb", factors.e, moments.across)
    rows = [
        torch.einsum("kjl,kjl->lk", factors.w, (second[at].flatten(0, 1) @ term).view(factors.w.shape))
        for at, term in enumerate(factors.w)
    ]
    return torch.stack(rows, dim=2), torch.einsum("kjl,kjlb->lkb", factors.w, reached)


def _decoder(factors: Factors, matrices: Tensor, wanted: Tensor) -> Tensor:
    found = torch.empty_like(factors.d)
    if factors.shared:  # a number of D has the equations of the tiles that it lies inside of
        for at, counts in enumerate(factors.inside.unbind(1)):
            matrix, now = (counts[:, None, None] * matrices).sum(dim=0), factors.d[0, :, at, None]
            new = now + step(matrix, (counts[:, None] * wanted[:, :, at]).sum(dim=0)[:, None] - matrix @ now)
            found[:, :, at] = counts[:, None] * new[:, 0]
        return found
    for at, matrix in enumerate(matrices):
        found[at] = factors.d[at] + step(matrix, wanted[at] - matrix @ factors.d[at])
    return found


def _level(factors: Factors) -> Factors:
    """The same layer with terms of one root mean square in every tile of E and of D, and in Ŵ as a whole."""
    of_e, of_d = (
        part.square().mean(dim=2).sqrt().clamp_min(1e-30) for part in (factors.e, factors.d)
    )  # (J, r), (L, r)
    if factors.shared:  # a tile over the edge has less of D, and is the same D all the same
        of_d = of_d[:1].expand_as(of_d)
    w = factors.w * of_e.mT[:, :, None] * of_d.mT[:, None, :]
    third = w.flatten(1).square().mean(dim=1).sqrt().clamp_min(1e-30) ** (1 / 3)  # (r,)
    e, d = (part * (third / size)[:, :, None] for part, size in ((factors.e, of_e), (factors.d, of_d)))
    return factors._replace(e=e, w=w / third.square()[:, None, None], d=d)
