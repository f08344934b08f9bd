"""Block sizes of the kernels: the fastest measured on a device, by its name, and a guess for devices nobody has measured.

Looked up when a kernel is launched, never timed then. `tune.py` measures; what it finds lies in choices.json beside this
file, or in a file of the same form that the environment variable STRASSEN_TILE_CHOICES names, which goes first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from strassen_tile.errors import ConfigError
from strassen_tile.files import write_text

KERNELS = ("encode", "norm_encode", "decode", "decode_act_encode", "correlate")
_SHIPPED = Path(__file__).with_name("choices.json")
_trying: list[Choice] = []


class Choice(NamedTuple):
    """A block of tiles, and the warps that work on it."""

    tile_rows: int
    tiles: int
    warps: int


def key(step: str, entries: int, ranks: int, itemsize: int) -> str:
    """What a choice depends on: the kernel, p·q and r rounded up to powers of two, bytes a number it writes."""
    return f"{step}: {entries} entries, {ranks} ranks, {itemsize} bytes"


def chosen(step: str, entries: int, ranks: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """The block sizes of this kernel on this device."""
    if _trying:
        return _trying[-1]
    index = None if device.type != "cuda" else torch.cuda.current_device() if device.index is None else device.index
    return _looked_up(step, entries, ranks, dtype.itemsize, index)


def guess(step: str, entries: int, ranks: int, itemsize: int) -> Choice:
    """What compiles to 128 registers or fewer and stores 16 bytes at a time, for lack of a measurement."""
    large = entries > 16 or (
        step == "decode_act_encode" and ranks > 32
    )  # two matrices of ranks and one of entries at once
    tiles = 32 if large else 128 if itemsize == 1 else 64
    return Choice(1, tiles, 8 if itemsize == 4 else 4)


def candidates(entries: int) -> Iterator[Choice]:
    """What is worth measuring."""
    for tile_rows in (1, 2, 4):
        for tiles in (32, 64, 128, 256):
            if 512 <= entries * tile_rows * tiles <= 4096:
                for warps in (2, 4, 8):
                    yield Choice(tile_rows, tiles, warps)


@contextmanager
def trying(choice: Choice) -> Iterator[None]:
    """Every kernel takes this choice."""
    _trying.append(choice)
    try:
        yield
    finally:
        _trying.pop()


def read(path: Path) -> dict[str, dict[str, Choice]]:
    """Device name → key → choice. Raises ConfigError for anything else than `write` made."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        made = {device: {k: Choice(*map(int, v)) for k, v in found.items()} for device, found in table.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no table of block sizes as `make gpu-check` writes: {error}") from error
    for choice in (choice for found in made.values() for choice in found.values()):
        if min(choice) < 1 or any(size & (size - 1) for size in choice):
            raise ConfigError(f"{path}: block sizes and warps must be powers of two; got {list(choice)}")
    return made


def write(path: Path, device: str, found: Mapping[str, Choice]) -> None:
    """Put the choices of one device into the table in `path`, beside those of others."""
    table = read(path) if path.exists() else {}
    table[device] = dict(found)
    write_text(path, json.dumps(table, indent=1) + "\n")


@cache
def _looked_up(step: str, entries: int, ranks: int, itemsize: int, index: int | None) -> Choice:
    known = {} if index is None else _table().get(torch.cuda.get_device_name(index), {})
    return known.get(key(step, entries, ranks, itemsize)) or guess(step, entries, ranks, itemsize)


@cache
def _table() -> dict[str, dict[str, Choice]]:
    named = os.environ.get("STRASSEN_TILE_CHOICES")
    shipped = read(_SHIPPED)
    return shipped if not named else {**shipped, **read(Path(named))}


def forget() -> None:
    """Read the tables anew."""
    _looked_up.cache_clear()
    _table.cache_clear()
