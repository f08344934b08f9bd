"""Best known approximations of a tile product at a given rank: the factors that ship with the package."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from types import MappingProxyType

from strassen_tile.basis import Basis
from strassen_tile.errors import BasisError
from strassen_tile.tiling import Tile, as_integer, as_tile

_DATA = files("strassen_tile.bases") / "data"


@cache
def shipped() -> Mapping[tuple[Tile, int], str]:
    """(tile, rank) → file name of the factors in the package. A tile serves every order of its sides."""
    found = {}
    for entry in _DATA.iterdir():
        if entry.name.endswith(".json"):
            tile, rank = entry.name.removesuffix(".json").split("_r")
            found[as_tile([int(side) for side in tile.split("x")]), int(rank)] = entry.name
    return MappingProxyType(dict(sorted(found.items())))  # read-only: the one copy is everyone's


def approximate(tile: int | Sequence[int], rank: int) -> Basis:
    """The best rank-`rank` approximation of the product of `tile`-shaped tiles that is known here.

    Its error is high where rank is low (0.47 of the squared norm for 4×4×4 at rank 24): a start for training, not a
    replacement for a product in a network that is already trained.

    Args:
        tile: p, q, s in any order, or one side for a cube.
        rank: number of products; see `shipped()` for what there is.

    Raises:
        BasisError: no factors ship for this tile and rank; the message lists those that do.
    """
    if as_integer(rank) is None:
        raise BasisError(f"rank must be an integer; got {rank!r}")
    return _approximate(as_tile(tile), rank)


@cache
def _approximate(wanted: Tile, rank: int) -> Basis:
    for (stored, stored_rank), name in shipped().items():
        if stored_rank == rank and sorted(stored) == sorted(wanted):
            basis = Basis.from_record(json.loads((_DATA / name).read_text(encoding="utf-8")), source=name)
            return _orient(
                Basis(basis.encoder, basis.weight_encoder, basis.decoder, name.removesuffix(".json")), wanted
            )
    ranks: dict[str, list[int]] = {}
    for stored, stored_rank in shipped():
        ranks.setdefault("x".join(map(str, stored)), []).append(stored_rank)
    listing = "; ".join(f"{key}: {', '.join(map(str, value))}" for key, value in ranks.items())
    raise BasisError(
        f"no approximate basis ships for tile {wanted} at rank {rank}. Shipped (tile: ranks): {listing}. "
        "Take one of these, bases.random(tile, rank), or bases.load(path)"
    )


def _orient(basis: Basis, tile: Tile) -> Basis:
    """`basis` for the same three sides in the order of `tile`; the tensor's symmetries keep error and kappa."""
    for candidate in (basis, basis.transpose()):
        for _ in range(3):
            if candidate.tile == tile:
                return candidate
            candidate = candidate.cycle()
    raise BasisError(f"a basis for {basis.tile} cannot serve {tile}")
