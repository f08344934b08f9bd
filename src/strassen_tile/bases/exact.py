"""Exact algorithms: the naive one for any tile, and Strassen's in a well-conditioned form."""

from __future__ import annotations

from dataclasses import replace

import torch

from strassen_tile.basis import Basis
from strassen_tile.errors import BasisError
from strassen_tile.tiling import as_integer, as_tile


def naive(p: int, q: int, s: int) -> Basis:
    """The pqs products x_ij·w_jl, each added to y_il: matrix multiplication as it is taught."""
    p, q, s = as_tile((p, q, s))
    rank = p * q * s
    term = torch.arange(rank, device="cpu")
    i, j, m = term // (q * s), term // s % q, term % s
    encoder, weight_encoder, decoder = (torch.zeros(rank, *size, device="cpu") for size in ((p, q), (q, s), (p, s)))
    encoder[term, i, j] = 1.0
    weight_encoder[term, j, m] = 1.0
    decoder[term, i, m] = 1.0
    return Basis(encoder, weight_encoder, decoder, name=f"naive{p}x{q}x{s}")


# Strassen (1969): product k is ⟨E_k, X⟩⟨F_k, W⟩ and enters the entries of Y that D_k marks.
_STRASSEN_ENCODER = [
    [[1, 0], [0, 1]], [[0, 0], [1, 1]], [[1, 0], [0, 0]], [[0, 0], [0, 1]],
    [[1, 1], [0, 0]], [[-1, 0], [1, 0]], [[0, 1], [0, -1]],
]  # fmt: skip
_STRASSEN_WEIGHT_ENCODER = [
    [[1, 0], [0, 1]], [[1, 0], [0, 0]], [[0, 1], [0, -1]], [[-1, 0], [1, 0]],
    [[0, 0], [0, 1]], [[1, 1], [0, 0]], [[0, 0], [1, 1]],
]  # fmt: skip
_STRASSEN_DECODER = [
    [[1, 0], [0, 1]], [[0, 0], [1, -1]], [[0, 1], [0, 1]], [[1, 0], [1, 0]],
    [[-1, 1], [0, 0]], [[0, 0], [0, 1]], [[1, 0], [0, 0]],
]  # fmt: skip
_CONJUGATION, _INVERSE = [[1.0, 0.5], [0.0, 1.0]], [[1.0, -0.5], [0.0, 1.0]]


def strassen(levels: int = 1) -> Basis:
    """Strassen's algorithm for 2^levels-sided tiles, rank 7^levels, in a form that rounds better than the usual one.

    Conjugating Strassen's factors by A = [[1, ½], [0, 1]] (E′ = AᵀEA⁻ᵀ, F′ = AᵀFA⁻ᵀ, D′ = A⁻¹DA) keeps the algorithm
    exact with coefficients in {0, ±¼, ±½, ±1}, which bfloat16 holds, and brings kappa from 4 to 2.83 a level.

    Raises:
        BasisError: levels is not a positive integer.
    """
    if (as_integer(levels) or 0) < 1:
        raise BasisError(f"strassen takes an integer levels >= 1; got {levels!r}")
    a, inverse = (torch.tensor(rows, dtype=torch.float64, device="cpu") for rows in (_CONJUGATION, _INVERSE))
    one = classical()
    level = Basis(a.mT @ one.encoder @ inverse.mT, a.mT @ one.weight_encoder @ inverse.mT, inverse @ one.decoder @ a)
    return replace(_power(level, levels), name=f"strassen{levels}")


def classical(levels: int = 1) -> Basis:
    """Strassen's algorithm as he wrote it, coefficients 0 and ±1, for 2^levels-sided tiles: kappa 4 a level."""
    e, f, d = (
        torch.tensor(rows, dtype=torch.float64, device="cpu")
        for rows in (_STRASSEN_ENCODER, _STRASSEN_WEIGHT_ENCODER, _STRASSEN_DECODER)
    )
    return replace(_power(Basis(e, f, d), levels), name=f"classical{levels}")


def _power(level: Basis, levels: int) -> Basis:
    basis = level
    for _ in range(levels - 1):
        basis = basis.kron(level)
    return basis
