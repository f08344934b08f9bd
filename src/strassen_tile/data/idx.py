"""The IDX format, in which MNIST and its relatives ship: a header of sizes, then the bytes. Plain or gzipped.

Layout (big-endian): 0x00 0x00, one byte for the type, one for the number of dimensions, a uint32 for each size, then
the elements in row-major order and nothing after them. Files come from the network, so the header is never trusted:
more than `max_bytes` is refused before any of it is read, and memory is taken as bytes arrive, not as promised. Needs numpy,
for the byte order.
"""

from __future__ import annotations

import gzip
import importlib
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strassen_tile.errors import DataError, shape_text
from strassen_tile.files import as_path, opened, too_large

_GZIP = b"\x1f\x8b"
_CHUNK = 1 << 20
MAX_BYTES = 768 << 20  # unpacked: EMNIST, the largest of the family, has 522 MiB of images
_MAX_DIMS = 8
# numpy's name for the element on disk; torch has every one of these in native order.
_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

_STEMS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def need(module: str, purpose: str = "reading these images", extra: str = "vision") -> Any:
    """Import an optional package, or say which extra brings it.

    Raises:
        ImportError: the package is not installed; the message has the pip command.
    """
    try:
        return importlib.import_module(module)
    # Not ImportError alone: compiled packages made for another torch fail with RuntimeError and others.
    except Exception as error:
        said = str(error).partition("\n")[0]
        raise ImportError(
            f"{purpose} needs {module.partition('.')[0]}, which could not be imported ({said}): "
            f'pip install "strassen-tile[{extra}]"'
        ) from error


def read_idx(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Tensor:
    """Read one IDX file, plain or gzipped (told by its first bytes, not by its name).

    Args:
        path: the file.
        max_bytes: the most that the file, or what is packed in it, may take.

    Returns:
        A tensor of the sizes in the header and of its type: uint8, int8, int16, int32, float32 or float64.

    Raises:
        DataError: missing, unreadable, damaged gzip, not IDX, larger than `max_bytes`, or fewer or more bytes than the header
            promises.
        ImportError: numpy is not installed.
    """
    path = as_path(path)
    try:
        with opened(path, max_bytes) as file:
            start = file.read(len(_GZIP))
            file.seek(0)
            if start != _GZIP:
                return _parse(file.read, path, max_bytes)
            with gzip.GzipFile(fileobj=file) as unzipped:
                return _parse(unzipped.read, path, max_bytes)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; expected an IDX file, plain or gzipped") from error
    except EOFError as error:
        raise DataError(f"{path}: truncated gzip, the compressed data ends early; download it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip ({error}); download it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); expected an IDX file") from error


def _parse(read: Callable[[int], bytes], path: Path, max_bytes: int) -> Tensor:
    """The tensor in a stream of IDX bytes; `path` is only for the messages."""
    magic = _take(read, 4)
    if not magic:
        raise DataError(f"{path}: the file is empty; expected an IDX file, plain or gzipped")
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES or not 1 <= magic[3] <= _MAX_DIMS:
        raise DataError(
            f"{path}: wrong magic number 0x{magic.hex()}; an IDX file starts with 0x0000, a type "
            f"(one of {', '.join(f'0x{code:02x}' for code in _TYPES)}) and a number of dimensions (1 to {_MAX_DIMS})"
        )
    ndim = magic[3]
    header = _take(read, 4 * ndim)
    if len(header) < 4 * ndim:
        raise DataError(f"{path}: ends within its header; expected {ndim} sizes of 4 bytes, found {len(header)} bytes")
    shape = tuple(int.from_bytes(header[4 * i : 4 * i + 4], "big") for i in range(ndim))

    np = need("numpy")
    dtype = np.dtype(_TYPES[magic[2]])
    promised = math.prod(shape) * dtype.itemsize
    promise = f"{path}: the header promises {promised} bytes of data, shape {shape_text(shape)}"
    if promised > max_bytes:
        raise DataError(f"{promise}, which {too_large(promised, max_bytes)}")
    data = _take(read, promised)
    if len(data) < promised:
        raise DataError(f"{promise}, but only {len(data)} follow")
    # At the end of a gzip this read is also what checks its checksum.
    if read(1):
        raise DataError(f"{promise}, but more than that follow")
    # Only a shape with a zero in it gets here with sizes that overflow, and numpy refuses those.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**63:
        raise DataError(f"{promise}, which is beyond any array; expected sizes that multiply to less than 2^63")
    # A bytearray is writable, as torch wants; newbyteorder("=") copies only where the order differs.
    array = np.frombuffer(data, dtype=dtype).reshape(shape)
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))


def _take(read: Callable[[int], bytes], size: int) -> bytearray:
    """Up to `size` bytes. A lying header costs what the file holds, because read(size) would allocate `size` first."""
    data = bytearray()
    while len(data) < size:
        chunk = read(min(_CHUNK, size - len(data)))
        if not chunk:
            break
        data += chunk
    return data


def is_idx_folder(folder: Path) -> bool:
    """Whether any of the four IDX files is there, so that a folder that lacks one is reported as such."""
    return any(
        (folder / (stem + suffix)).is_file() for pair in _STEMS.values() for stem in pair for suffix in ("", ".gz")
    )


def idx_paths(folder: Path, part: str) -> tuple[Path, Path]:
    """The image and label files of part "train" or "test"; a plain file is taken before a gzipped one.

    Raises:
        DataError: one of the two is missing.
    """
    found = []
    for stem in _STEMS[part]:
        path = next((folder / (stem + end) for end in ("", ".gz") if (folder / (stem + end)).is_file()), None)
        if path is None:
            every = ", ".join(stem for pair in _STEMS.values() for stem in pair)
            raise DataError(f"{folder / stem}[.gz]: no such file; an IDX folder holds {every} (each plain or .gz)")
        found.append(path)
    return found[0], found[1]


def read_idx_part(folder: Path, part: str, *, max_bytes: int = MAX_BYTES) -> tuple[Tensor, Tensor]:
    """Images and labels of part "train" or "test", checked against each other.

    Returns:
        images uint8 (n, H, W), labels int64 (n,), with n, H, W ≥ 1.

    Raises:
        DataError: a file is missing, malformed, larger than `max_bytes`, of another type or number of dimensions,
            holds nothing, or the two disagree on n.
    """
    image_path, label_path = idx_paths(folder, part)
    # A label is a byte in the file and eight here.
    images, labels = read_idx(image_path, max_bytes=max_bytes), read_idx(label_path, max_bytes=max_bytes // 8 or 1)
    _check(images, image_path, ndim=3, what="images (n, height, width)")
    _check(labels, label_path, ndim=1, what="labels (n,)")
    if len(images) != len(labels):
        raise DataError(
            f"{label_path}: holds {len(labels)} labels, but {image_path} holds {len(images)} images; "
            "expected one label an image"
        )
    return images, labels.to(torch.int64)


def _check(values: Tensor, path: Path, *, ndim: int, what: str) -> None:
    given = f"{path}: holds {values.dtype} of shape {shape_text(values.shape)}"
    if values.dtype != torch.uint8 or values.ndim != ndim:
        raise DataError(f"{given}; expected unsigned bytes (IDX type 0x08, torch.uint8) in {ndim} dimensions: {what}")
    if values.numel() == 0:
        raise DataError(f"{given}, which is nothing; expected at least one of the {what}")
