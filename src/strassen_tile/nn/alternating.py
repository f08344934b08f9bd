"""The rounds of `nn.alternate`: Ŵ, E and D of a layer, each by least squares for the other two.

One encoder and decoder for all tiles, or one each, differ in their equations: shared, one system has those of all tiles
(`nn.alternating_shared`); apart, the outputs of tile L depend on no other D, while the E_J add up, so that each is fitted to
what the others leave (`nn.alternating_apart`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from strassen_tile.nn.alternating_apart import Apart
from strassen_tile.nn.alternating_shared import Shared
from strassen_tile.nn.moments import Factors, Moments
from strassen_tile.nn.normal_equations import step

_REACH = 0.7  # of the way of a round; from 0.5 to 1.3 it makes little difference


class Steps(Protocol):
    """The least squares of a layer's factors, each for the other two."""

    def weight(self, factors: Factors) -> Tensor:
        """Ŵ (r, J, L)."""

    def encoder(self, factors: Factors) -> Tensor:
        """E (J, r, A)."""

    def of_decoder(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """The matrices of the normal equations of D, (L, r, r), and what they should come to, (L, r, B)."""


def rounds_of(moments: Moments, starts: Sequence[Factors], rounds: int) -> tuple[Factors, tuple[float, ...]]:
    """The factors after so many rounds from the nearest of the starts, the first of equals.

    With them the relative squared error of the layer before the rounds and after each.

    In a round Ŵ, E and D, in that order, take their best for the others, from factors that lie beyond the last ones in the
    direction those had come: in a long valley that gets further (extrapolation, as of Ang, Cohen, Hien and Gillis for
    tensors, ICASSP 2020, doi 10.1109/ICASSP40776.2020.9053849). Of a round from which the error would rise nothing is kept, and
    the next one starts from where the last one ended.
    """
    steps: Steps = Shared(moments) if starts[0].shared else Apart(moments)
    lost = [_error(moments, start.d, *steps.of_decoder(start)) for start in starts]
    factors, errors = starts[lost.index(min(lost))], [min(lost)]
    ahead, ended = factors, False
    for _ in range(rounds):
        found, error = _round(moments, steps, ahead)
        if error > errors[-1]:
            ahead, error = factors, errors[-1]
        elif ended:
            ahead, factors = _beyond(factors, found), found
        else:  # what a fit starts from is not levelled, so that nothing can be told from how far it came
            ahead, factors, ended = found, found, True
        errors.append(error)
    return factors, tuple(errors)


def _round(moments: Moments, steps: Steps, factors: Factors) -> tuple[Factors, float]:
    factors = factors._replace(w=steps.weight(factors))
    factors = _level(factors._replace(e=steps.encoder(factors)))
    matrices, wanted = steps.of_decoder(factors)
    factors = factors._replace(d=_decoder(factors, matrices, wanted))
    return _level(factors), _error(moments, factors.d, matrices, wanted)


def _beyond(before: Factors, now: Factors) -> Factors:
    """Beyond those of now by `_REACH` of their way from those before."""
    e, w, d = (new + _REACH * (new - old) for new, old in zip(now[:3], before[:3], strict=True))
    return now._replace(e=e, w=w, d=d)


def _error(moments: Moments, d: Tensor, matrices: Tensor, wanted: Tensor) -> float:
    if not moments.energy:
        return 0.0
    return max(0.0, moments.energy + float((d * (matrices @ d - 2 * wanted)).sum())) / moments.energy


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
