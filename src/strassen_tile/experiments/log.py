"""The folder a long comparison works in: whose it is, and the rows it has so far."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

from strassen_tile.errors import ConfigError
from strassen_tile.report.rows import Row, read_rows, write_rows, write_text
from strassen_tile.report.table import number


class RunLog:
    """The rows of a comparison, on disk as soon as they exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = read_rows(path) if path.exists() else []

    def of(self, run: Row) -> list[Row]:
        """The rows of one method, rank and seed."""
        return [row for row in self.rows if run.items() <= row.items()]

    def add(self, run: Row, fixed: Row, record: Row) -> list[Row]:
        """Add an epoch's record and return all rows.

        An epoch that ended after the last checkpoint is trained again when a comparison goes on: the new row replaces
        the old one and those after it.
        """
        record = dict(record)
        at, seconds = _real(record, "epoch"), _real(record, "seconds")
        earlier = [row for row in self.of(run) if _real(row, "epoch") < at]
        spent = _real(earlier[-1], "train_seconds") if earlier else 0.0
        del record["seconds"]
        others = [row for row in self.rows if not run.items() <= row.items()]
        self.rows = [*others, *earlier, {**fixed, **record, "train_seconds": round(spent + seconds, 3)}]
        write_rows(self.path, self.rows)
        return self.rows


def _real(row: Row, key: str) -> float:
    return number(row, key) or 0.0


def claim(folder: Path, settings: Mapping[str, object], additive: AbstractSet[str]) -> None:
    """Make the folder this comparison's, or refuse to mix two in one.

    Args:
        folder: made if missing.
        settings: what decides the results; kept in `recipe.json`.
        additive: settings that only say which runs there are: they may change.

    Raises:
        ConfigError: the folder holds a comparison with other settings; the message names them.
    """
    plain = json.loads(json.dumps(settings))
    path = folder / "recipe.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in plain if key not in additive and before.get(key) != plain[key])
        if changed:
            raise ConfigError(
                f"{folder} holds a comparison with other {', '.join(changed)}; give another --out, or delete it to start over"
            )
    write_text(path, json.dumps(plain, indent=1) + "\n")
