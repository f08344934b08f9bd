"""Text for language models: documents of one source, parted by name and cut into tokens, byte by byte or by any tokenizer.

A document is on one side of the split as a whole. Which one depends on its name alone, so that it is the same everywhere, and
stays the same as others are added.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from strassen_tile.data.documents import documents
from strassen_tile.data.idx import need
from strassen_tile.errors import DataError

BYTES = 256
_STREAMED = 1 << 27  # of a data set that has no end, unless a limit says otherwise
_LOSSY = (
    "The tokenizer leaves something of the text out (letters that it does not know, capitals), which a model then need not "
    "predict: bits a byte are too few, and compare with those of the same tokenizer alone."
)
_LOOKED_AT = 1 << 18  # letters of each part, and of a document, that tokens are to give back
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
        lossy: whether tokens leave something of the text out (unknown letters, capitals): bits a byte are then too few.
    """

    train: Part
    validation: Part
    test: Part
    name: str
    vocabulary: int
    tokenizer: str
    digest: str
    lossy: bool = False

    def remarks(self) -> list[str]:
        """What a reader of losses on this text has to know."""
        train = self.train.tokens
        same = [name for name in ("validation", "test") if torch.equal(getattr(self, name).tokens, train)]
        return [
            *([_LOSSY] if self.lossy else []),
            *(
                f"The {name} text is the training text, to the letter: its loss says nothing of other text."
                for name in same
            ),
        ]


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
    tokens_of = _tokens(tokenizer)
    code, kind = ("B", torch.uint8) if tokens_of.vocabulary <= BYTES else ("i", torch.int32)
    parts = {part: array(code) for part in _PARTS}
    sizes, looked_at, lossy = dict.fromkeys(_PARTS, 0), dict.fromkeys(_PARTS, 0), False
    for side, text in _parted(data, limit):
        if looked_at[side] < _LOOKED_AT and not lossy:
            lossy = not tokens_of.keeps(text[:_LOOKED_AT])
            looked_at[side] += len(text)
        parts[side].extend(tokens_of.encode(text))
        parts[side].append(tokens_of.separator)
        sizes[side] += _size(text)
    made = {
        name: torch.frombuffer(part, dtype=kind) if part else torch.empty(0, dtype=kind) for name, part in parts.items()
    }
    for part, tokens in made.items():
        if len(tokens) <= context:
            raise DataError(
                f"{data}: the {part} text has {len(tokens)} tokens, and a piece is {context} and the one after; give more text "
                "(documents are parted as wholes; where files are called train or test, others must be called validation), or "
                "a shorter context"
            )
    digest = hashlib.sha256(b"".join(made[part].numpy().tobytes() for part in _PARTS)).hexdigest()[:16]
    train, validation, test = (Part(made[part], sizes[part]) for part in _PARTS)
    name = tokenizer if isinstance(tokenizer, str) else str(tokenizer.name_or_path)
    return TextSplits(train, validation, test, data, tokens_of.vocabulary, name, digest, lossy)


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
    for part, (name, text) in documents(data):
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


class _Tokens(NamedTuple):
    """How text becomes tokens, how many different ones there are, what ends a document, and whether all of a text is there."""

    encode: Callable[[str], Sequence[int]]
    vocabulary: int
    separator: int
    keeps: Callable[[str], bool]


def _tokens(name: Any) -> _Tokens:
    if name == "bytes":
        return _Tokens(
            lambda text: text.encode("utf-8", errors="replace").replace(b"\0", b" "), BYTES, 0, lambda text: True
        )
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
        return made(_whole(text), add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]

    def keeps(text: str) -> bool:
        """Up to a space before it and after, which many tokenizers put or take."""
        back = made.decode(encode(text), clean_up_tokenization_spaces=False)
        return bool(back.strip(" ") == _whole(text).strip(" "))

    vocabulary = max([len(made), *(index + 1 for index in made.get_vocab().values())])  # numbers may have gaps
    return _Tokens(encode, vocabulary, separator, keeps)


def _whole(text: str) -> str:
    """Without halves of surrogate pairs."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _side(name: str) -> str:
    at = int.from_bytes(hashlib.sha256(name.encode("utf-8", errors="replace")).digest()[:4]) / 2**32
    return "validation" if at < 0.05 else "test" if at < 0.1 else "train"
