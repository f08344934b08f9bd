"""Rows: the flat records every command leaves behind, and how they reach the disk.

A row is one dict of str, int, float, bool or None. Files are JSON: a list with one record a line, so that a
version-control diff shows which records changed. Every write is atomic: a reader sees the old file or the new one,
never half of either, and a failing write leaves the old one as it was.

NaN and the infinities have no place in JSON. They are written as null and read as None: a diverged run is a result
worth keeping, and refusing its row would lose the rest of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from strassen_tile.errors import DataError
from strassen_tile.files import write_text

Value: TypeAlias = str | int | float | bool | None
Row: TypeAlias = dict[str, Value]


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Value]]) -> None:
    """Write `rows` to `path` atomically: a JSON list, one record a line, NaN and infinities as null.

    Raises:
        DataError: a row is not flat; the message names file, row and field, and nothing is written.
    """
    lines = [
        json.dumps(_flat(row, f"{path}: row {index}"), ensure_ascii=False, allow_nan=False)
        for index, row in enumerate(rows)
    ]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n")


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a file written by `write_rows`.

    Raises:
        DataError: the file is missing, unreadable, not JSON or not a list of flat records.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read rows: {error}") from error
    try:
        # Other writers may leave the literals NaN and Infinity: read as what `write_rows` would have made of them.
        records = json.loads(text, parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON: {error.msg} in line {error.lineno}") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{path}: cannot read rows: {error}") from error
    except RecursionError as error:
        raise DataError(f"{path}: lists in lists without end, expected a list of flat records") from error
    if not isinstance(records, list):
        raise DataError(f"{path}: rows are a JSON list of flat records, this is one {type(records).__name__}")
    return [_flat(record, f"{path}: row {index}") for index, record in enumerate(records)]


def append_rows(path: str | Path, rows: Sequence[Mapping[str, Value]]) -> None:
    """Add `rows` at the end of `path`, a new file if there is none. One writer at a time: the file is rewritten whole.

    Raises:
        DataError: the file exists and is malformed (it is left alone), or a new row is not flat.
    """
    before: list[Row] = read_rows(path) if Path(path).exists() else []
    write_rows(path, [*before, *rows])


def _flat(row: object, where: str) -> Row:
    """`row` as a plain dict with non-finite numbers as None; raises where it is not flat."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}, expected a flat record of named values")
    flat: Row = {}
    for key, value in row.items():
        if not isinstance(key, str):
            raise DataError(f"{where} has the key {key!r}, expected a str")
        if value is not None and not isinstance(value, str | int | float):
            raise DataError(
                f"{where}, field {key!r} is a {type(value).__name__}, expected str, int, float, bool or None; "
                "turn arrays and tensors into numbers first, e.g. with .item()"
            )
        flat[key] = None if isinstance(value, float) and not math.isfinite(value) else value
    return flat
