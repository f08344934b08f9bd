"""Writers that the data tests read back: IDX by struct, independent of the reader, and PNG folders by Pillow."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image

CODES = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(">BBBB", 0, 0, CODES[array.dtype.name], array.ndim) + struct.pack(
        f">{array.ndim}I", *array.shape
    )
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_idx(path: Path, array: np.ndarray) -> Path:
    data = idx_bytes(array)
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


def write_idx_folder(folder: Path, train: int = 24, test: int = 12, size: tuple[int, int] = (10, 10)) -> Path:
    """Random images of three classes in turn, as MNIST's four files: the images gzipped, the labels not."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for stem, count in (("train", train), ("t10k", test)):
        images = random.integers(0, 256, (count, *size), dtype=np.uint8)
        write_idx(folder / f"{stem}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{stem}-labels-idx1-ubyte", (np.arange(count) % 3).astype(np.uint8))
    return folder


def write_png(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def write_image_folder(root: Path, parts: dict[str, int], classes: tuple[str, ...] = ("ant", "bee", "cat")) -> Path:
    """`parts` maps "train", "val" … (or "" for no such level) to images a class; class k is of colour 40·(k + 1)."""
    for part, count in parts.items():
        for k, name in enumerate(classes):
            for i in range(count):
                write_png(root / part / name / f"{i}.png", np.full((12 + i, 16, 3), 40 * (k + 1), np.uint8))
    return root
