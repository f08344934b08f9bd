"""Rows: the flat records every command leaves behind, how they reach the disk, and where they were made.

A row is one dict of str, int, float, bool or None. Files are JSON: a list with one record a line, so that a
version-control diff shows which records changed. Every write is atomic: a reader sees the old file or the new one,
never half of either, and a failing write leaves the old one as it was.

NaN and the infinities have no place in JSON. They are written as null and read as None: a diverged run is a result
worth keeping, and refusing its row would lose the rest of it.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from strassen_tile._version import __version__
from strassen_tile.errors import DataError

Value: TypeAlias = str | int | float | bool | None
Row: TypeAlias = dict[str, Value]

ENVIRONMENT_FIELDS = (
    "command",
    "commit",
    "date",
    "machine",
    "device",
    "world_size",
    "cores",
    "threads",
    "python",
    "torch",
    "strassen_tile",
    "transformers",
)

_UNFINISHED = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")  # as `write_bytes` names them


def environment(
    command: str | None = None, *, device: str | None = None, world_size: int | None = None
) -> dict[str, str | int]:
    """Where, when and by what a row is made, as the flat fields `ENVIRONMENT_FIELDS`.

    Args:
        command: what to record as the command. Default: this process's arguments behind the name `strassen-tile`,
            because the path of an interpreter or script says nothing to the next machine.
        device: the type of device that did the work, "cpu" or "cuda".
        world_size: how many processes did it together.

    Returns:
        The fields; `commit` is "" outside a checkout, `transformers` is absent where it is not installed, and `device`
        and `world_size` where they are not given.
    """
    fields: dict[str, str | int] = {
        "command": shlex.join(["strassen-tile", *sys.argv[1:]]) if command is None else command,
        "commit": _commit(Path(__file__).resolve().parents[1]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": _machine(),
        # The cores this process may use: in a container they are fewer than the machine has.
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "strassen_tile": __version__,
    }
    if device is not None:
        fields["device"] = device
    if world_size is not None:
        fields["world_size"] = world_size
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        # The metadata, not the module: importing transformers takes seconds.
        fields["transformers"] = importlib.metadata.version("transformers")
    return fields


def environment_of(rows: Iterable[Mapping[str, Value]]) -> dict[str, Value]:
    """The environment that saved rows carry; where rows disagree, their values in order, joined by "; ".

    Of many dates only the first and the last are kept.
    """
    seen: dict[str, dict[Value, None]] = {field: {} for field in ENVIRONMENT_FIELDS}
    for row in rows:
        for field in ENVIRONMENT_FIELDS:
            if row.get(field) is not None:
                seen[field][row[field]] = None
    dates = sorted(str(date) for date in seen.pop("date"))
    merged: dict[str, Value] = {}
    for field in ENVIRONMENT_FIELDS:
        if field == "date":
            if dates:
                merged[field] = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        elif seen[field]:
            values = list(seen[field])
            merged[field] = values[0] if len(values) == 1 else "; ".join(str(value) for value in values)
    return merged


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


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes | memoryview) -> None:
    """Write `data` to `path` atomically: a temporary file beside it, synced, then renamed. Makes missing folders.

    Raises:
        OSError: as the file system has it, with the name of the file. `path` is then as it was, and no temporary file
            is left; a process that is killed leaves one, see `remove_unfinished`.
    """
    target = Path(path).resolve()  # Through a link: renaming onto the link itself would replace it.
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are private to the user (0600), these follow the umask like any other.
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException as error:  # An interrupt as well must leave nothing behind.
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename != str(target):
            raise OSError(error.errno, error.strerror, str(target)) from error  # a full disk does not say which file
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left of files they were writing in `folder`. No other may be writing there now."""
    for path in folder.glob(".*.tmp"):
        if _UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


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


def _machine() -> str:
    """The CPU's name and, with CUDA, the GPU's: either may be what a row depends on."""
    name = ""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # Not Linux.
    name = name or platform.processor() or platform.machine() or "unknown CPU"
    return f"{name}; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name


def _commit(package: Path) -> str:
    """Short hash of the checkout whose `src/` holds `package`, with "+dirty" if tracked files differ; else ""."""
    # A git hook's GIT_DIR would answer for the wrong repository; and reading must not lock another's index.
    settings = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    settings["GIT_OPTIONAL_LOCKS"] = "0"

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(package), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            env=settings,
        )
        return done.stdout.strip()

    try:
        # Installed into a virtual environment inside some other checkout, the package has no commit of its own.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parents[1]:
            return ""
        commit = git("rev-parse", "--short", "HEAD")
        return commit + "+dirty" if git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return ""
