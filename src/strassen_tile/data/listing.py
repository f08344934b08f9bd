"""Which images a folder holds, of which classes, and which of them are held out; nothing is opened."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from strassen_tile.data.images import stratified_split
from strassen_tile.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
LAYOUTS = (
    "holds train-images-idx3-ubyte[.gz] and the other three IDX files, or train/<class>/<image> with val/ or test/, "
    "or <class>/<image>"
)
_FOLDER_PARTS = 5

Files = tuple[list[str], Tensor]


def list_parts(folder: Path) -> tuple[Files, Files, tuple[str, ...]]:
    """Files and labels to train on, files and labels held out, and the classes; nothing is decoded."""
    inside = subfolders(folder)
    held_name = next((name for name in ("val", "test") if name in inside), None)
    if "train" in inside:
        if held_name is None:
            raise DataError(f"{folder}: has train/ but neither val/ nor test/; expected one of them beside it")
        train, held = list_classes(folder / "train"), list_classes(folder / held_name)
        if train.keys() != held.keys():
            raise DataError(
                f"{folder / held_name}: its classes differ from those of {folder / 'train'}: "
                f"missing {_some(train.keys() - held.keys())}, unexpected {_some(held.keys() - train.keys())}"
            )
        return _flat(train), _flat(held), tuple(train)
    if held_name is not None and subfolders(folder / held_name):
        raise DataError(f"{folder}: has {held_name}/ with class folders in it but no train/; expected train/ beside it")
    if not inside:
        raise DataError(f"{folder}: holds neither IDX files nor class folders; expected a folder that {LAYOUTS}")
    classes = list_classes(folder)
    for name, files in classes.items():
        if len(files) < 2:
            raise DataError(f"{folder / name}: holds one image; expected two or more, to train and to test on")
    paths, labels = _flat(classes)
    train_index, test_index = stratified_split(labels, _FOLDER_PARTS)
    return (
        ([paths[i] for i in train_index.tolist()], labels[train_index]),
        ([paths[i] for i in test_index.tolist()], labels[test_index]),
        tuple(classes),
    )


def _flat(classes: dict[str, list[str]]) -> Files:
    """Files in order of class, and the number of its class for each."""
    counts = torch.tensor([len(files) for files in classes.values()])
    return [path for files in classes.values() for path in files], torch.arange(len(classes)).repeat_interleave(counts)


def _some(names: set[str]) -> str:
    """Up to five names, and how many more."""
    shown = ", ".join(sorted(names)[:5]) or "none"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def list_classes(folder: Path) -> dict[str, list[str]]:
    """Class name to image files, both sorted, for folder/<class>/**; names that start with a dot are passed over.

    Raises:
        DataError: there is no class folder, one of them holds no image, or one cannot be read.
    """
    classes = {name: _list_images(folder / name) for name in subfolders(folder)}
    if not classes:
        raise DataError(f"{folder}: holds no class folders; expected {folder}/<class>/<image>")
    return classes


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted, without those that start with a dot."""
    try:
        return sorted(one.name for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror or error}); expected a folder") from error


def _list_images(folder: Path) -> list[str]:
    def fail(error: OSError) -> None:
        # os.walk passes over what it cannot list unless told otherwise, and classes would lose images in silence.
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); expected images") from error

    files = []
    for parent, inside, names in os.walk(folder, onerror=fail):
        if odd := next((name for name in inside if name.lower().endswith(SUFFIXES)), None):
            raise DataError(f"{parent}{os.sep}{odd}: is a folder; expected an image")
        files += [
            os.path.join(parent, name)  # noqa: PTH118  a million Path objects are slow
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    if not files:
        raise DataError(f"{folder}: class folder without images; expected files ending in {' '.join(SUFFIXES)}")
    return sorted(files)
