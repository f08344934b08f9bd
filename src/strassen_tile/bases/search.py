"""The search for the basis of least error at a rank: many random starts, then hops away from the best one found.

A round is one batch of starts, drawn by the search's seed and the round's number, so that a search that was stopped goes on as
it would have. Each is brought down by alternating least squares, and the best of them, if they are ahead of the best so far, by
Newton steps while the ridge falls; what counts is the least error with coefficients and kappa within bounds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from strassen_tile.algebra import Factors
from strassen_tile.bases import descent
from strassen_tile.bases.search_file import Asked, Bounds, Found
from strassen_tile.basis import Basis
from strassen_tile.errors import BasisError, BasisMismatchError
from strassen_tile.tiling import Tile, as_integer, as_tile

__all__ = ["Bounds", "Found", "search"]

FRESH_EVERY = 4  # rounds: the others hop
_STARTS, _HOPS = 48, 24
_POLISHED = 3  # of a round, at most
_LONGER = (
    6  # of a round get more sweeps, and are polished where they are ahead then: polishing takes nearly all of the time
)
_LOWER = 1e-5  # by what part an objective must be lower to be of another minimum
_SWEEPS, _POLISHES = 200, 60
_EARLY, _RIDGE = 1e-4, 1e-3  # of alternating least squares: a larger one at the start parks at saddles
_RIDGES = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
_NOISE = (0.03, 0.1, 0.2, 0.3)
_BOUNDS = Bounds()
_BETTER = 1e-9  # in error: less is no improvement


def search(
    tile: int | Sequence[int],
    rank: int,
    *,
    rounds: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    starts: Sequence[Basis] = (),
    bounds: Bounds = _BOUNDS,
    file: str | Path | None = None,
    progress: Callable[[Found], object] | None = None,
) -> Found:
    """Search for the basis of least error for `tile` at `rank`.

    Args:
        tile: p, q, s, or one side for a cube.
        rank: number of products.
        rounds: how many at most, those of a search that is gone on with included; None: until `minutes` are over.
        minutes: how long at most; the round that is under way then is finished. None, and no rounds: one round.
        seed: of all that is drawn: with the same, as many rounds find the same.
        starts: bases of this tile with a term more, as many, or one less, that are tried first.
        bounds: what a basis may have at most.
        file: JSON, written whenever the search comes to something better and at its end, with its provenance. If it is there
            already, the search goes on from it.
        progress: called after each round.

    Raises:
        BasisError: a file that is none of a search for the same (tile, rank, seed, starts, bounds), or cannot be written; a
            start of another tile or rank; rank, rounds, minutes or seed that make no sense.
    """
    wanted = as_tile(tile)
    _check(wanted, rank, rounds, minutes, seed)
    for start in starts:
        if not isinstance(start, Basis):
            raise BasisError(f"starts must be bases; got {type(start)}")
        if sorted(start.tile) != sorted(wanted) or abs(start.rank - rank) > 1:
            raise BasisMismatchError(f"a start must be of tile {wanted} and rank {rank} ± 1; got {start}")
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    most = rounds if rounds is not None else (math.inf if minutes is not None else 1)
    asked = Asked(wanted, rank, int(seed), tuple(starts), bounds)
    found = Found(None, 0, ()) if file is None or not Path(file).exists() else asked.resumed(Path(file))
    anchor: Factors | None = None  # the best basis, brought to the minimum that rounds are held against and hop from
    while found.rounds < most and time.monotonic() < end:
        if anchor is None and found.basis is not None:
            anchor = descent.polish(_level(found.basis), _RIDGE, _POLISHES)
        before = found.basis
        found = _after_round(found, anchor, asked)
        anchor = anchor if found.basis is before else None
        if file is not None and found.basis is not None:
            asked.write(found, Path(file))
        if progress is not None:
            progress(found)
    return found


def _after_round(found: Found, anchor: Factors | None, asked: Asked) -> Found:
    tile, rank = asked.tile, asked.rank
    generator = torch.Generator("cpu").manual_seed((1_000_003 * asked.seed + found.rounds) % 2**63)
    best = found.basis
    if found.rounds == 0 and asked.starts:
        batch = _from_neighbours(asked.starts, tile, rank, generator)
    elif anchor is None or found.rounds % FRESH_EVERY == 0:
        batch = descent.alternate(_noise(_STARTS, tile, rank, generator), _EARLY, _SWEEPS)
    else:
        batch = _hops(anchor, generator)
    batch = descent.alternate(batch, _RIDGE, _SWEEPS)
    rounds = found.rounds + 1
    for one in _promising(batch, anchor):
        for basis in _falling(one, asked.bounds):
            if best is None or basis.error < best.error - _BETTER:
                best = replace(basis, name=f"{'x'.join(map(str, tile))}_r{rank}")
    history = found.history
    if best is not None and best is not found.basis:
        history = (*history, (rounds, best.error))
    return Found(best, rounds, history)


def _promising(batch: Factors, anchor: Factors | None) -> list[Factors]:
    """Those of the batch to polish: the lowest after more sweeps, without those that are no lower than the anchor."""
    order = descent.objective(batch, _RIDGE).nan_to_num(math.inf).argsort()[:_LONGER]
    batch = descent.alternate((batch[0][order], batch[1][order], batch[2][order]), _RIDGE, 4 * _SWEEPS)
    reached = descent.objective(batch, _RIDGE).nan_to_num(math.inf)
    limit = math.inf if anchor is None else float(descent.objective(anchor, _RIDGE)) * (1 - _LOWER)
    order = reached.argsort()[:_POLISHED]
    return [(batch[0][at], batch[1][at], batch[2][at]) for at in order.tolist() if reached[at] < limit]


def _level(basis: Basis) -> Factors:
    return descent.level((basis.encoder, basis.weight_encoder, basis.decoder))


def _falling(factors: Factors, bounds: Bounds) -> Iterator[Basis]:
    """The bases within bounds that polishing comes to while the ridge falls."""
    for ridge in _RIDGES:
        factors = descent.polish(descent.level(factors), ridge, _POLISHES)
        basis = Basis(*factors).refit_decoder().balance()
        if not bounds.hold(basis):
            basis = Basis(*factors).balance()
        if not bounds.hold(basis):
            return
        yield basis


def _noise(batch: int, tile: Tile, rank: int, generator: torch.Generator) -> Factors:
    p, q, s = tile

    def gaussian(rows: int, columns: int) -> Tensor:
        return torch.randn(batch, rank, rows, columns, generator=generator, dtype=torch.float64, device="cpu") / 2

    return gaussian(p, q), gaussian(q, s), gaussian(p, s)


def _hops(factors: Factors, generator: torch.Generator) -> Factors:
    """Copies of the factors: half of them shaken, half with up to a third of their terms drawn anew."""
    rank, tile = len(factors[0]), (*factors[0].shape[1:], factors[1].shape[2])
    noise = _noise(_HOPS, tile, rank, generator)
    level = torch.tensor(_NOISE, dtype=torch.float64, device="cpu").repeat(_HOPS)[: _HOPS // 2, None, None, None]
    drawn = torch.rand(_HOPS - _HOPS // 2, rank, generator=generator, device="cpu", dtype=torch.float32).argsort(dim=1)
    most = torch.randint(1, max(2, rank // 3 + 1), (len(drawn), 1), generator=generator, device="cpu")
    anew = (drawn < most)[:, :, None, None]
    parts = []
    for factor, shaken in zip(factors, noise, strict=True):
        half = _HOPS // 2
        parts.append(torch.cat([factor + 2 * level * shaken[:half], torch.where(anew, shaken[half:], factor)]))
    return parts[0], parts[1], parts[2]


def _from_neighbours(starts: Sequence[Basis], tile: Tile, rank: int, generator: torch.Generator) -> Factors:
    """From bases of a term more, each without one of its terms; of a term less, with a random one; of as many, as they are."""
    found: list[Factors] = []
    for start in starts:
        turned = start.oriented(tile)
        given = _level(turned)
        if start.rank == rank:
            found.append(given)
        elif start.rank > rank:
            every = torch.arange(start.rank, device="cpu")
            found += [(given[0][every != k], given[1][every != k], given[2][every != k]) for k in every.tolist()]
        else:
            more = _noise(_HOPS, tile, 1, generator)
            found += [
                (torch.cat([given[0], e]), torch.cat([given[1], f]), torch.cat([given[2], d]))
                for e, f, d in zip(*more, strict=True)
            ]
    e, f, d = (torch.stack(parts) for parts in zip(*found, strict=True))
    return e, f, d


def _check(tile: Tile, rank: object, rounds: object, minutes: float | None, seed: object) -> None:
    p, q, s = tile
    if not 1 <= (as_integer(rank) or 0) <= p * q * s:
        raise BasisError(f"rank must be from 1 to pqs = {p * q * s}, from where on a product is exact; got {rank!r}")
    if rounds is not None and (as_integer(rounds) or 0) < 1:
        raise BasisError(f"rounds must be a positive integer, or None; got {rounds!r}")
    if minutes is not None and not (isinstance(minutes, int | float) and 0 < minutes < math.inf):
        raise BasisError(f"minutes must be a positive number, or None; got {minutes!r}")
    if as_integer(seed) is None:
        raise BasisError(f"seed must be an integer; got {seed!r}")
