"""What a file says of a basis: read with limits, checked against itself, written whole."""

from __future__ import annotations

import json
import math
from pathlib import Path

from strassen_tile import files
from strassen_tile.errors import BasisError, ConfigError, STLError
from strassen_tile.tiling import Tile, as_tile

FACTORS = ("encoder", "weight_encoder", "decoder")
MAX_BYTES = 16 << 20  # of a file, and of its three factors in float64: two million coefficients
_ROUNDED, _NOTHING = 1e-3, 1e-6  # what a file may be off in what it says: figures are written by hand, too
_KEYS = {*FACTORS, "name", "tile", "rank", "relative_squared_error", "kappa", "exact", "provenance"}


def read_json(path: str | Path, max_bytes: int = MAX_BYTES) -> object:
    """What the JSON file holds. Raises BasisError: unreadable, too large, malformed, or with a key given twice."""
    try:
        return files.read_json(path, max_bytes)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise BasisError(f"cannot read a basis from {path}: {error}") from error


def check_size(coefficients: int, source: object, max_bytes: int) -> None:
    """Raise BasisError if that many float64 coefficients take more than `max_bytes`: work on them is quadratic and worse."""
    if 8 * coefficients > max_bytes:
        count = coefficients if coefficients < 10**15 else "more than 10^15"  # and not hundreds of digits
        raise BasisError(f"{source}: a basis of {count} coefficients {files.too_large(8 * coefficients, max_bytes)}")


def checked_keys(record: object, source: str) -> dict[str, object]:
    """A record with the keys of a basis. Raises BasisError: it is none, lacks a factor, or has other keys."""
    if not isinstance(record, dict) or not all(field in record for field in FACTORS):
        raise BasisError(f"{source} is not a basis file: it wants the keys {', '.join(FACTORS)}")
    if unknown := set(record) - _KEYS:
        raise BasisError(f"{source} has unknown keys: {', '.join(sorted(map(str, unknown)))}")
    return record


def check_claims(
    record: dict[str, object], tile: Tile, rank: int, error: float, kappa: float, exact: bool, source: str
) -> None:
    """Raise BasisError where a record says another tile, rank, error or kappa than its factors have, or that they are exact."""
    try:
        said = as_tile(record.get("tile", tile))  # type: ignore[arg-type] # judged there
    except STLError as wrong:
        raise BasisError(f"{source}: {wrong}") from wrong
    if said != tile:
        raise BasisError(f"{source} says tile {record['tile']}, but its factors are for {list(tile)}")
    if record.get("rank", rank) != rank:
        raise BasisError(f"{source} says rank {record['rank']!r}, but its factors have {rank} terms")
    if (record.get("exact") or record.get("relative_squared_error") == 0) and not exact:
        raise BasisError(f"{source} claims to be exact, but its relative squared error is {error:.3g}")
    for key, found in (("relative_squared_error", error), ("kappa", kappa)):
        value = record.get(key, found)
        if not _near(value, found):
            raise BasisError(f"{source} says {key} {value!r:.40}, but that of its factors is {found:.6g}")


def _near(value: object, found: float) -> bool:
    if not isinstance(value, int | float):
        return False
    if not math.isfinite(found):  # factors that overflow: who says a number of them lies
        return isinstance(value, float) and not math.isfinite(value)
    limit = _ROUNDED * abs(found) + _NOTHING
    return found - limit <= value <= found + limit  # not value − found: an integer may be beyond every float


def write(record: dict[str, object], path: str | Path) -> None:
    """Write a record as JSON; the file appears whole or not at all. Raises BasisError: it cannot be."""
    try:
        files.write_text(path, json.dumps(record))
    except (OSError, ValueError, TypeError) as error:
        raise BasisError(f"cannot write a basis to {path}: {error}") from error
