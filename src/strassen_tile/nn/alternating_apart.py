"""The steps of `nn.alternating` where every tile has an encoder, and a decoder, of its own.

Matrices are not written down, which would take r²J² numbers: what the factors come to is a weight (J·A, L·B), and the inputs'
second moments are applied to that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from strassen_tile.nn import normal_equations
from strassen_tile.nn.moments import Factors, Moments
from strassen_tile.nn.normal_equations import Products

_ITERATIONS = 6  # of conjugate gradients in a round; the next goes on from there, and more rounds of few reach more
_TOGETHER = 32  # tiles to which the inputs are applied at once: products of few rows are slow
_ENOUGH = 1e-16  # of the squared residual


class Apart:
    """`alternating.Steps` by products with the inputs' second moments (J·A, J·A)."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        self.inputs = moments.inputs.flatten(2).flatten(0, 1)
        self.size = float(self.inputs.diagonal().mean()) or 1.0
        self.single = (self.inputs / self.size).float()
        self.across = moments.across.flatten(2)  # (J, A, L·B)
        self.own = moments.inputs.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (J, A, A), of each tile by itself

    def weight(self, factors: Factors) -> Tensor:
        """Ŵ (r, J, L) by conjugate gradients, every column at once: to factorise the matrix of each takes minutes."""
        e, d, w = factors.e, factors.d.transpose(0, 1), factors.w.transpose(0, 1)  # (r, L, B), (J, r, L)
        blocks = (e @ self.own @ e.mT)[:, None] * (factors.d @ factors.d.mT)  # (J, L, r, r): what terms of a tile share
        ridge = normal_equations.RIDGE * blocks.diagonal(dim1=2, dim2=3).mean(dim=(0, 2))  # (L,)
        ridge = torch.where(ridge > 0, ridge, self.size)
        blocks.diagonal(dim1=2, dim2=3).add_(ridge[:, None])
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(blocks))
        rest = _encoded(self.across - self._seen(_weight_of(e, w, d)), e, d)
        size = rest.abs().amax().clamp_min(torch.finfo(rest.dtype).tiny)
        single = _Single(self.single, e.float(), d.float(), (ridge / self.size).float(), (self.size * inverse).float())
        change = single.solved(rest / size)
        return (w + size / self.size * change).transpose(0, 1).contiguous()

    def encoder(self, factors: Factors) -> Tensor:
        """E (J, r, A), tile after tile, each to what the others, as they are by then, leave."""
        found = factors.e.clone()
        outputs = _outputs(factors.w.transpose(0, 1), factors.d.transpose(0, 1))
        weight = found.mT @ outputs  # (J, A, L·B)
        equations = Products(outputs @ outputs.mT, self.own)
        for here in torch.arange(len(found)).split(_TOGETHER):
            rows = self.moments.inputs[here].flatten(2)  # (tiles here, A, J·A)
            seen = rows @ weight.flatten(0, 1)
            for at, seen_here in zip(here.tolist(), seen, strict=True):
                out = outputs[at]
                change = equations.step(at, out @ (self.across[at] - seen_here).mT)  # (r, A)
                found[at] += change
                weight[at] += change.mT @ out
                seen += self.moments.inputs[here, :, at] @ (change.mT @ out)
        return found

    def of_decoder(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """(L, r, r), (L, r, B): as in `alternating.Steps`."""
        sums = torch.einsum("jka,kjl->ljak", factors.e, factors.w).flatten(1, 2)  # (L, J·A, r): X̂_tk before D_Lk
        seen = (self.inputs @ sums.transpose(0, 1).flatten(1)).unflatten(1, sums.shape[::2])  # (J·A, L, r)
        return sums.mT @ seen.transpose(0, 1), sums.mT @ self.moments.across.flatten(0, 1).transpose(0, 1)

    def _seen(self, weight: Tensor) -> Tensor:
        """The inputs' second moments times a weight (J, A, L·B)."""
        return (self.inputs @ weight.flatten(0, 1)).view(weight.shape)


class _Single(NamedTuple):
    """The normal equations of Ŵ in float32, of inputs of size one: what their solution is off by, the next round solves for."""

    inputs: Tensor
    e: Tensor
    d: Tensor
    ridge: Tensor
    inverse: Tensor  # of each tile's block, for conditioning

    def solved(self, wanted: Tensor) -> Tensor:
        """Conjugate gradients from nothing: (J, r, L), float64 as it came."""
        rest = wanted.float()
        found, towards = torch.zeros_like(rest), self._conditioned(rest)
        left = first = (rest * towards).sum(dim=(0, 1))  # of each column
        for _ in range(_ITERATIONS):
            going = left > _ENOUGH * first
            if not bool(going.any()):
                break
            weight = _weight_of(self.e, towards, self.d)
            seen = (self.inputs @ weight.flatten(0, 1)).view(weight.shape)
            across = _encoded(seen, self.e, self.d) + self.ridge * towards
            bent = (towards * across).sum(dim=(0, 1))
            size = torch.where(going & (bent > 0), left / bent, 0.0)
            found += size * towards
            rest = rest - size * across
            direction = self._conditioned(rest)
            before, left = left, torch.where(going, (rest * direction).sum(dim=(0, 1)), 0.0)
            towards = direction + torch.where(going, left / before, 0.0) * towards
        return found.to(wanted.dtype)

    def _conditioned(self, rest: Tensor) -> Tensor:
        return (self.inverse @ rest.mT[..., None])[..., 0].mT


def _weight_of(e: Tensor, w: Tensor, d: Tensor) -> Tensor:
    """What the factors come to: (J, A, L·B)."""
    return e.mT @ _outputs(w, d)


def _encoded(weight: Tensor, e: Tensor, d: Tensor) -> Tensor:
    """The transpose of `_weight_of`, of Ŵ: (J, r, L) of (J, A, L·B)."""
    parts: Tensor = (e @ weight).unflatten(2, d.shape[1:])
    return (parts * d).sum(dim=3)


def _outputs(w: Tensor, d: Tensor) -> Tensor:
    """What of the outputs a term of a tile of inputs gives: (J, r, L·B) of Ŵ (J, r, L) and D (r, L, B)."""
    return (w[..., None] * d).flatten(2)
