"""Multiplication in the real group algebra of a finite group as few products.

R[G] is a sum of matrix algebras M_n(D), D the reals, the complex numbers or the quaternions, one for each irreducible real
representation up to equivalence (Wedderburn). In the coordinates of those, multiplication takes rank⟨n,n,n⟩ · rank(D)
products for each: 1 for R, 3 for C (Gauss), 8 for the quaternions (Howell and Lafon 1975).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from strassen_tile.bases.exact import classical, naive
from strassen_tile.bases.finite_groups import Group, identity

_SAME = 1e-8  # eigenvalues and characters closer than this are one


@dataclass(frozen=True)
class Products:
    """Multiplication in R[G] as R products: z_g = Σ_k decoder[k, g] ⟨left_k, x⟩ ⟨right_k, y⟩, all (R, |G|)."""

    left: Tensor
    right: Tensor
    decoder: Tensor


@cache
def _irreducibles(group: Group) -> list[tuple[int, Tensor]]:
    """One real irreducible of each class: dimension of D over R (1, 2 or 4), and its matrices (|G|, d, d), orthogonal.

    Eigenspaces of a generic symmetric matrix that commutes with the regular representation are irreducible.
    """
    n, table = group.order, group.table
    regular = torch.nn.functional.one_hot(table, n).mT.double()  # [g, gh, h]
    weights = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    weights = weights + weights[group.inverse]
    across = torch.zeros(n, n, dtype=torch.float64, device="cpu")
    across[table, torch.arange(n, device="cpu")[:, None].expand(n, n)] = weights.expand(n, n)  # h ↦ Σ_g w_g h g
    values, vectors = torch.linalg.eigh(across)
    starts = [0, *((values.diff() > _SAME * n).nonzero().flatten() + 1).tolist(), n]
    found: list[tuple[int, Tensor]] = []
    characters: list[Tensor] = []
    for start, end in pairwise(starts):
        space = vectors[:, start:end]
        matrices = space.mT @ regular @ space
        character = matrices.diagonal(dim1=1, dim2=2).sum(dim=1)
        if all((other - character).abs().max() > _SAME * n for other in characters):
            characters.append(character)
            size = round(float(character.square().mean()))
            found.append((size, _aligned(group, matrices) if size == 1 else matrices))
    return found


@cache
def products(group: Group) -> Products:
    """Multiplication in R[G] in the coordinates of its irreducibles, with the fewest products known here."""
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    decoders: list[Tensor] = []
    for size, matrices in _irreducibles(group):
        entries = _entries(matrices, size)
        n = entries.shape[1]
        one = classical(n.bit_length() - 1) if n > 1 and n & (n - 1) == 0 else naive(n, n, n)
        left, right, back = _DIVISION[size]
        # A product of the matrix algorithm is one of numbers in D: each is made of products of reals.
        for factor, table, to in ((one.encoder, left, lefts), (one.weight_encoder, right, rights)):
            to.append(torch.einsum("kab,tc,gabc->ktg", factor, table, entries).flatten(0, 1))
        # Fourier inversion: z_g = Σ_ρ n_ρ/|G| tr(ρ(g)ᵀ Z_ρ), and that trace is `size` times the sum over coordinates.
        weighted = entries * (n * size / group.order)
        decoders.append(torch.einsum("kab,tc,gabc->ktg", one.decoder, back, weighted).flatten(0, 1))
    return Products(torch.cat(lefts), torch.cat(rights), torch.cat(decoders))


def _aligned(group: Group, matrices: Tensor) -> Tensor:
    """An equivalent representation in which commuting involutions are diagonal: of many groups all entries are then 0 or ±1."""
    table = group.table
    involutions = (table.diagonal() == int(identity(table))).nonzero().flatten().tolist()
    commuting: list[int] = []
    for g in involutions:
        if all(int(table[g, h]) == int(table[h, g]) for h in commuting):
            commuting.append(g)
    # Roots of whole numbers: no two subsets of signs sum up alike by accident.
    weights = torch.arange(1, len(commuting) + 1, dtype=torch.float64, device="cpu").sqrt()
    vectors: Tensor = torch.linalg.eigh(torch.einsum("g,gxy->xy", weights, matrices[commuting]))[1]
    aligned: Tensor = vectors.mT @ matrices @ vectors
    whole = aligned.round()
    return whole if (aligned - whole).abs().max() < _SAME else aligned


def degrees(group: Group) -> list[int]:
    """Degrees of the complex irreducible representations."""
    found = []
    for size, matrices in _irreducibles(group):
        d = matrices.shape[
            1
        ]  # over C: one of that degree, two conjugate ones of half of it, or one of half of it twice
        found += [d] if size == 1 else [d // 2] * (2 if size == 2 else 1)
    return found


def _entries(matrices: Tensor, size: int) -> Tensor:
    """Each element's matrix over D: (|G|, n, n, size)."""
    d = matrices.shape[1]
    units = _units(matrices, size)
    basis: list[Tensor] = []
    spanned = torch.zeros(0, size, d, dtype=torch.float64, device="cpu")
    while len(basis) * size < d:  # a vector, and its multiples by the units, orthogonal to those before
        flat = spanned.flatten(0, 1)
        candidate = torch.eye(d, dtype=torch.float64, device="cpu")[int(flat.square().sum(dim=0).argmin())]
        rest = candidate - flat.mT @ (flat @ candidate)
        basis.append(rest / rest.norm())
        spanned = torch.cat([spanned, (units @ basis[-1])[None]])
    return torch.einsum("icx,gxy,jy->gijc", spanned, matrices, torch.stack(basis))


def _units(matrices: Tensor, size: int) -> Tensor:
    """1, i, j and k as matrices that commute with all of these, (size, d, d); as such they multiply in reverse: j·i = k."""
    generator = torch.Generator().manual_seed(1)
    d = matrices.shape[1]
    units = [torch.eye(d, dtype=torch.float64, device="cpu")]
    while len(units) < min(size, 3):
        noise = torch.randn(d, d, generator=generator, dtype=torch.float64, device="cpu")
        one = (matrices @ noise @ matrices.mT).mean(dim=0)
        one = one - one.mT
        for other in units[1:]:
            one = one - (one * other).sum() / d * other
        units.append(one / one.norm() * math.sqrt(d))
    if size == 4:
        units.append(units[2] @ units[1])
    return torch.stack(units)


def _table(*rows: Sequence[Sequence[float]]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(row, dtype=torch.float64, device="cpu") for row in rows)


# (products, coordinates) of left, right and result: one; Gauss's three; the eight of quaternions, which are the products of
# Z2² (four, by its characters) less what has the wrong sign.
_H = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
_I = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
_DIVISION = {
    1: _table([[1]], [[1]], [[1]]),
    2: _table([[1, 0], [0, 1], [1, 1]], [[1, 0], [0, 1], [1, 1]], [[1, -1], [-1, -1], [0, 1]]),
    4: _table(
        [*_H, _I[0], _I[3], _I[1], _I[2]],
        [*_H, _I[0], _I[2], _I[3], _I[1]],
        [
            *([-c / 4 if i == 0 else c / 4 for i, c in enumerate(row)] for row in _H),
            [2, 0, 0, 0],
            [0, -2, 0, 0],
            [0, 0, -2, 0],
            [0, 0, 0, -2],
        ],
    ),
}
