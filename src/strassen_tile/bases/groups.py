"""Universal bases: a tile product embedded in the multiplication of a group algebra (Cohn and Umans 2003).

Maps a: [p] → G, b: [q] → G, c: [s] → G put x_ij at a_i⁻¹b_j and w_jk at b_j⁻¹c_k, and y_ik is read at a_i⁻¹c_k. The read
holds the q terms it should and any others that come to lie there; where none do (the triple product property) the basis is
exact. Nothing in it is fitted to data, and coefficients of Z2^k are ±1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from strassen_tile.bases.finite_groups import Group, as_group
from strassen_tile.bases.group_algebra import degrees, products
from strassen_tile.basis import Basis
from strassen_tile.errors import BasisError, shape_text
from strassen_tile.tiling import Tile, as_integer, as_tile

Decoder = Literal["ls", "scaled", "raw"]
Table = Sequence[Sequence[int]] | Tensor
RESTARTS = 64
_MOST_RESTARTS = 100_000
_AT_ONCE = 1 << 16  # products at the reads of one set of maps that a search goes through
_PIECE = 256  # sets of maps scored together
_POLISHED = 12  # of the restarts' ends
_RIDGE = 1e-10  # of the diagonal: terms may be dependent
Scores = Callable[[Group, Tensor, Tile], Tensor]


@dataclass(frozen=True, eq=False)
class Maps:
    """Where rows of X, the inner dimension and columns of W lie in a group: element numbers a (p,), b (q,), c (s,)."""

    a: Tensor
    b: Tensor
    c: Tensor


def group(
    group: str | Table | Group,
    tile: int | Sequence[int],
    *,
    decoder: Decoder = "ls",
    maps: Sequence[Sequence[int]] | None = None,
    restarts: int = RESTARTS,
    seed: int = 0,
) -> Basis:
    """The basis for `tile` that multiplication in the real group algebra of `group` gives.

    Its rank is the number of products of the algebra: for each irreducible representation of n×n matrices over the reals those
    of an n×n product, three times as many over the complex numbers, eight times over the quaternions.

    Args:
        group: a name such as "Z2^5", "Z32", "D4xZ2^2", "Q8", "S3", or a multiplication table: `finite_groups.as_group`.
        tile: p, q, s, or one side for a cube.
        decoder: "raw" reads each entry as it is: right in expectation under random signs, its error
            Σ_ik (N_ik − q)/pqs, N_ik the terms at a read; "scaled" multiplies each read by q/N_ik, the error then
            1 − Σ_ik q/(ps N_ik); "ls" is the decoder of least error.
        maps: three lists of element numbers, of p, q and s; None: searched for.
        restarts: of the search.
        seed: of its starts; the same seed finds the same maps.

    Raises:
        BasisError: no such group, a table that is none, or maps, decoder, restarts or seed out of range.
        ShapeError: a tile that makes no sense.
    """
    found, sides = as_group(group), as_tile(tile)
    if decoder not in get_args(Decoder):
        raise BasisError(f"decoder must be one of {', '.join(get_args(Decoder))}; got {decoder!r}")
    at = search(found, sides, restarts=restarts, seed=seed) if maps is None else _checked(maps, found, sides)
    basis = embedded(found, at)
    if decoder == "ls":
        return basis.refit_decoder()
    if decoder == "scaled":
        weight = sides[1] / terms_at_reads(found, at)
        return Basis(basis.encoder, basis.weight_encoder, basis.decoder * weight, name=basis.name)
    return basis


def embedded(group: Group, maps: Maps) -> Basis:
    """The basis that reads each entry as it is, "raw"."""
    algebra = products(group)
    places = [_between(group, one, other) for one, other in ((maps.a, maps.b), (maps.b, maps.c), (maps.a, maps.c))]
    factors = (algebra.left[:, places[0]], algebra.right[:, places[1]], algebra.decoder[:, places[2]])
    return Basis(*factors, name=group.name)


def terms_at_reads(group: Group, maps: Maps) -> Tensor:
    """N (p, s): how many of the products x_ij·w_j'k come to lie where y_ik is read; q of them belong there."""
    return _terms(group, maps.a[None], maps.b[None], maps.c[None])[0]


def lower_bound(group: str | Table | Group, tile: int | Sequence[int]) -> float:
    """1 − Σ_ρ d_ρ³/pqs, d_ρ degrees of complex irreducibles: "raw" and "scaled" have no less error, whatever the maps.

    (What is read of the algebra's product is a tensor whose flattenings have ranks up to Σ d_ρ³. "ls" reads products of
    numbers, of which an algorithm may have more.)
    """
    p, q, s = as_tile(tile)
    return max(0.0, 1.0 - sum(d**3 for d in degrees(as_group(group))) / (p * q * s))


def search(group: Group, tile: Tile, *, restarts: int = RESTARTS, seed: int = 0) -> Maps:
    """Maps of the least error found: from random starts, one entry at a time to where that helps most.

    First by the error with "scaled" reads, which counting gives, then from the best ends by that of the "ls" decoder.
    """
    if not 1 <= (as_integer(restarts) or 0) <= _MOST_RESTARTS:
        raise BasisError(f"restarts must be from 1 to {_MOST_RESTARTS}; got {restarts!r}")
    if as_integer(seed) is None or not 0 <= seed < 2**63:
        raise BasisError(f"seed must be an integer from 0 on; got {seed!r}")
    return _search(group, tile, int(restarts), int(seed))


@cache
def _search(group: Group, tile: Tile, restarts: int, seed: int) -> Maps:
    p, q, s = tile
    if p * q * q * s > _AT_ONCE:
        raise BasisError(f"the search for maps takes tiles up to p·q²·s = {_AT_ONCE}; give maps for {tile}")
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[int, ...], float] = {}
    for _ in range(restarts):
        start = torch.randint(group.order, (p + q + s,), generator=generator, device="cpu")
        maps, score = _climb(group, start, tile, _scores)
        found[tuple(maps.tolist())] = score
    # By counts many are equal which a decoder of least error tells apart.
    best = sorted(found, key=found.__getitem__, reverse=True)[:_POLISHED]
    polished = [_climb(group, torch.tensor(maps, device="cpu"), tile, _refitted) for maps in best]
    return Maps(*max(polished, key=lambda one: one[1])[0].split([p, q, s]))


def _climb(group: Group, maps: Tensor, tile: Tile, scores: Scores) -> tuple[Tensor, float]:
    """From `maps`, one entry at a time to where that raises the score most, and the score."""
    score = float(scores(group, maps[None], tile))
    while True:
        changed = _neighbours(maps, group.order)
        reached = torch.cat([scores(group, some, tile) for some in changed.split(_PIECE)])
        to = int(reached.argmax())
        if float(reached[to]) <= score + 1e-9:
            return maps, score
        maps, score = changed[to], float(reached[to])


def _neighbours(maps: Tensor, order: int) -> Tensor:
    """All maps that differ in one entry; a_0 stays, for all maps may be multiplied by an element from the left."""
    size = len(maps)
    changed = maps.expand(size - 1, order, size).clone()
    at = torch.arange(1, size, device="cpu")
    changed[at - 1, :, at] = torch.arange(order, device="cpu")
    return changed.flatten(0, 1)


def _scores(group: Group, maps: Tensor, tile: Tile) -> Tensor:
    """Σ_ik q/N_ik for each of (B, p + q + s) maps: ps (1 − error) with "scaled" reads."""
    return (tile[1] / _terms(group, *maps.split(list(tile), dim=1))).sum(dim=(1, 2))


def _refitted(group: Group, maps: Tensor, tile: Tile) -> Tensor:
    """The same for the decoder of least error: pqs (1 − error)."""
    algebra, (a, b, c) = products(group), maps.split(list(tile), dim=1)
    encoder = algebra.left[:, _between(group, a, b)].transpose(0, 1)  # (B, r, p, q)
    weight_encoder = algebra.right[:, _between(group, b, c)].transpose(0, 1)
    e, f, target = encoder.flatten(2), weight_encoder.flatten(2), (encoder @ weight_encoder).flatten(2)
    gram = (e @ e.mT) * (f @ f.mT)
    gram.diagonal(dim1=1, dim2=2).add_(_RIDGE * gram.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True))
    return (target * torch.cholesky_solve(target, torch.linalg.cholesky(gram))).sum(dim=(1, 2))


def _terms(group: Group, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    left, right = _between(group, a, b).flatten(1), _between(group, b, c).flatten(1)
    to = group.table[left[:, :, None], right[:, None, :]].flatten(1)
    counts = torch.zeros(len(a), group.order, dtype=torch.float64, device="cpu")
    counts.scatter_add_(1, to, torch.ones(to.shape, dtype=torch.float64, device="cpu"))
    reads = _between(group, a, c)
    return counts.gather(1, reads.flatten(1)).view(reads.shape)


def _between(group: Group, one: Tensor, other: Tensor) -> Tensor:
    """The elements g⁻¹h for g in `one` (…, m) and h in `other` (…, n): (…, m, n)."""
    return group.table[group.inverse[one][..., :, None], other[..., None, :]]


def _checked(maps: Sequence[Sequence[int]], group: Group, tile: Tile) -> Maps:
    try:
        given = [torch.as_tensor(one, device="cpu") for one in maps]
    except (TypeError, ValueError, RuntimeError) as error:
        raise BasisError(f"maps are three lists of element numbers: {error}") from error
    shapes = [tuple(one.shape) for one in given]
    if shapes != [(side,) for side in tile]:
        raise BasisError(
            f"maps for tile {tile} are three lists of {', '.join(map(str, tile))} elements; got {shape_text(shapes)}"
        )
    for one in given:
        if one.is_floating_point() or one.is_complex() or int(one.min()) < 0 or int(one.max()) >= group.order:
            raise BasisError(f"maps hold element numbers from 0 to {group.order - 1}; got {one.tolist()}")
    return Maps(*(one.long() for one in given))
