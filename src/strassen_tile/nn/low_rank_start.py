"""The product of low rank as a start for factors of tiles: with Ŵ = 1 they come to Σ_k E_k D_k, and Ŵ has yet to be fitted."""

from __future__ import annotations

import torch
from torch import Tensor

from strassen_tile.nn.moments import Factors, Moments


def from_low_rank(moments: Moments, weight: Tensor, factors: Factors, rows: int) -> Factors:
    """Factors that come to the product of rank ⌊r/p⌋ which is nearest to `weight` on the inputs.

    That is W V Vᵀ for V the principal directions of the outputs, in each of the p rows of a tile by itself; r mod p terms, or
    those that a weight of lower rank leaves over, keep the E and D of `factors`, with a Ŵ of zero.

    Args:
        moments: of the inputs, and of the outputs that `weight` makes of them.
        weight: (K, M) in maths.
        factors: of encoders and decoders of each tile.
        rows: p, of a tile.
    """
    (j, r, a), (outputs, _, b) = factors.e.shape, factors.d.shape
    q, s = a // rows, b // rows
    rank = min(r // rows, *weight.shape)
    padded = weight.new_zeros(j * q, outputs * s)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    across = moments.across.view(j, rows, q, outputs, rows, s).diagonal(dim1=1, dim2=4).sum(dim=-1)  # (J, q, L, s)
    directions = torch.linalg.eigh(padded.mT @ across.reshape(padded.shape)).eigenvectors.flip(1)[:, :rank]
    of_e = (padded @ directions).view(j, q, rank).mT
    of_d = directions.view(outputs, s, rank).mT
    e, d, w = factors.e.clone(), factors.d.clone(), torch.zeros_like(factors.w)
    for row in range(rows):
        terms = slice(row * rank, (row + 1) * rank)
        e[:, terms], d[:, terms], w[terms] = 0, 0, 1
        e[:, terms, row * q : (row + 1) * q] = of_e
        d[:, terms, row * s : (row + 1) * s] = of_d
    return factors._replace(e=e, w=w, d=d * factors.inside[:, None])
