"""The folder a comparison works in: the lock on it, the recipe it is of, and the rows it has so far."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from strassen_tile.errors import ConfigError, DataError
from strassen_tile.files import make_folder, write_text
from strassen_tile.records import Row, read_rows, write_rows
from strassen_tile.report.runs import group_rows, run_of
from strassen_tile.report.table import number


class RunLog:
    """The rows of a comparison, on disk as soon as they exist.

    Args:
        path: of the file.
        runs: what tells them, in the order their rows are to have, whichever of them is ahead; rows of others come first.

    Raises:
        DataError: the file is there and is not rows of a comparison.
    """

    def __init__(self, path: Path, runs: Sequence[Row] = ()) -> None:
        self.path = path
        self.order = {run_of(run): index for index, run in enumerate(runs)}
        self.rows: list[Row] = read_rows(path) if path.exists() else []
        try:
            group_rows(self.rows)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def check_facts(self, facts: Row) -> None:
        """Raise ConfigError where rows that are there say something else: means of the two would be of nothing."""
        for row in self.rows:
            for key, now in facts.items():
                if row.get(key, now) != now:
                    raise ConfigError(
                        f"{self.path.parent} holds runs on another {key} ({row[key]} there, {now} now): what it is read from "
                        "has changed; put it back, or give another --out"
                    )

    def of(self, run: Row) -> list[Row]:
        """The rows of one run, told by method, variant and seed."""
        return [row for row in self.rows if run_of(row) == run_of(run)]

    def recorded(self, run: Row) -> int:
        """How many epochs of the run, from the first on without a gap, have their row."""
        epochs = {row["epoch"] for row in self.of(run)}
        return next(epoch for epoch in range(len(epochs) + 1) if epoch + 1 not in epochs)

    def diverged(self, run: Row) -> Row | None:
        """The row that says that the run diverged, if it did: it is not trained again."""
        return next((row for row in self.of(run) if row.get("diverged")), None)

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
        others = [row for row in self.rows if run_of(row) != run_of(run)]
        rows = [*others, *earlier, {**fixed, **record, "train_seconds": round(spent + seconds, 3)}]
        rows.sort(key=lambda row: self.order.get(run_of(row), -1))
        write_rows(self.path, rows)
        self.rows = rows
        return rows


def _real(row: Row, key: str) -> float:
    return number(row, key) or 0.0


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, made if missing, against other processes; the system lets go of it when this process ends.

    Where folders cannot be locked (Windows, some network file systems) it warns and goes on.

    Raises:
        ConfigError: another process holds it; the message says which.
    """
    make_folder(folder)
    path = folder / ".lock"
    # Not emptied on opening, nor removed in the end: it may be another's, who holds it or waits for it.
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8", errors="replace") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # the second is what NFS says
            holder = file.read(200).strip() or "another process"
            raise ConfigError(
                f"{folder} is in use by {holder}; wait until that has ended, or give another --out"
            ) from error
        except (ImportError, OSError) as error:
            warnings.warn(
                f"{folder} cannot be locked ({error}); run one comparison at a time in it, or rows are lost",
                stacklevel=3,
            )
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


def keep_recipe(
    folder: Path, recipe: Mapping[str, object], earlier: Mapping[str, object], may_change: AbstractSet[str]
) -> None:
    """Write `recipe.json`, or refuse to mix two comparisons in one folder.

    Args:
        folder: made if missing.
        recipe: what decides the results.
        earlier: what a setting was where an older `recipe.json` has none, or null.
        may_change: settings that only say which runs there are, or that change no result.

    Raises:
        ConfigError: the folder holds a comparison with other settings; the message names them.
        DataError: its `recipe.json` is not one.
    """
    plain = json.loads(json.dumps(recipe))
    path = folder / "recipe.json"
    if path.exists():
        said = {key: value for key, value in _read_recipe(path).items() if value is not None}
        before = {**json.loads(json.dumps(earlier)), **said}
        changed = [key for key in sorted(plain) if key not in may_change and before.get(key) != plain[key]]
        if changed:
            values = ", ".join(f"{key} ({before.get(key)} there, {plain[key]} now)" for key in changed)
            raise ConfigError(
                f"{folder} holds a comparison with other {values}; give another --out, or delete it to start over"
            )
    write_text(path, json.dumps(plain, indent=1) + "\n")


def _read_recipe(path: Path) -> dict[str, object]:
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        recipe = error
    if not isinstance(recipe, dict):
        raise DataError(f"{path} is not the recipe of a comparison; give another --out, or delete it to start over")
    return recipe
