"""Where a search stands: the best basis so far, within what bounds, and the file that it goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from strassen_tile import basis_record
from strassen_tile._version import __version__
from strassen_tile.basis import Basis
from strassen_tile.errors import BasisError, BasisMismatchError
from strassen_tile.tiling import Tile, as_integer

_KIND = "strassen_tile.bases.search"


@dataclass(frozen=True)
class Bounds:
    """What a basis may have at most: its largest coefficient after `Basis.balance`, and kappa."""

    coefficient: float = 4.0
    kappa: float = 2000.0

    def hold(self, basis: Basis) -> bool:
        """Whether a basis that is balanced is within them."""
        largest = max(float(getattr(basis, field).abs().max()) for field in basis_record.FACTORS)
        return largest <= self.coefficient and basis.kappa <= self.kappa


@dataclass(frozen=True)
class Found:
    """Where a search stands: the best basis within bounds, if any yet; rounds done; where the error fell: (round, error)."""

    basis: Basis | None
    rounds: int
    history: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Asked:
    """What a search is for, all that its course depends on: one that goes on must be asked for the same."""

    tile: Tile
    rank: int
    seed: int
    starts: Sequence[Basis]
    bounds: Bounds

    def said(self) -> dict[str, Any]:
        """As provenance has it."""
        starts = [f"{start.name} (rank {start.rank}, error {start.error:.9g})" for start in self.starts]
        return {"by": _KIND, "seed": self.seed, "bounds": asdict(self.bounds), "starts": starts}

    def write(self, found: Found, file: Path) -> None:
        """Write the best basis and where it comes from. Raises BasisError: it cannot be."""
        assert found.basis is not None
        course = {"version": __version__, "rounds": found.rounds, "history": [list(step) for step in found.history]}
        found.basis.save(file, provenance={**self.said(), **course})

    def resumed(self, file: Path) -> Found:
        """Where the search that wrote `file` stood.

        Raises:
            BasisError: no file of a search, or of one that was asked for something else.
        """
        record: Any = basis_record.read_json(file)
        basis = Basis.from_record(record, source=str(file))
        said = record.get("provenance")
        if not isinstance(said, dict) or said.get("by") != _KIND:
            raise BasisError(f"{file} is not of a search; take another file")
        if basis.tile != self.tile or basis.rank != self.rank:
            raise BasisMismatchError(
                f"{file} is of tile {basis.tile} and rank {basis.rank}; {self.tile} and {self.rank} are searched for"
            )
        for key, wanted in self.said().items():
            if said.get(key) != wanted:
                raise BasisError(
                    f"{file} is of a search with {key} {said.get(key)!r:.200}, not {wanted!r:.200}: it cannot go on so; take "
                    "another file"
                )
        rounds, history = said.get("rounds"), said.get("history")
        if (
            not isinstance(rounds, int)
            or not 1 <= (as_integer(rounds) or 0) < 2**53
            or not isinstance(history, list)
            or not all(isinstance(step, list) and len(step) == 2 for step in history)
            or not all(isinstance(at, int) and isinstance(to, float) for at, to in history)
        ):
            raise BasisError(f"{file} does not say how far its search is; take another file")
        return Found(basis, rounds, tuple((at, to) for at, to in history))
