"""A file from outside may be a pipe, lie about its size, or unpack to a thousand times it: said before it costs anything."""

from __future__ import annotations

import gzip
import io
import os
import socket
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from strassen_tile import Basis, STLConfig, bases
from strassen_tile.data import load_images
from strassen_tile.data.folders import read_pixels
from strassen_tile.data.idx import read_idx, read_idx_part
from strassen_tile.errors import BasisError, ConfigError, DataError, STLError
from strassen_tile.models import load_checkpoint

MIB = 1 << 20
READERS: dict[str, Callable[..., object]] = {
    "basis": Basis.load,
    "bases": bases.load,
    "npz": bases.load,
    "idx": read_idx,
    "config": STLConfig.load,
    "png": lambda path, **limit: read_pixels(str(path), 8, augment=False, **limit),
}


def peak(run: Callable[[], object]) -> int:
    """Bytes that Python and numpy hold at most while `run` runs."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(read: Callable[..., object], path: Path, said: str) -> Callable[[], object]:
    def run() -> None:
        with pytest.raises(STLError, match=said) as raised:
            read(path)
        assert str(path) in str(raised.value)

    return run


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "link to a pipe"])
@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_without_waiting(name: str, kind: str, tmp_path: Path, monkeypatch) -> None:
    """A pipe among a million images: training stands still for ever, and nothing says why."""
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = Path(f"z.{'npz' if name == 'npz' else 'png'}")
    made = None
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        made = socket.socket(socket.AF_UNIX)
        made.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo("pipe")
        path.symlink_to("pipe")
    refused(READERS[name], path, "it is a (pipe, a socket or a device|folder)")()
    if made is not None:
        made.close()


@pytest.mark.parametrize("name", READERS)
def test_a_file_beyond_the_limit_is_not_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{'npz' if name == 'npz' else 'json'}"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert peak(refused(READERS[name], path, r"more than the limit of .* raise max_bytes")) < MIB
    for limit in (0, -1, 1.5, True, None):
        with pytest.raises(ConfigError, match="max_bytes must be a positive integer"):
            READERS[name](path, max_bytes=limit)


def npz(path: Path, data: bytes, *, method: int = zipfile.ZIP_DEFLATED, name: str = "1,1,1.npy") -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, data)
    return path


def npy(shape: tuple[int, ...], descr: str = "<f8", data: bytes = b"") -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    return header.getvalue() + data


def test_an_npz_is_measured_before_it_is_unpacked(tmp_path: Path) -> None:
    """3 KB that unpack to 3 million terms took 1.8 GiB and 20 s; 583 KB of zeros 4.5 GiB."""
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **{"1,1,1": np.zeros((3_000_000, 1, 1), np.int8)})
    assert path.stat().st_size < 5000
    assert peak(refused(bases.load, path, "22.9 MiB, more than the limit of 16 MiB")) < 8 * MIB
    np.savez_compressed(path, **{"1,1,1": np.zeros((3, 1, 10_000_000), np.float32)})
    assert peak(refused(bases.load, path, "unpacked it takes 114 MiB")) < MIB
    with pytest.raises(BasisError, match="relative squared error"):  # with leave it is read, and is no algorithm
        np.savez_compressed(path, **{"1,1,1": np.zeros((3, 1, 2), np.int8)})
        bases.load(path, max_bytes=1000)


LIES = {
    "2.4 TB": (npy((3, 10**9, 100)), "coefficients takes"),
    "beyond integers": (npy((3, 10**30, 0)), "cannot read"),
    "more than there is": (npy((3, 1, 9)), "not that many bytes follow"),
    "less than there is": (npy((3, 1, 1), data=bytes(25)), "not that many bytes follow"),
    "records": (npy((3,), "<f8,<f8"), "cannot read"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", LIES)
def test_an_array_header_may_lie(case: str, tmp_path: Path) -> None:
    data, said = LIES[case]
    assert peak(refused(bases.load, npz(tmp_path / "a.npz", data), said)) < MIB


def test_an_archive_may_lie_about_its_entries(tmp_path: Path) -> None:
    """zipfile unpacks all of an entry, whatever its stated size, if it is asked for all at once; and bz2 knows no halt."""
    path = npz(tmp_path / "a.npz", npy((3, 1, 1), data=bytes(64 * MIB)))
    honest = path.read_bytes()
    size = struct.pack("<L", 64 * MIB + 128)
    assert honest.count(size) == 2  # in the entry and in the archive's list
    path.write_bytes(honest.replace(size, struct.pack("<L", 152)))
    assert peak(refused(bases.load, path, "cannot read")) < 8 * MIB
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        refused(bases.load, npz(path, bytes(100), method=method), "compressed in another way")()


def test_a_basis_of_too_many_numbers_is_refused(tmp_path: Path) -> None:
    """A few MB of digits are gigabytes of products between all pairs of terms."""
    path = tmp_path / "a.json"
    ones = "[" + ",".join(["[[1]]"] * 20_000) + "]"
    path.write_text(f'{{"encoder": {ones}, "weight_encoder": {ones}, "decoder": {ones}}}')
    assert path.stat().st_size < 400_000
    for read in (Basis.load, bases.load):
        refused(partial(read, max_bytes=400_000), path, "60000 coefficients takes 469 KiB")()
    path.write_text('{"n": [10000, 1, 10000], "m": 1, "u": [], "v": [], "w": []}')
    refused(bases.load, path, "100020000 coefficients takes")()
    bases.strassen(2).save(path)
    assert Basis.load(path, max_bytes=8 * 49 * 48).is_exact
    with pytest.raises(BasisError, match="max_bytes"):
        Basis.load(path, max_bytes=8 * 49 * 48 - 1)


def test_too_few_products_are_known_without_looking_at_them(monkeypatch) -> None:
    """Terms that cancel leave noise for an error, below 0 half of the time; the residual itself is 2^36 numbers here."""
    monkeypatch.setattr("strassen_tile.algebra.product", lambda *_: pytest.fail("the residual was worked out"))
    for _ in range(20):
        e, f, d = (1e6 * torch.randn(1, 64, 64, dtype=torch.float64) for _ in range(3))
        basis = Basis(torch.cat([e, 3 * e]), torch.cat([f, f / 7]), torch.cat([d, -d * 7 / 3]))
        assert basis.error >= 1 - 2 / 64**2


def idx(*sizes: int) -> bytes:
    return bytes([0, 0, 8, len(sizes)]) + b"".join(size.to_bytes(4, "big") for size in sizes)


def test_idx_is_measured_before_it_is_unpacked(tmp_path: Path) -> None:
    """A megabyte of gzip became a gigabyte of zeros."""
    path = tmp_path / "i.gz"
    zeros = zlib.compressobj(9, zlib.DEFLATED, 31)
    packed = zeros.compress(idx(1_000_000_000))
    packed += b"".join(zeros.compress(bytes(MIB)) for _ in range(32)) + zeros.flush()
    path.write_bytes(packed)
    assert peak(refused(read_idx, path, "954 MiB, more than the limit of 768 MiB")) < 8 * MIB
    path.write_bytes(gzip.compress(idx(1000) + bytes(1000)))
    assert len(read_idx(path, max_bytes=1000)) == 1000
    with pytest.raises(DataError, match="raise max_bytes"):
        read_idx(path, max_bytes=999)


def test_a_label_counts_as_what_it_becomes(tmp_path: Path) -> None:
    for stem, sizes in (("images-idx3", (1000, 1, 1)), ("labels-idx1", (1000,))):
        (tmp_path / f"train-{stem}-ubyte").write_bytes(idx(*sizes) + bytes(1000))
    assert len(read_idx_part(tmp_path, "train", max_bytes=8 * 1008)[1]) == 1000
    with pytest.raises(DataError, match=r"labels-idx1-ubyte.*raise max_bytes"):
        read_idx_part(tmp_path, "train", max_bytes=8 * 1007)


def png(path: Path, side: int) -> Path:
    """A black square, one bit a pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1 + -(-side // 8)) * side, 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return path


def test_an_image_is_measured_before_it_is_decoded(tmp_path: Path, recwarn) -> None:
    """A PNG of 172 KB took 845 MiB."""
    path = png(tmp_path / "a.png", 9000)
    with pytest.raises(DataError, match=r"a\.png: decoded, it takes 618 MiB, more than the limit of 256 MiB"):
        read_pixels(str(path), 8, augment=False)
    png(path, 100)
    assert read_pixels(str(path), 8, augment=False, max_bytes=80_000).shape == (3, 8, 8)
    with pytest.raises(DataError, match="raise max_bytes"):
        read_pixels(str(path), 8, augment=True, max_bytes=79_999)
    png(path, 20_000)
    with pytest.raises(DataError, match=r"too large for Pillow .* raise PIL\.Image\.MAX_IMAGE_PIXELS"):
        read_pixels(str(path), 8, augment=False, max_bytes=1 << 40)


DECODE = """
import pathlib, re, sys
from PIL import Image
from strassen_tile.data.folders import read_pixels
Image.init()
Image.new("RGB", (64, 64)).save(sys.argv[2], format=sys.argv[3], **eval(sys.argv[4]))
read_pixels(sys.argv[2], 8, augment=False)
def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) << 10
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = memory("VmRSS")
read_pixels(sys.argv[1], 8, augment=False, max_bytes=1 << 40)
print(memory("VmHWM") - before)
"""
KINDS = {
    "rgb.png": ("PNG", "RGB", {}),
    "rgba.png": ("PNG", "RGBA", {}),
    "palette.gif": ("GIF", "P", {}),
    "progressive.jpg": ("JPEG", "CMYK", {"progressive": True, "subsampling": 0}),
    "lossy.webp": ("WEBP", "RGB", {"method": 0}),
    "lossless.webp": ("WEBP", "RGBA", {"method": 0, "lossless": True, "quality": 0}),
    "strip.tif": ("TIFF", "RGBA", {"compression": "tiff_lzw", "tiffinfo": {278: 2000}}),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    "name",
    [name if name in ("rgb.png", "progressive.jpg") else pytest.param(name, marks=pytest.mark.slow) for name in KINDS],
)
def test_decoding_takes_no_more_than_was_said(name: str, tmp_path: Path) -> None:
    """A WEBP of 114 KB took 979 MiB under a limit of 256 MiB."""
    kind, mode, options = KINDS[name]
    side, path = 2000, tmp_path / name
    noise = Image.effect_noise((side // 8, side // 8), 50).resize((side, side)).convert("RGB").convert(mode)
    noise.save(path, format=kind, **options)
    with pytest.raises(DataError, match=r"decoded, it takes .* raise max_bytes") as raised:
        read_pixels(str(path), 8, augment=False, max_bytes=path.stat().st_size)
    said = float(str(raised.value).split("it takes ")[1].split(" MiB")[0]) * MIB
    arguments = [str(path), str(tmp_path / "small"), kind, repr(options)]
    ran = subprocess.run([sys.executable, "-c", DECODE, *arguments], capture_output=True, text=True, check=True)
    assert 0.25 * said < int(ran.stdout) < said + 4 * MIB


def test_only_formats_that_the_names_promise_are_decoded(tmp_path: Path) -> None:
    """PostScript called .png is a program, which Pillow would hand to Ghostscript."""
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path, format="EPS")
    assert Image.open(path).format == "EPS"
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded: it is none of PNG, JPEG"):
        read_pixels(str(path), 8, augment=False)


def image_folder(root: Path) -> Path:
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for index in range(3):
            png(root / name / f"{index}.png", 16)
    return root


def test_load_images_passes_the_limit_on(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    splits = load_images(folder, image_size=8, max_bytes=2048)
    assert splits.train[0]["pixel_values"].shape == splits.test[0]["pixel_values"].shape == (3, 8, 8)
    png(folder / "ant" / "0.png", 17)
    with pytest.raises(DataError, match=r"0\.png: decoded, it takes"):
        splits = load_images(folder, image_size=8, max_bytes=2048)
        [part[index] for part in (splits.train, splits.test) for index in range(len(part))]
    files = tmp_path / "idx"
    files.mkdir()
    for stem in ("train", "t10k"):
        (files / f"{stem}-images-idx3-ubyte").write_bytes(idx(2, 4, 4) + bytes(32))
        (files / f"{stem}-labels-idx1-ubyte").write_bytes(idx(2) + bytes([0, 1]))
    assert len(load_images(files, max_bytes=80).train) == 2
    with pytest.raises(DataError, match="raise max_bytes"):
        load_images(files, max_bytes=31)


def test_what_images_are_resized_to_is_measured_before_they_are(tmp_path: Path) -> None:
    """1024 images of 28 × 28 at 4096 asked for 16 GiB."""
    for stem in ("train", "t10k"):
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(idx(3, 4, 4) + bytes(48))
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(idx(3) + bytes([0, 1, 1]))
    assert load_images(tmp_path, image_size=16, max_bytes=6 * 256).image_size == 16
    assert load_images(tmp_path, image_size=16, limit=1, max_bytes=4 * 256).image_size == 16
    for limit, most in ((None, 6 * 256 - 1), (1, 4 * 256 - 1)):
        with pytest.raises(DataError, match=r"image_size=16 .* raise max_bytes"):
            load_images(tmp_path, image_size=16, limit=limit, max_bytes=most)
    assert len(load_images(tmp_path, max_bytes=95).train) == 3  # as stored
    with pytest.raises(DataError, match=r"1797 images of image_size=4096 .* 28\.1 GiB, more than the limit of 768 MiB"):
        load_images("digits", image_size=4096)


@pytest.mark.parametrize("name", [*READERS, "checkpoint"])
def test_what_cannot_be_a_path_is_said(name: str, tmp_path: Path) -> None:
    read = READERS.get(name, lambda path: load_checkpoint(torch.nn.Linear(1, 1), path))
    if name != "png":  # whose paths come from a listing
        for given in (None, 3, b"a", ["a"]):
            with pytest.raises(ConfigError, match="path must be a str"):
                read(given)
    for given in ("x" * 5000, "a\0b", tmp_path / "a\0b"):
        with pytest.raises(STLError, match=r"NUL|null|name too long|x00b.: no such"):
            read(given)


def test_a_folder_named_like_an_image_is_not_passed_over(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    (folder / "ant" / "dir.png").mkdir()
    with pytest.raises(DataError, match=r"dir\.png: is a folder; expected an image"):
        load_images(folder)
