"""Finite groups by name or multiplication table, and multiplication in their real group algebra as few products.

R[G] is a sum of matrix algebras M_n(D), D the reals, the complex numbers or the quaternions, one for each irreducible real
representation up to equivalence (Wedderburn). In the coordinates of those, multiplication takes rank⟨n,n,n⟩ · rank(D)
products for each: 1 for R, 3 for C (Gauss), 8 for the quaternions (Howell and Lafon 1975).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, reduce
from itertools import pairwise, permutations

import torch
from torch import Tensor

from strassen_tile.bases.exact import classical, naive
from strassen_tile.errors import BasisError

MOST_ELEMENTS = 256  # of a group: a check of associativity is cubic in them, a decomposition too
_SAME = 1e-8  # eigenvalues and characters closer than this are one
_FACTOR = re.compile(r"(Z|D|Q|S|A)(\d{1,400})(?:\^(\d{1,400}))?", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group: `table[g, h]` is the number of the product g·h, elements numbered from 0.

    Raises:
        BasisError: not a square table of element numbers, no identity, an element without inverse, or not associative.
    """

    name: str
    table: Tensor

    def __post_init__(self) -> None:
        table = self.table
        if table.ndim != 2 or table.shape[0] != table.shape[1] or not table.shape[0]:
            raise BasisError(f"a group's table must be square; got shape {tuple(table.shape)}")
        n = table.shape[0]
        if n > MOST_ELEMENTS:
            raise BasisError(f"groups may have up to {MOST_ELEMENTS} elements; got {n}")
        if table.is_floating_point() or table.is_complex() or int(table.min()) < 0 or int(table.max()) >= n:
            raise BasisError(f"a group's table must hold element numbers from 0 to {n - 1}")
        every = torch.arange(n, device="cpu")
        identities = [g for g in range(n) if torch.equal(table[g], every) and torch.equal(table[:, g], every)]
        if not identities:
            raise BasisError(f"{self.name}: no element of the table is an identity")
        if not bool((table == identities[0]).any(dim=1).all()):
            lacking = int((table != identities[0]).all(dim=1).int().argmax())
            raise BasisError(f"{self.name}: element {lacking} of the table has no inverse")
        left = table[table]  # (g h) k; g (h k) is table[g, table[h, k]]
        if not all(torch.equal(left[g], table[g][table]) for g in range(n)):
            raise BasisError(f"{self.name}: the table is not associative")

    @property
    def order(self) -> int:
        """How many elements there are."""
        return self.table.shape[0]

    @property
    def inverse(self) -> Tensor:
        """For each element the number of its inverse."""
        return (self.table == _identity(self.table)).int().argmax(dim=1)

    def times(self, other: Group) -> Group:
        """The direct product."""
        n = other.order
        table = self.table[:, None, :, None] * n + other.table[None, :, None, :]
        return Group(f"{self.name}x{other.name}", table.reshape(self.order * n, self.order * n))


@dataclass(frozen=True)
class Products:
    """Multiplication in R[G] as R products: z_g = Σ_k decoder[k, g] ⟨left_k, x⟩ ⟨right_k, y⟩, all (R, |G|)."""

    left: Tensor
    right: Tensor
    decoder: Tensor


def as_group(group: str | Sequence[Sequence[int]] | Tensor | Group) -> Group:
    """A group by its name or table.

    Args:
        group: `Z32` (cyclic), `D4` (dihedral, of 8 elements), `Q8` (quaternions; Q16 and on: dicyclic), `S3`, `A4`, powers
            such as `Z2^5`, and direct products such as `D4xZ2^2`; or a multiplication table of element numbers.

    Raises:
        BasisError: no such name, a table that is no group, or a group of more than 256 elements.
    """
    if isinstance(group, Group):
        return group
    if isinstance(group, str):
        return _named(group.replace(" ", ""))
    try:
        table = torch.as_tensor(group, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise BasisError(f"a group is a name or a square table of element numbers: {error}") from error
    return Group(
        f"group of {len(table) if table.ndim else 0}", table if table.is_floating_point() else table.long().clone()
    )


@cache
def _named(name: str) -> Group:
    parts: list[Group] = []
    for part in re.split("[x×*]", name):
        found = _FACTOR.fullmatch(part)
        if not found:
            raise BasisError(f"no group is called {name!r}; names are like Z32, Z2^5, D4, Q8, S3, A4, D4xZ2^2")
        kind, size, power = found[1].upper(), int(found[2]), int(found[3] or 1)
        one = _simple(kind, size, name)
        if not 1 <= power <= 8 or one.order**power * math.prod(g.order for g in parts) > MOST_ELEMENTS:
            raise BasisError(f"{name}: groups may have up to {MOST_ELEMENTS} elements")
        parts += [one] * power
    return Group(name, reduce(Group.times, parts).table)


def _simple(kind: str, size: int, name: str) -> Group:
    orders = {
        "Z": size,
        "D": 2 * size,
        "Q": size,
        "S": math.factorial(min(size, 9)),
        "A": math.factorial(min(size, 9)) // 2,
    }
    wrong = size < 1 or (kind == "Q" and (size < 8 or size % 4)) or (kind == "A" and size < 3)
    if wrong or orders[kind] > MOST_ELEMENTS:
        raise BasisError(
            f"{name}: {kind}{size} is not to be had "
            f"(up to {MOST_ELEMENTS} elements; Q takes multiples of 4 from 8 on, A from 3)"
        )
    if kind in "SA":
        return _permutations(kind, size)
    n = size if kind == "Z" else size if kind == "D" else size // 2
    turn, flip = torch.arange(n, device="cpu"), torch.arange(1 if kind == "Z" else 2, device="cpu")
    # r^i s^a · r^j s^b = r^(i ± j) s^(a+b), and s² is 1, or for Q the half turn.
    i, a, j, b = torch.meshgrid(turn, flip, turn, flip, indexing="ij")
    turned = i + torch.where(a == 1, -j, j) + (n // 2 if kind == "Q" else 0) * (a & b)
    table = turned % n * len(flip) + (a ^ b)
    return Group(f"{kind}{size}", table.reshape(n * len(flip), -1))


def _permutations(kind: str, size: int) -> Group:
    def even(order: tuple[int, ...]) -> bool:
        return sum(order[i] > order[j] for i in range(size) for j in range(i + 1, size)) % 2 == 0

    every = [order for order in permutations(range(size)) if kind == "S" or even(order)]
    number = {order: at for at, order in enumerate(every)}
    table = [[number[tuple(g[k] for k in h)] for h in every] for g in every]
    return Group(f"{kind}{size}", torch.tensor(table, device="cpu"))


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
    involutions = (table.diagonal() == int(_identity(table))).nonzero().flatten().tolist()
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


def _identity(table: Tensor) -> Tensor:
    """The number of a left identity; 0 where there is none."""
    return (table == torch.arange(len(table), device="cpu")).all(dim=1).int().argmax()


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
