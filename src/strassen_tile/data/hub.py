"""Images of a data set that the library `datasets` loads: rows of Arrow files on disk, each opened when it is wanted.

From Hugging Face's hub by name, or from a folder of a data set's files. Nothing of what is loaded is run: data sets with
a script of their own are refused by the library.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from strassen_tile.data.folders import Source
from strassen_tile.data.idx import need
from strassen_tile.errors import DataError
from strassen_tile.files import opened, too_large

PREFIX = "hub:"
_HELD_OUT = ("validation", "val", "test")  # ImageNet's "test" has no labels: it comes last
_FULL_NAMES = {"imagenet-1k": "ILSVRC/imagenet-1k"}


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of one split, of which the images are not decoded, and the column that has them."""

    name: str
    rows: Any
    column: str


@dataclass(frozen=True, slots=True)
class HubImage:
    """An image of a split, by its row."""

    part: _Part
    row: int

    def __str__(self) -> str:
        return f"{self.part.name}, image {self.row}"

    @contextlib.contextmanager
    def opened(self, max_bytes: int) -> Iterator[BinaryIO]:
        """Its encoded bytes, to be read.

        Raises:
            OSError: they are neither in the row nor in the file it names, or more than `max_bytes`.
        """
        image = self.part.rows[self.row][self.part.column] or {}
        data, path = image.get("bytes"), image.get("path")
        if data is None:
            if path is None:
                raise OSError("the row has no image")
            with opened(path, max_bytes) as file:
                yield file
        elif len(data) > max_bytes:
            raise OSError(f"it {too_large(len(data), max_bytes)}")
        else:
            yield io.BytesIO(data)


Rows = tuple[list[Source], Tensor]


def load_rows(name: str) -> tuple[Rows, Rows, tuple[str, ...]]:
    """Images and labels to train on, images and labels held out, and the names of the classes.

    Args:
        name: on the hub, or the path of a folder with a data set's files (parquet and others, images by class).

    Raises:
        DataError: it cannot be loaded (the message says how to get at it), or is no data set of images and classes.
        ImportError: `datasets` is not installed.
    """
    datasets = need("datasets", "a data set of the hub", "imagenet")
    full = str(Path(name).expanduser()) if name.startswith(("~", ".", "/")) else _FULL_NAMES.get(name, name)
    try:
        found = datasets.load_dataset(full)
    except Exception as error:  # of the library, of its HTTP client, of the file system
        said = " ".join(str(error).split())[:300]
        raise DataError(
            f"{PREFIX}{name}: cannot be loaded ({type(error).__name__}: {said}). Is the name right, its licence accepted "
            f"on huggingface.co/datasets/{full}, `hf auth login` done and the hub within reach? A copy on disk is "
            f"{PREFIX}./folder, or as train/<class>/<image> and val/, the folder itself"
        ) from error
    held_out = next((part for part in _HELD_OUT if part in found), None)
    if "train" not in found or held_out is None:
        raise DataError(
            f"{PREFIX}{name}: has {', '.join(found) or 'nothing'}; expected train, and one of {', '.join(_HELD_OUT)}"
        )
    classes: list[tuple[str, ...]] = []
    train, test = (_rows(datasets, found[part], f"{PREFIX}{name} {part}", classes) for part in ("train", held_out))
    if classes[0] != classes[1]:
        raise DataError(
            f"{PREFIX}{name}: {held_out} has other classes than train; expected the same, in the same order"
        )
    return train, test, classes[0]


def _rows(datasets: Any, rows: Any, name: str, classes: list[tuple[str, ...]]) -> Rows:
    """Images and labels of a split; the names of its classes are added to `classes`."""
    image, label = (
        next((key for key, one in rows.features.items() if isinstance(one, kind)), None)
        for kind in (datasets.Image, datasets.ClassLabel)
    )
    if image is None or label is None:
        there = ", ".join(f"{key} ({type(one).__name__})" for key, one in rows.features.items())
        raise DataError(f"{name}: has the columns {there}; expected one of images and one of classes (ClassLabel)")
    names = tuple(rows.features[label].names)
    labels = torch.tensor([-1 if value is None else value for value in rows.data.column(label).to_pylist()])
    if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= len(names):
        raise DataError(f"{name}: has no rows, or rows without a label; expected labels from 0 to {len(names) - 1}")
    classes.append(names)
    # Else every row would be decoded by the library, without our limits.
    part = _Part(name, rows.cast_column(image, datasets.Image(decode=False)), image)
    return [HubImage(part, row) for row in range(len(labels))], labels
