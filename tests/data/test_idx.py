"""IDX files: what is written is read back, and nothing damaged is read as if it were whole."""

from __future__ import annotations

import gzip
import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import CODES, idx_bytes, write_idx, write_idx_folder

from strassen_tile.data.idx import read_idx, read_idx_part
from strassen_tile.errors import DataError

# One file, overwritten by every example, is what these want.
relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WHOLE = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@relaxed
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    dtype=st.sampled_from(sorted(CODES)),
    suffix=st.sampled_from(["", ".gz"]),
    seed=st.integers(0, 99),
)
def test_round_trip(tmp_path: Path, shape: list[int], dtype: str, suffix: str, seed: int) -> None:
    """Wrong byte order, a transposed shape or a type read as another would show here."""
    array = np.random.default_rng(seed).integers(-(2**40), 2**40, shape).astype(dtype)
    read = read_idx(write_idx(tmp_path / f"a{suffix}", array))
    assert read.dtype == getattr(torch, dtype)
    assert read.shape == array.shape
    np.testing.assert_array_equal(read.numpy(), array)


@relaxed
@given(head=st.sampled_from([b"", b"\0\0", b"\0\0\x08", b"\0\0\x08\x02", b"\x1f\x8b"]), rest=st.binary(max_size=40))
def test_any_bytes_give_a_tensor_or_a_named_error(tmp_path: Path, head: bytes, rest: bytes) -> None:
    """A struct.error, MemoryError or numpy's ValueError would reach the user without the file's name."""
    path = tmp_path / "noise"
    path.write_bytes(head + rest)
    try:
        read_idx(path)
    except DataError as error:
        assert str(path) in str(error)


CORRUPTIONS = {
    "empty": (b"", "is empty"),
    "not idx": (b"\x89PNG\r\n\x1a\n" + WHOLE, "wrong magic number 0x89504e47.*starts with 0x0000"),
    "unknown type": (b"\0\0\x07" + WHOLE[3:], "wrong magic number 0x00000703"),
    "no dimensions": (b"\0\0\x08\0\1", "wrong magic number 0x00000800"),
    "little-endian magic": (b"\x03\x08\0\0" + WHOLE[4:], "wrong magic number 0x03080000"),
    "cut in magic": (WHOLE[:3], "wrong magic number 0x000008;"),
    "cut in header": (WHOLE[:13], r"ends within its header; expected 3 sizes of 4 bytes, found 9 bytes"),
    "cut in data": (WHOLE[:-5], r"promises 24 bytes of data, shape \(2, 3, 4\), but only 19 follow"),
    "too long": (WHOLE + b"\0", r"promises 24 bytes of data, shape \(2, 3, 4\), but more than that follow"),
    "impossible": (struct.pack(">4B4I", 0, 0, 8, 4, 0, *[2**32 - 1] * 3), "beyond any array"),
    "gzip: cut": (gzip.compress(WHOLE)[:-12], "truncated gzip"),
    "gzip: cut in header": (gzip.compress(WHOLE)[:5], "truncated gzip"),
    "gzip: checksum": (gzip.compress(WHOLE)[:-8] + b"\1\2\3\4" + gzip.compress(WHOLE)[-4:], "damaged gzip"),
    "gzip: bytes after it": (gzip.compress(WHOLE) + b"trailing", "damaged gzip"),
    "gzip: bad block": (gzip.compress(WHOLE)[:10] + b"\xff" * 40, "damaged gzip"),
    "gzip: too long inside": (gzip.compress(WHOLE + b"\0"), "more than that follow"),
}


@pytest.mark.parametrize("case", CORRUPTIONS)
def test_corruption_is_named(tmp_path: Path, case: str) -> None:
    """Training on a damaged download would go on in silence, on images shifted by the missing bytes."""
    data, wrong = CORRUPTIONS[case]
    # The name says nothing about the content: a browser may have unpacked what is still called .gz.
    path = tmp_path / "images.gz"
    path.write_bytes(data)
    with pytest.raises(DataError, match=re.escape(str(path)) + ": .*" + wrong):
        read_idx(path)


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "none")) + ": no such file"):
        read_idx(tmp_path / "none")
    with pytest.raises(DataError, match=re.escape(str(tmp_path)) + ": cannot be read"):
        read_idx(tmp_path)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_lying_header_costs_no_memory(tmp_path: Path, pack) -> None:
    """Believing 16 TiB of promised bytes before reading them would kill the process instead of naming the file."""
    path = tmp_path / "liar"
    path.write_bytes(pack(b"\0\0\x08\x03" + struct.pack(">III", 2**20, 2**12, 2**12) + b"few"))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"promises .* raise max_bytes"):
            read_idx(path)
        with pytest.raises(DataError, match="only 3 follow"):
            read_idx(path, max_bytes=2**50)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_part_of_a_folder(tmp_path: Path) -> None:
    folder = write_idx_folder(tmp_path / "idx", train=6, test=3, size=(4, 5))
    images, labels = read_idx_part(folder, "test")
    assert images.shape == (3, 4, 5)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 1, 2]
    assert labels.dtype == torch.int64


PIXELS, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "array", "wrong"),
    [
        (LABELS, np.zeros(5, np.uint8), "holds 5 labels, but .*train-images-idx3-ubyte.gz holds 6 images"),
        (LABELS, np.zeros(6, np.int32), "holds torch.int32 .*expected unsigned bytes"),
        (LABELS, np.zeros(6, np.float32), "holds torch.float32 .*expected unsigned bytes"),
        (LABELS, np.zeros((6, 1), np.uint8), r"shape \(6, 1\); expected unsigned bytes .* in 1 dimensions"),
        (PIXELS, np.zeros((6, 16), np.uint8), r"shape \(6, 16\); expected .* in 3 dimensions"),
        (PIXELS, np.zeros((6, 4, 4), np.int16), "holds torch.int16 .*expected unsigned bytes"),
        (PIXELS, np.zeros((0, 4, 4), np.uint8), r"shape \(0, 4, 4\), which is nothing"),
        (PIXELS, np.zeros((6, 0, 4), np.uint8), r"shape \(6, 0, 4\), which is nothing"),
        (LABELS, np.zeros(0, np.uint8), r"shape \(0\), which is nothing"),
        (PIXELS, None, r"\[.gz\]: no such file; an IDX folder holds"),
        (LABELS, None, r"\[.gz\]: no such file; an IDX folder holds"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, array: np.ndarray | None, wrong: str) -> None:
    """Images and labels swapped, of another kind or unequal in number train a network on nonsense."""
    folder = write_idx_folder(tmp_path / "idx", train=6, test=3, size=(4, 4))
    (folder / name).unlink()
    if array is not None:
        write_idx(folder / name, array)
    with pytest.raises(DataError, match=re.escape(str(folder / name.removesuffix(".gz"))) + ".*" + wrong):
        read_idx_part(folder, "train")
