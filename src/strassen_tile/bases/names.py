"""A basis by name: the one place where a name becomes factors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from itertools import permutations
from os import PathLike, fspath

from strassen_tile.bases.approximate import approximate, shipped, truncated
from strassen_tile.bases.exact import naive, strassen
from strassen_tile.bases.files import load
from strassen_tile.bases.finite_groups import as_group
from strassen_tile.bases.group_algebra import products
from strassen_tile.bases.groups import group
from strassen_tile.bases.random import random
from strassen_tile.basis import Basis
from strassen_tile.errors import BasisError, BasisMismatchError
from strassen_tile.tiling import Tile, as_integer, as_tile

_MOST_DIGITS = 18  # of a seed
_LISTED = re.compile(r"(\d{1,3})x(\d{1,3})x(\d{1,3})_r(\d{1,4})")  # as shipped ones are called
_MOST_COEFFICIENTS = 8_000_000  # Strassen's algorithm on tiles of 16 has 1.8 million
NAMES = ("naive", "strassen", "approximate", "truncated", "random", "group:NAME")


def named(spec: str | PathLike[str], tile: int | Sequence[int] | None = None, rank: int | None = None) -> Basis:
    """The basis that `spec` names.

    Args:
        spec: a shipped one as lists call it, "4x4x4_r32"; "naive" and "strassen" (exact), "approximate" (the shipped one),
            "truncated" (Strassen's best terms), "random" (or "random:SEED"), "group:NAME" (or "group:NAME:DECODER", as in
            "group:D4xZ2^2:raw"), or the path of a file.
        tile: p, q, s, or one side for a cube; None: 4, and for a file its own.
        rank: None: that of the basis; "approximate", "truncated" and "random" then take ⅜ of the pqs products of a dense tile.

    Raises:
        BasisError: no such basis.
        BasisMismatchError: it is not for that tile or rank.
        ShapeError: a tile that makes no sense.
    """
    if not isinstance(spec, str | PathLike) or isinstance(fspath(spec), bytes):
        raise BasisError(f"a basis is named by a text ({', '.join(NAMES)}) or a path; got {spec!r}")
    spec = fspath(spec)
    if listed := _LISTED.fullmatch(spec):
        *own_sides, own_terms = map(int, listed.groups())
        if (tile is not None and as_tile(tile) != tuple(own_sides)) or (
            rank is not None and as_integer(rank) != own_terms
        ):
            raise BasisMismatchError(
                f"basis {spec!r} has its tile and rank in its name; {tile} and {rank} are asked for"
            )
        return approximate(own_sides, own_terms)
    sides = as_tile(4 if tile is None else tile)
    own = own_rank(spec, sides)
    if own is not None and rank is not None and as_integer(rank) != own:
        raise BasisMismatchError(f"basis {spec!r} has rank {own}; {rank!r} is asked for")
    kind, _, rest = spec.partition(":")
    wanted = usual_rank(sides) if rank is None else rank
    p, q, s = sides
    count = (as_integer(wanted if own is None else own) or 0) * (p * q + q * s + p * s)
    if count > _MOST_COEFFICIENTS:  # before it is made: hours of work, with little to be had of it
        raise BasisError(f"basis {spec!r} on a tile of {p}×{q}×{s} has {count} coefficients; take a smaller tile")
    if _is_drawn(kind, rest):
        return random(sides, wanted, seed=int(rest or 0))
    if kind == "group":
        name, _, decoder = rest.partition(":")
        return group(name, sides, decoder=decoder or "ls")  # type: ignore[arg-type] # judged there
    if spec == "approximate":
        return approximate(sides, wanted)
    if spec == "truncated":
        return truncated(_levels(spec, sides), wanted)
    if spec in ("naive", "strassen"):
        return naive(*sides) if spec == "naive" else strassen(_levels(spec, sides))
    found = load(spec)
    if tile is not None and found.tile != sides:
        raise BasisMismatchError(f"basis {spec!r} has tile {found.tile}; {sides} is asked for")
    return found


@cache
def known() -> tuple[Basis, ...]:
    """All that ship, in every order of their sides, and Strassen's algorithm applied once to three times."""
    shipped_ones = (
        approximate(tile, rank).oriented(order) for tile, rank in shipped() for order in sorted(set(permutations(tile)))
    )
    return (*shipped_ones, *(strassen(levels) for levels in (1, 2, 3)))


def own_rank(spec: str, tile: Tile) -> int | None:
    """The rank of the basis that `spec` names, where it has but one; None where it is chosen. Raises BasisError as `named`."""
    p, q, s = tile
    kind, _, rest = spec.partition(":")
    if spec in ("approximate", "truncated") or _is_drawn(kind, rest):
        return None
    if spec == "naive":
        return p * q * s
    if spec == "strassen":
        return int(7 ** _levels(spec, tile))
    if kind == "group":
        return len(products(as_group(rest.partition(":")[0])).left)
    return load(spec).rank


def usual_rank(tile: Tile) -> int:
    """⅜ of the pqs products of a dense tile, and at least one: 24 of 4×4×4, 6 of 1×4×4."""
    p, q, s = tile
    return max(1, round(3 / 8 * p * q * s))


def _is_drawn(kind: str, seed: str) -> bool:
    return kind == "random" and (not seed or (seed.isdecimal() and len(seed) <= _MOST_DIGITS))


def _levels(spec: str, tile: Tile) -> int:
    """How often Strassen's algorithm is applied to itself for this tile. Raises BasisMismatchError: no cube of 2, 4, 8, …"""
    p, q, s = tile
    found = p.bit_length() - 1
    if not p == q == s == 2**found or found < 1:
        raise BasisMismatchError(f"basis {spec!r} needs a cubic tile of side 2, 4, 8, …; got {tile}")
    return found
