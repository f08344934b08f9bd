"""The steps of `nn.alternating` where all tiles have one encoder, and one decoder: one system has the equations of all."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from strassen_tile.nn.moments import Factors, Moments
from strassen_tile.nn.normal_equations import step

_TOGETHER = 64  # tiles whose equations are written down at once


class Shared:
    """`alternating.Steps` by Σ_t X̂_tkJ X̂_tk'J', which is large, and made once for an E."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        self._last: tuple[Tensor, Tensor] | None = None

    def weight(self, factors: Factors) -> Tensor:
        """Ŵ (r, J, L), whose columns have one matrix, but for those over the edge."""
        second, gram, target = self._second(factors.e), factors.d @ factors.d.mT, self._target(factors)
        found, whole = factors.w.clone(), factors.inside.bool().all(dim=1)
        for tiles in (at for at in (whole, ~whole) if at.any()):
            matrix = (second * gram[tiles][0][:, :, None, None]).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
            now = factors.w[:, :, tiles].flatten(0, 1)
            new = now + step(matrix, target[:, :, tiles].flatten(0, 1) - matrix @ now)
            found[:, :, tiles] = new.unflatten(0, found.shape[:2])
        return found

    def encoder(self, factors: Factors) -> Tensor:
        """E (J, r, A), J times the same."""
        one = factors.e[0]
        matrix, target = one.new_zeros(one.numel(), one.numel()), torch.zeros_like(one)
        for at, (weights, wanted) in enumerate(self._of_encoders(factors)):
            matrix += torch.einsum("oki,aib->kaob", weights, self.moments.inputs[at]).reshape(matrix.shape)
            target += wanted
        now = one.reshape(-1, 1)
        new = now + step(matrix, target.reshape(-1, 1) - matrix @ now)
        return new.view(one.shape).expand_as(factors.e)

    def of_decoder(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """(L, r, r), (L, r, B): as in `alternating.Steps`."""
        second, w = self._second(factors.e), factors.w
        reached = torch.einsum("jka,jalb->kjlb", factors.e, self.moments.across)
        rows = [
            torch.einsum("kjl,kjl->lk", w, (second[at].flatten(0, 1) @ term).view(w.shape)) for at, term in enumerate(w)
        ]
        return torch.stack(rows, dim=2), torch.einsum("kjl,kjlb->lkb", w, reached)

    def _second(self, e: Tensor) -> Tensor:
        """Σ_t X̂_tk'J' X̂_tkJ: (r of k', r of k, J, J')."""
        if self._last is None or self._last[0] is not e:
            half = torch.einsum("jka,jaib->jkib", e, self.moments.inputs)
            self._last = e, torch.einsum("jkib,iob->okji", half, e).contiguous()
        return self._last[1]

    def _target(self, factors: Factors) -> Tensor:
        """Σ_t X̂_tkJ ⟨Y_tL, D_Lk⟩: (r, J, L)."""
        encoded = torch.einsum("jka,jalb->jklb", factors.e, self.moments.across)
        return torch.einsum("jklb,lkb->kjl", encoded, factors.d)

    def _of_encoders(self, factors: Factors) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each J, Σ_L Ŵ_kJL Ŵ_k'J'L ⟨D_Lk, D_Lk'⟩ (r of k', r of k, J'), and what its equations should come to, (r, A)."""
        gram, across = (factors.d @ factors.d.mT).permute(2, 1, 0), self.moments.across
        for own, here in zip(factors.w.split(_TOGETHER, dim=1), across.split(_TOGETHER), strict=True):
            products = (own * gram[:, :, None]).flatten(1, 2) @ factors.w.mT
            wanted = torch.einsum("kjl,jalk->jka", own, torch.einsum("jalb,lkb->jalk", here, factors.d))
            yield from zip(products.unflatten(1, own.shape[:2]).unbind(2), wanted, strict=True)
