"""Published algorithms as text: three SMS files (plinopt), and coefficient files (fast-matmul). Read, and written.

Both hold exact algorithms by what they are; `bases.load` refuses one that does not multiply exactly.

SMS is a sparse matrix: a line "rows columns R", lines "i j value" counted from 1, values whole numbers or fractions, and
"0 0 0". An algorithm is three of them, PREFIX_L.sms and PREFIX_R.sms (rank × entries of a tile, row by row) and PREFIX_P.sms
(entries × rank). A coefficient file is three blocks of rows of numbers, entries × rank, with a line that starts with # between.
"""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from strassen_tile import files
from strassen_tile.basis import Basis
from strassen_tile.basis_record import check_size
from strassen_tile.errors import BasisError
from strassen_tile.tiling import Tile

_NUMBER = re.compile(
    r"[+-]?(\d{1,400}(\.\d{0,400})?|\.\d{1,400})([eE][+-]?\d{1,2})?(/\d{1,400})?"
)  # 2**-1074 has 324 digits
_SIMPLE = 1000  # denominators up to this are written as fractions
_PARTS = "LRP"


def read_sms(path: Path, max_bytes: int) -> tuple[list[Tensor], Tile]:
    """The flat factors (rank, size) of an algorithm in three SMS files, and its tile.

    Args:
        path: any one of the three, or their prefix with `.sms`.
        max_bytes: the most that a file, or its numbers in float64, may take.

    Raises:
        BasisError: a file is missing, malformed, cut short or too large, or the three do not fit together.
    """
    factors = []
    for part, where in zip(_PARTS, sms_paths(path), strict=True):
        matrix = _sparse(_text(where, max_bytes), where, max_bytes)
        factors.append(matrix.mT if part == "P" else matrix)
    return factors, _tile(factors, path)


def read_coefficients(path: Path, max_bytes: int) -> tuple[list[Tensor], Tile]:
    """The flat factors (rank, size) of an algorithm in a coefficient file, and its tile. Raises BasisError as `read_sms`."""
    blocks: list[list[list[float]]] = [[]]
    for line in _text(path, max_bytes).splitlines():
        if line.strip().startswith("#"):
            blocks.append([])
        elif line.strip():
            blocks[-1].append([number(word, path) for word in line.split()])
    found = [block for block in blocks if block]
    if len(found) != 3 or any(len(row) != len(found[0][0]) for block in found for row in block):
        raise BasisError(
            f"{path} is no algorithm that can be read: wanted JSON, NPZ, SMS, or three blocks of rows of as many numbers, "
            f"with lines of # between; got {len(found)} blocks"
        )
    factors = [torch.tensor(block, dtype=torch.float64, device="cpu").mT for block in found]
    return factors, _tile(factors, path)


def write_sms(basis: Basis, path: Path) -> None:
    """Three SMS files: PREFIX_L, PREFIX_R and PREFIX_P of PREFIX.sms. All are written, or none."""
    texts = []
    for part, factor in zip(_PARTS, (basis.encoder, basis.weight_encoder, basis.decoder), strict=True):
        matrix = factor.flatten(1).mT if part == "P" else factor.flatten(1)
        entries = [f"{i + 1} {j + 1} {_written(float(matrix[i, j]))}" for i, j in matrix.nonzero().tolist()]
        texts.append("\n".join([f"{matrix.shape[0]} {matrix.shape[1]} R", *entries, "0 0 0", ""]))
    first, second, third = sms_paths(path)
    for where in (first, second, third):
        if where.is_dir():  # a file that is replaced goes there last, and can fail: then others would be new already
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(where))
    with files.written_first(first, texts[0].encode()), files.written_first(second, texts[1].encode()):
        files.write_text(third, texts[2])


def write_coefficients(basis: Basis, path: Path) -> None:
    """A coefficient file."""
    factors = (basis.encoder, basis.weight_encoder, basis.decoder)
    blocks = [[" ".join(map(_written, row)) for row in factor.flatten(1).mT.tolist()] for factor in factors]
    p, q, s = basis.tile
    lines = [f"# {basis.name} <{p},{q},{s}> rank {basis.rank}"]
    for block in blocks:
        lines += [*block, "#"]
    files.write_text(path, "\n".join(lines[:-1]) + "\n")


def sms_paths(path: Path) -> list[Path]:
    """The three files of an algorithm, by one of them or by their prefix with `.sms`."""
    return [path.with_name(f"{sms_prefix(path)}_{part}.sms") for part in _PARTS]


def sms_prefix(path: Path) -> str:
    """The name of an algorithm, by one of its files or by the prefix with `.sms`."""
    return re.sub(r"_[LRP]$", "", path.stem)


def number(word: str, source: object) -> float:
    """A number or fraction in a text. Raises BasisError for anything else, such as the x of a family of algorithms."""
    if _NUMBER.fullmatch(word):
        over, _, under = word.partition("/")
        try:  # a fraction: of two whole numbers that no float could hold it may be one
            value = float(Fraction(over) / Fraction(under or 1))
        except (ZeroDivisionError, OverflowError):
            value = math.inf
        if math.isfinite(value):
            return value
    raise BasisError(f"{source} holds {word[:40]!r}, which is not a real number or a fraction")


def _written(value: float) -> str:
    simple = Fraction(value).limit_denominator(_SIMPLE)
    return str(simple) if simple.numerator / simple.denominator == value else str(Fraction(value))


def _text(path: Path, max_bytes: int) -> str:
    try:
        with files.opened(path, max_bytes) as file:
            return file.read().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BasisError(f"cannot read a basis from {path}: {error}") from error


def _sparse(text: str, source: Path, max_bytes: int) -> Tensor:
    lines = _lines(text)
    rows, columns = _header(next(lines, []), source)
    check_size(rows * columns, source, max_bytes)
    matrix = torch.zeros(rows, columns, dtype=torch.float64, device="cpu")
    seen: set[tuple[int, int]] = set()
    for words in lines:
        if words == ["0", "0", "0"]:
            if next(lines, None) is not None:
                raise BasisError(f"{source} goes on after its end, the line 0 0 0")
            return matrix
        at = tuple(int(word) for word in words[:2] if word.isdecimal() and len(word) < 10)
        if len(words) != 3 or len(at) != 2 or not (1 <= at[0] <= rows and 1 <= at[1] <= columns):
            raise BasisError(f"{source}: {' '.join(words)[:60]!r} is no entry 'i j value' of {rows} × {columns}")
        if at in seen:
            raise BasisError(f"{source} has entry {at[0]} {at[1]} twice")
        seen.add((at[0], at[1]))
        matrix[at[0] - 1, at[1] - 1] = number(words[2], source)
    raise BasisError(f"{source} is cut short: it has no last line 0 0 0")


def _lines(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if words := line.partition("#")[0].split():
            yield words


def _header(words: list[str], source: Path) -> tuple[int, int]:
    sizes = [int(word) for word in words[:2] if word.isdecimal() and len(word) < 10]
    if len(words) != 3 or len(sizes) != 2 or min(sizes) < 1 or not words[2].isalpha():
        raise BasisError(f"{source}: an SMS file starts with 'rows columns R'; got {' '.join(words)[:60]!r}")
    return sizes[0], sizes[1]


def _tile(factors: list[Tensor], source: Path) -> Tile:
    """p, q and s of factors with pq, qs and ps entries a term."""
    ranks, (pq, qs, ps) = [len(factor) for factor in factors], [factor.shape[1] for factor in factors]
    p = math.isqrt(pq * ps // qs)
    q, s = pq // max(p, 1), ps // max(p, 1)
    if len(set(ranks)) > 1 or (p * q, q * s, p * s) != (pq, qs, ps):
        shapes = ", ".join(f"{rank} × {size}" for rank, size in zip(ranks, (pq, qs, ps), strict=True))
        raise BasisError(
            f"{source}: factors of {shapes} (terms × entries) are of no product p×q by q×s, pq, qs and ps entries"
        )
    return p, q, s
