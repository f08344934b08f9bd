"""Factors in and out: our own JSON; the FastMatrixMultiplication catalogue's JSON, AlphaTensor's NPZ, and text.

All but the first hold exact algorithms by what they are, so a file of theirs that does not multiply exactly is refused.
NPZ needs numpy and is never unpickled.
"""

from __future__ import annotations

import io
import math
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strassen_tile import files
from strassen_tile.bases.text_files import read_coefficients, read_sms, sms_prefix, write_coefficients, write_sms
from strassen_tile.basis import Basis
from strassen_tile.basis_record import MAX_BYTES, check_size, read_json
from strassen_tile.errors import BasisError, ConfigError, ShapeError, shape_text
from strassen_tile.tiling import Tile, as_tile

_CATALOGUE = {"n", "m", "u", "v", "w"}
_HEADER = 1 << 14  # bytes: more than numpy reads of one
_PIECE = 1 << 20


def load(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Basis:
    """Read a basis from `path`: JSON of `Basis.save`, JSON of the catalogue, NPZ, SMS, or a coefficient file.

    The catalogue's JSON has `n` (three sizes), `m` (rank) and `u`, `v`, `w`, each a list of m flat rows of numbers or
    strings such as "1/2". An NPZ has one key such as "4,4,4" whose array is the three factors, each (size, rank). In
    both the third factor may be stored transposed (s×p); whichever way multiplies exactly is taken. SMS is plinopt's: three
    files, PREFIX_L.sms, PREFIX_R.sms and PREFIX_P.sms, of which `path` is any, or PREFIX.sms. A file of another suffix that
    is no JSON is read as fast-matmul's coefficients: `text_files` has both.

    Args:
        path: the file.
        max_bytes: the most that the file, what is packed in it, or its factors in float64 may take.

    Raises:
        BasisError: unreadable, larger than `max_bytes`, malformed, complex, pickled, or claiming to be exact and not
            being so (with its error).
    """
    source = files.as_path(path)
    if source.suffix.lower() == ".npz":
        return _load_npz(source, max_bytes)
    if source.suffix.lower() == ".sms":
        return replace(_exact(*read_sms(source, max_bytes), source), name=sms_prefix(source))
    if source.suffix.lower() != ".json" and not _looks_like_json(source, max_bytes):
        return _exact(*read_coefficients(source, max_bytes), source)
    record = read_json(source, max_bytes)
    if isinstance(record, dict) and set(record) >= _CATALOGUE:
        return _load_catalogue(record, source, max_bytes)
    return Basis.from_record(record, source=str(source), max_bytes=max_bytes)


def save(basis: Basis, path: str | Path) -> None:
    """Write a basis so that `load` reads it back.

    Args:
        basis: any for `.json`; an exact one for the others, which say nothing of an error.
        path: `.json`, `.sms` (three files, with _L, _R and _P before the suffix), or `.txt`, a coefficient file.

    Raises:
        BasisError: another suffix, an approximation in a format of exact algorithms, or what the file system says. Nothing is
            half-written.
    """
    target = files.as_path(path)
    writers = {".sms": write_sms, ".txt": write_coefficients}
    if target.suffix.lower() == ".json":
        basis.save(target)
        return
    if target.suffix.lower() not in writers:
        raise BasisError(f"a basis is saved as .json, .sms or .txt; got {target.name!r}")
    if not basis.is_exact:
        raise BasisError(
            f"{target.suffix} files hold exact algorithms, and the relative squared error of this one is {basis.error:.3g}; "
            "save it as .json"
        )
    try:
        writers[target.suffix.lower()](basis, target)
    except OSError as error:
        raise BasisError(f"cannot write a basis to {target}: {error}") from error


def _looks_like_json(source: Path, max_bytes: int) -> bool:
    try:
        with files.opened(source, max_bytes) as file:
            return file.read(_HEADER).lstrip()[:1] in (b"{", b"[", b"")
    except OSError as error:
        raise BasisError(f"cannot read a basis from {source}: {error}") from error


def _load_catalogue(record: dict[str, object], source: Path, max_bytes: int) -> Basis:
    sizes, rank = record["n"], record["m"]
    if not isinstance(sizes, list) or not isinstance(rank, int) or isinstance(rank, bool):
        raise BasisError(
            f"{source}: n must be a list of three sizes and m the rank; got n={sizes!r:.100}, m={rank!r:.100}"
        )
    try:
        p, q, s = as_tile(sizes)
    except ShapeError as error:
        raise BasisError(f"{source}: n must be a list of three sizes; got n={sizes!r:.100}") from error
    check_size(rank * (p * q + q * s + p * s), source, max_bytes)
    factors = []
    for key, size in (("u", p * q), ("v", q * s), ("w", p * s)):
        rows = record[key]
        if not isinstance(rows, list) or len(rows) != rank:
            raise BasisError(f"{source}: {key} must be a list of m = {rank} rows")
        if any(not isinstance(row, list) or len(row) != size for row in rows):
            raise BasisError(f"{source}: every row of {key} must hold {size} coefficients for n = {sizes}")
        factors.append(torch.tensor([[_number(c, key, source) for c in row] for row in rows], dtype=torch.float64))
    return _exact(factors, (p, q, s), source)


def _number(coefficient: object, key: str, source: Path) -> float:
    try:
        if isinstance(coefficient, int | float | str) and not isinstance(coefficient, bool):
            # Fraction only where there is one: of "1e999999999" it would write out every digit.
            number = float(Fraction(coefficient) if "/" in str(coefficient) else coefficient)
            if math.isfinite(number):
                return number
    except (ValueError, ZeroDivisionError, OverflowError):
        pass
    raise BasisError(f"{source}: {key} holds {str(coefficient)[:40]!r}, which is not a real number or a fraction")


def _load_npz(source: Path, max_bytes: int) -> Basis:
    key, stacked = _only_array(source, max_bytes)
    try:
        tile = as_tile([int(side) for side in key.split(",")])
    except ValueError as error:
        raise BasisError(f"{source}: the entry must be named like '4,4,4'; got {key!r}") from error
    p, q, s = tile
    if stacked.ndim != 3 or stacked.shape[:2] != (3, p * q) or len({p * q, q * s, p * s}) > 1:
        raise BasisError(
            f"{source}: {key!r} must hold three factors (size, rank) of {p * q}, {q * s}, {p * s} rows; "
            f"got shape {shape_text(stacked.shape)}"
        )
    return _exact([part.T for part in torch.from_numpy(stacked)], tile, source)


def _only_array(source: Path, max_bytes: int) -> tuple[str, Any]:
    """The name of the one array in an NPZ, and its numbers in float64.

    The archive says how large an entry is, and the entry how large its array; either may lie. Both are compared with
    `max_bytes` before anything is unpacked, and with what is there before the array is made.
    """
    try:
        import numpy as np
    except ImportError as error:
        raise BasisError('reading an NPZ needs numpy: pip install "strassen-tile[files]"') from error
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with files.opened(source, max_bytes) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if len(entries) != 1:
                names = ", ".join(entry.filename for entry in entries[:8])
                raise BasisError(f"{source} holds {len(entries)} entries ({names[:200]} …); one algorithm is wanted")
            (entry,) = entries
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # all that numpy writes
                raise ValueError("an entry is compressed in another way than numpy does")
            if entry.file_size > max_bytes + _HEADER:
                raise ValueError(f"unpacked it {files.too_large(entry.file_size, max_bytes)}")
            data = io.BytesIO()
            with archive.open(
                entry
            ) as packed:  # in pieces: asked for all at once, it unpacks more than file_size first
                shutil.copyfileobj(packed, data, _PIECE)
        data.seek(0)
        shape, fortran_order, dtype = readers[np.lib.format.read_magic(data)](data)
        if dtype.hasobject:
            raise ValueError(
                "object arrays are pickles and are not read: save the three factors padded or as JSON instead"
            )
        if dtype.kind not in "iuf":
            raise ValueError(f"it holds {dtype}; real numbers are wanted")
        check_size(math.prod(shape), source, max_bytes)
        if math.prod(shape) * dtype.itemsize != len(data.getbuffer()) - data.tell():
            raise ValueError(
                f"its header promises {dtype} of shape {shape_text(shape)}, and not that many bytes follow"
            )
        order: Any = "F" if fortran_order else "C"
        array = np.ndarray(shape, dtype, data.getbuffer(), data.tell(), order=order)
        return entry.filename.removesuffix(".npy"), np.array(array, dtype=np.float64, order="C")
    except (BasisError, ConfigError):
        raise
    # A damaged archive is an error of many kinds: BadZipFile, zlib's, NotImplementedError of an encrypted one, numpy's.
    except Exception as error:
        said = f"unknown version {error}" if isinstance(error, KeyError) else error
        raise BasisError(
            f"cannot read {source}: {said}. It must hold one plain array of three factors, (3, size, rank)"
        ) from error


def _exact(flat: Sequence[Tensor], tile: Tile, source: Path) -> Basis:
    """The exact basis with these flat factors (rank, size), the third stored either way."""
    p, q, s = tile
    encoder, weight_encoder, rank = flat[0].reshape(-1, p, q), flat[1].reshape(-1, q, s), len(flat[0])
    if len(flat[1]) != rank or len(flat[2]) != rank:
        raise BasisError(f"{source}: the three factors have {rank}, {len(flat[1])} and {len(flat[2])} terms")
    try:
        candidates = [
            Basis(encoder, weight_encoder, decoder, name=source.stem)
            for decoder in (flat[2].reshape(-1, p, s), flat[2].reshape(-1, s, p).mT)
        ]
    except BasisError as error:
        raise BasisError(f"{source}: {error}") from error
    best = min(candidates, key=lambda basis: basis.error)
    if not best.is_exact:
        raise BasisError(
            f"{source} claims to multiply {p}×{q} by {q}×{s} exactly, but its relative squared error is {best.error:.3g} "
            "(an algorithm over the integers modulo 2 is not one over the reals)"
        )
    return best
