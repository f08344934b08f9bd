"""Finite groups by name or multiplication table."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, reduce
from itertools import permutations

import torch
from torch import Tensor

from strassen_tile.errors import BasisError

MOST_ELEMENTS = 256  # of a group: a check of associativity is cubic in them, a decomposition too
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
        if not isinstance(table, Tensor):
            raise BasisError(f"a group's table must be a tensor; got {type(table)} (as_group takes lists)")
        if not table.is_floating_point() and not table.is_complex():
            table = table.long()  # it indexes itself
            object.__setattr__(self, "table", table)
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
        return (self.table == identity(self.table)).int().argmax(dim=1)

    def times(self, other: Group) -> Group:
        """The direct product."""
        n = other.order
        table = self.table[:, None, :, None] * n + other.table[None, :, None, :]
        return Group(f"{self.name}x{other.name}", table.reshape(self.order * n, self.order * n))


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
    return Group(f"group of {len(table) if table.ndim else 0}", table.clone())


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
            raise BasisError(f"{name}: powers are from 1 to 8, and groups may have up to {MOST_ELEMENTS} elements")
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


def identity(table: Tensor) -> Tensor:
    """The number of a left identity; 0 where there is none."""
    return (table == torch.arange(len(table), device="cpu")).all(dim=1).int().argmax()
