"""Text for language models: documents of one source, parted by name and cut into tokens, byte by byte or by any tokenizer.

A document is on one side of the split as a whole. Which one depends on its name alone, so that it is the same everywhere, and
stays the same as others are added.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strassen_tile.data.idx import need
from strassen_tile.data.prose import standard_library, standard_library_code
from strassen_tile.errors import DataError
from strassen_tile.files import opened

Document = tuple[str, str]  # name and text
Encode = Callable[[str], Sequence[int]]
BYTES = 256
_MOST_BYTES = 1 << 33  # of a file
_STREAMED = 1 << 27  # of a data set that has no end, unless a limit says otherwise
_PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Part:
    """The tokens of one side of a split.

    Attributes:
        tokens: (n,) integers, documents one after the other, each ended by a separator.
        size: bytes of the text that they are, in UTF-8, a byte for each separator.
    """

    tokens: Tensor
    size: int


@dataclass(frozen=True)
class TextSplits:
    """What to train, to validate and to test on.

    Attributes:
        train, validation, test: of documents that are on no other side.
        name: what it was loaded by.
        vocabulary: how many different tokens there can be.
        tokenizer: "bytes", or the tokenizer's name.
        digest: of all tokens: texts are the same where it is.
    """

    train: Part
    validation: Part
    test: Part
    name: str
    vocabulary: int
    tokenizer: str
    digest: str


def load_text(data: str, *, tokenizer: Any = "bytes", limit: int | None = None, context: int = 1) -> TextSplits:
    """The text called `data`, in tokens.

    Args:
        data: "python", the prose of Python's standard library, or "python-code", its sources; a folder or file of txt, jsonl
            ({"text": …} a line) or parquet; or "hub:NAME", streamed. Where files or splits are called train, validation (or
            val) and test, those parts are taken; otherwise a twentieth of the documents each is for validation and test.
        tokenizer: "bytes", what transformers' AutoTokenizer takes, or a tokenizer of transformers.
        limit: bytes of text to train on, the last document cut; None: all there are, of streams 128 MiB. What is held out is
            the same whatever the limit, but of streams, which are left when they have given enough.
        context: tokens a piece; each part has to have more.

    Raises:
        DataError: there is no text, it cannot be read, or a part is shorter than a piece.
        ImportError: parquet files and the hub need `datasets`, tokenizers `transformers`.
    """
    encode, vocabulary, separator = _tokenizer(tokenizer)
    code, kind = ("B", torch.uint8) if vocabulary <= BYTES else ("i", torch.int32)
    parts = {part: array(code) for part in _PARTS}
    sizes = dict.fromkeys(_PARTS, 0)
    for side, text in _parted(data, limit):
        parts[side].extend(encode(text))
        parts[side].append(separator)
        sizes[side] += _size(text)
    made = {
        name: torch.frombuffer(part, dtype=kind) if part else torch.empty(0, dtype=kind) for name, part in parts.items()
    }
    for part, tokens in made.items():
        if len(tokens) <= context:
            raise DataError(
                f"{data}: the {part} text has {len(tokens)} tokens, and a piece is {context} and the one after; give more text "
                "(documents are parted as wholes), or a shorter context"
            )
    digest = hashlib.sha256(b"".join(made[part].numpy().tobytes() for part in _PARTS)).hexdigest()[:16]
    train, validation, test = (Part(made[part], sizes[part]) for part in _PARTS)
    name = tokenizer if isinstance(tokenizer, str) else str(tokenizer.name_or_path)
    return TextSplits(train, validation, test, data, vocabulary, name, digest)


def load_documents(data: str, *, limit: int | None = None) -> dict[str, list[str]]:
    """The documents of the text called `data`, by part: "train", "validation" and "test", as `load_text` parts them.

    Raises:
        DataError: there is no text, or it cannot be read.
        ImportError: parquet files and the hub need `datasets`.
    """
    found: dict[str, list[str]] = {part: [] for part in _PARTS}
    for part, text in _parted(data, limit):
        found[part].append(text)
    return found


def _parted(data: str, limit: int | None) -> Iterator[tuple[str, str]]:
    """The side of each document and its text, with `limit` bytes to train on."""
    streamed = data.startswith("hub:")
    if limit is None and streamed:
        limit = _STREAMED
    sizes = dict.fromkeys(_PARTS, 0)
    for part, (name, text) in _sources(data):
        side = part or _side(name)
        if side == "train" and limit is not None:
            left = limit - sizes["train"]  # of which one is the separator's
            if left <= 1:
                if streamed and all(sizes.values()):
                    break
                continue
            if _size(text) > left:
                text = text.encode("utf-8", errors="replace")[: left - 1].decode("utf-8", errors="ignore")
                sizes["train"] = limit  # full, though of a letter that does not fit some bytes be left
        if text:
            sizes[side] += _size(text)
            yield side, text


def _size(text: str) -> int:
    return len(text.encode("utf-8", errors="replace")) + 1


def _tokenizer(name: Any) -> tuple[Encode, int, int]:
    """How text becomes tokens, how many different ones there are, and the one that ends a document."""
    if name == "bytes":
        return lambda text: text.encode("utf-8", errors="replace").replace(b"\0", b" "), BYTES, 0
    made = name
    if isinstance(name, str):
        transformers = need("transformers", f"tokenizer {name}", "language")
        try:
            made = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # of the library, of its HTTP client, of the file system
            said = " ".join(str(error).split())[:300]
            raise DataError(f"tokenizer={name}: cannot be loaded ({type(error).__name__}: {said})") from error
    separator = next((i for i in (made.eos_token_id, made.sep_token_id, made.pad_token_id) if i is not None), None)
    if separator is None:
        raise DataError(f"tokenizer={name}: has no token that ends a text (eos, sep or pad)")

    def encode(text: str) -> Sequence[int]:
        whole = text.encode("utf-8", errors="replace").decode("utf-8")  # without halves of surrogate pairs
        return made(whole, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]

    vocabulary = max([len(made), *(index + 1 for index in made.get_vocab().values())])  # numbers may have gaps
    return encode, vocabulary, separator


def _side(name: str) -> str:
    at = int.from_bytes(hashlib.sha256(name.encode("utf-8", errors="replace")).digest()[:4]) / 2**32
    return "validation" if at < 0.05 else "test" if at < 0.1 else "train"


def _sources(data: str) -> Iterator[tuple[str | None, Document]]:
    """The part, where its source says it, and each document."""
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
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in kinds)
    if not files:
        raise DataError(f"data={data!r}: has no files that end in {', '.join(kinds)}")
    root = path.parent if path.is_file() else path
    return chain.from_iterable(_of_file(file, file.relative_to(root)) for file in files)


def _of_file(file: Path, name: Path) -> Iterator[tuple[str | None, Document]]:
    part = _said_by(name.as_posix())
    try:
        if file.suffix == ".parquet":
            for number, text in enumerate(_of_parquet(file)):
                yield part, (f"{name} {number}", text)
        elif file.suffix == ".jsonl":
            with opened(file, _MOST_BYTES) as lines:
                for number, line in enumerate(lines):
                    if line.strip():
                        yield part, (f"{name} {number}", _text_of(json.loads(line), f"line {number + 1}"))
        else:
            with opened(file, _MOST_BYTES) as content:
                yield part, (name.as_posix(), content.read().decode("utf-8", errors="replace"))
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
