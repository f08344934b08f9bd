"""Where, when and by what rows were made: the fields that every row carries beside its result."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from strassen_tile._version import __version__
from strassen_tile.records.rows import Value

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
