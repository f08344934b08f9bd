"""Best known approximations of a tile product at a given rank: the factors that ship with the package."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from types import MappingProxyType

import torch

from strassen_tile.bases.exact import naive, strassen
from strassen_tile.basis import Basis
from strassen_tile.errors import BasisError
from strassen_tile.tiling import Tile, as_integer, as_tile

_DATA = files("strassen_tile.bases") / "data"
_MOST_LEVELS = 3  # of Strassen's algorithm to choose terms from: 343 terms; the work is cubic in them


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

    Tiles of twice the sides have what ships with Strassen's algorithm in each product: 8×8×8 at rank 7·r the error of 4×4×4 at
    r, for ⅞ of the products, but seven times the encoding. A tile with a side of 1 has r of the naive algorithm's products:
    there every term has a factor of rank one, so that no basis errs less than 1 − r/pqs.

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
            return replace(basis, name=name.removesuffix(".json")).oriented(wanted)
    if 1 in wanted and 0 < rank < math.prod(wanted):
        return _kept(wanted, rank)
    half = tuple(side // 2 for side in wanted)
    if not any(side % 2 for side in wanted) and any(
        7 * stored_rank == rank and sorted(stored) == sorted(half) for stored, stored_rank in shipped()
    ):
        return _approximate(as_tile(half), rank // 7).kron(strassen())
    ranks: dict[str, list[int]] = {}
    for stored, stored_rank in shipped():
        ranks.setdefault("x".join(map(str, stored)), []).append(stored_rank)
    listing = "; ".join(f"{key}: {', '.join(map(str, value))}" for key, value in ranks.items())
    raise BasisError(
        f"no approximate basis ships for tile {wanted} at rank {rank}. Shipped (tile: ranks): {listing}. "
        "Take one of these, bases.random(tile, rank), or bases.load(path)"
    )


def _kept(tile: Tile, rank: int) -> Basis:
    """So many of the naive algorithm's products, of a tile with a side of 1, evenly from its other sides."""
    rows, columns = (side for side in tile if side > 1) if tile.count(1) == 1 else (max(tile), 1)
    k = torch.arange(rank, device="cpu")
    kept = k % rows * columns + (k % rows + k // rows) % columns
    whole = naive(*tile)
    name = f"{'x'.join(map(str, tile))}_r{rank}"
    return Basis(whole.encoder[kept], whole.weight_encoder[kept], whole.decoder[kept], name=name)


def truncated(levels: int, rank: int) -> Basis:
    """What is left of Strassen's algorithm for 2^levels-sided tiles when only the `rank` terms that matter most are kept.

    Terms go one at a time: with decoders refitted by least squares, D = G⁻¹B for the Gram matrix G of the terms E_k⊗F_k, the
    error without term k is larger by ‖D_k‖²/(G⁻¹)_kk, and the term for which that is least is dropped (of equals, the first).
    So it is the same basis everywhere, and one for training: its error is well above `approximate`'s. For levels=2 it is
    0.77, 0.60 and 0.43 at ranks 16, 24 and 32, where r of the naive algorithm's products leave 0.75, 0.63 and 0.50.

    Args:
        levels: 1 to 3.
        rank: 1 to 7^levels; at 7^levels it is Strassen's algorithm.

    Raises:
        BasisError: levels or rank out of range.
    """
    if not 1 <= (as_integer(levels) or 0) <= _MOST_LEVELS:
        raise BasisError(f"truncated takes levels of 1 to {_MOST_LEVELS}; got {levels!r}")
    if not 1 <= (as_integer(rank) or 0) <= 7**levels:
        raise BasisError(f"truncated takes a rank of 1 to {7**levels} for {levels} levels; got {rank!r}")
    return _truncated(int(levels), int(rank))


@cache
def _truncated(levels: int, rank: int) -> Basis:
    whole = strassen(levels)
    encoder, weight_encoder = whole.encoder.flatten(1), whole.weight_encoder.flatten(1)
    inverse = torch.linalg.inv((encoder @ encoder.mT) * (weight_encoder @ weight_encoder.mT))
    target = (whole.encoder @ whole.weight_encoder).flatten(1)
    kept = torch.arange(whole.rank, device="cpu")
    while len(kept) > rank:
        lost = (inverse @ target[kept]).square().sum(dim=1) / inverse.diagonal()
        # Terms that differ by a symmetry lose the same but for rounding; which of them goes must not depend on that.
        worst = int((lost / lost.min()).round(decimals=6).argmin())
        rest = torch.arange(len(kept), device="cpu") != worst
        inverse = inverse - inverse[:, worst, None] * inverse[None, worst] / inverse[worst, worst]
        inverse, kept = inverse[rest][:, rest], kept[rest]
    decoder = whole.decoder if rank == whole.rank else (inverse @ target[kept]).view(rank, *whole.decoder.shape[1:])
    return Basis(whole.encoder[kept], whole.weight_encoder[kept], decoder, name=f"strassen{levels}_r{rank}")
