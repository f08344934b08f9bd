"""Where text comes from: documents of Python's library, of files and folders, and of data sets of the hub, one by one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from strassen_tile.data.idx import need
from strassen_tile.data.prose import standard_library, standard_library_code
from strassen_tile.errors import DataError
from strassen_tile.files import opened

Document = tuple[str, str]  # name and text
_MOST_BYTES = 1 << 33  # of a file


def documents(data: str) -> Iterator[tuple[str | None, Document]]:
    """Each document of the text called `data`, as `load_text` has it, and its part, where its source says that.

    Raises:
        DataError: there is no text, or it cannot be read.
        ImportError: parquet files and the hub need `datasets`.
    """
    if data == "python":
        return ((None, document) for document in standard_library().items())
    if data == "python-code":
        return ((None, document) for document in standard_library_code().items())
    if data.startswith("hub:"):
        return _of_hub(data.removeprefix("hub:"))
    if not data.strip():
        raise DataError("data is empty; give a file or folder, python, python-code, or hub:NAME")
    path = Path(data)
    with contextlib.suppress(RuntimeError):  # a home that nobody has
        path = path.expanduser()
    if not path.exists():
        raise DataError(f"data={data!r}: no such file or folder; give one, python, python-code, or hub:NAME")
    kinds = (".txt", ".md", ".rst", ".jsonl", ".parquet")
    inside = (file for file in path.rglob("*") if file.suffix.lower() in kinds and file.is_file())
    files = [path] if path.is_file() else sorted(inside)
    if not files:
        raise DataError(f"data={data!r}: has no files that end in {', '.join(kinds)}")
    root = path.parent if path.is_file() else path
    return chain.from_iterable(_of_file(file, file.relative_to(root)) for file in files)


def _of_file(file: Path, name: Path) -> Iterator[tuple[str | None, Document]]:
    part = _said_by(name.as_posix())
    try:
        if file.suffix.lower() == ".parquet":
            for number, text in enumerate(_of_parquet(file)):
                yield part, (f"{name} {number}", text)
        elif file.suffix.lower() == ".jsonl":
            with opened(file, _MOST_BYTES) as lines:
                for number, line in enumerate(lines):
                    if line.strip():
                        yield part, (f"{name} {number}", _text_of(json.loads(line), f"line {number + 1}"))
        else:
            with opened(file, _MOST_BYTES) as content:
                yield part, (name.as_posix(), content.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: is not UTF-8 ({error.reason} at byte {error.start}); convert it, or leave it out"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as text: {error}") from error


def _said_by(name: str) -> str | None:
    """The part that a file's or a split's name says it is of."""
    first = name.lower().replace("\\", "/").split("/")[0].partition("-")[0].partition(".")[0]
    return {
        "train": "train",
        "validation": "validation",
        "val": "validation",
        "valid": "validation",
        "test": "test",
    }.get(first)


def _text_of(row: object, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{where} has no "text"')
    return text


def _of_parquet(file: Path) -> Iterable[str]:
    datasets = need("datasets", "text in parquet files", "text")
    rows = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
    return (_text_of(row, "a row") for row in rows)


def _of_hub(name: str) -> Iterator[tuple[str | None, Document]]:
    datasets = need("datasets", "text of the hub", "text")
    name, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(name, config or None, streaming=True)
        # Held-out parts first: of a stream that has no end, the others are left off in the middle.
        parts = sorted(found, key=lambda part: _said_by(part) in (None, "train"))
        held_out = {_said_by(part) for part in parts} >= {"validation", "test"}
        for part in parts:
            for number, row in enumerate(found[part]):
                side = _said_by(part) if held_out else None
                yield side, (f"{part} {number}", _text_of(row, f"{part}, row {number}"))
    except DataError:
        raise
    except Exception as error:  # of the library, of its HTTP client, of the file system
        said = " ".join(str(error).split())[:300]
        raise DataError(
            f"hub:{name}: cannot be loaded ({type(error).__name__}: {said}). Is the name right (hub:NAME or hub:NAME:CONFIG), "
            "and the hub within reach? Files on disk are given by their folder"
        ) from error
