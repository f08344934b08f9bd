"""Files: read from outside, regular ones only and never more of one than a limit (`max_bytes`); written atomically."""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from strassen_tile.errors import ConfigError, DataError

_UNFINISHED = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")  # as `write_bytes` names them
_UNITS = ((30, "GiB"), (20, "MiB"), (10, "KiB"))


@contextmanager
def opened(path: str | Path, max_bytes: int) -> Iterator[BinaryIO]:
    """The file at `path`, to be read.

    Raises:
        ConfigError: `max_bytes` is no positive integer, or `path` no path.
        OSError: missing, unreadable, larger than `max_bytes`, or a folder, pipe, socket or device, which are never waited for.
    """
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
        raise ConfigError(f"max_bytes must be a positive integer; got {max_bytes!r}")

    if "\0" in str(as_path(path)):
        raise OSError("a path has no NUL in it")

    def opener(name: str, flags: int) -> int:
        mode = Path(name).stat().st_mode  # first, because to open a device or a pipe does something already
        if not stat.S_ISREG(mode):
            raise OSError("it is a folder" if stat.S_ISDIR(mode) else "it is a pipe, a socket or a device, not a file")
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # should it have become a pipe in between

    with open(path, "rb", opener=opener) as file:
        if (size := os.fstat(file.fileno()).st_size) > max_bytes:
            raise OSError(f"it {too_large(size, max_bytes)}")
        yield file


def as_path(path: object) -> Path:
    """`path` as a Path. Raises ConfigError: it is none, such as None or the number of an open file."""
    if isinstance(path, str | os.PathLike) and isinstance(os.fspath(path), str):
        return Path(path)
    raise ConfigError(f"path must be a str or a pathlib.Path; got {path!r}")


def make_folder(folder: Path) -> None:
    """Make `folder` if it is missing. Raises DataError: something else stands there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise DataError(f"{folder} is not a folder, and nothing can be written into it") from error


def read_json(path: str | Path, max_bytes: int) -> object:
    """What a JSON file in UTF-8 holds. Raises OSError as `opened`, and ValueError for anything but JSON."""
    with opened(path, max_bytes) as file:
        return parse_json(file.read().decode("utf-8"))


def parse_json(text: str) -> object:
    """What JSON text holds. Raises ValueError: malformed, nested too deep, or with a key given twice."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError(f"nested too deep: {error}") from error


def too_large(size: int, max_bytes: int) -> str:
    """What is wrong with `size` bytes, and what to do about it."""
    return f"takes {amount(size)}, more than the limit of {amount(max_bytes)}; raise max_bytes if you trust it"


def amount(size: int) -> str:
    """A number of bytes in the unit that suits it."""
    if size >= 1 << 80:  # no machine's: somebody wrote a number of hundreds of digits
        return "more than 2^80 bytes"
    return next((f"{size / (1 << power):.3g} {unit}" for power, unit in _UNITS if size >= 1 << power), f"{size} bytes")


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(record := dict(pairs)) < len(pairs):
        raise ValueError("a key appears twice")
    return record


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes | memoryview) -> None:
    """Write `data` to `path` atomically: a temporary file beside it, synced, then renamed. Makes missing folders.

    Raises:
        OSError: as the file system has it, with the name of the file. `path` is then as it was, and no temporary file
            is left; a process that is killed leaves one, see `remove_unfinished`.
    """
    with written_first(path, data):
        pass


@contextmanager
def written_first(path: str | Path, data: bytes | memoryview) -> Iterator[None]:
    """As `write_bytes`, in two steps: what is done inside is done when the data are on the disk, and before they are at `path`.
    If it fails, they are not put there.
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
        yield
        temporary.replace(target)
    except BaseException as error:  # An interrupt as well must leave nothing behind.
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and str(error.filename) in ("None", str(temporary)):
            raise OSError(error.errno, error.strerror, str(target)) from error  # a full disk does not say which file
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left of files they were writing in `folder`. No other may be writing there now."""
    for path in folder.glob(".*.tmp"):
        if _UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)
