"""`load_images`: one name or path in, a training and a test set out, whichever way the images are stored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from strassen_tile.data import folders, idx
from strassen_tile.data.folders import FolderImages, Source, folder_statistics, stored_size
from strassen_tile.data.hub import PREFIX, load_rows
from strassen_tile.data.idx import idx_paths, is_idx_folder, need, read_idx_part
from strassen_tile.data.images import (
    InMemoryImages,
    balanced_subset,
    byte_histogram,
    channel_statistics,
    resize,
    stratified_split,
)
from strassen_tile.data.listing import LAYOUTS, list_parts
from strassen_tile.data.splits import ImageSplits
from strassen_tile.errors import ConfigError, DataError
from strassen_tile.files import too_large
from strassen_tile.tiling import as_integer

_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_LARGEST_FOLDER_SIZE = 224
_LARGEST_SIDE = 1 << 12
_DIGITS_PARTS = 3


@dataclass(frozen=True)
class _Options:
    """What `load_images` was asked for, besides the source."""

    image_size: int | None
    limit: int | None
    seed: int
    augment: bool
    max_bytes: int | None

    def kept(self, labels: Tensor) -> Tensor:
        """Indices of the training samples that `limit` leaves."""
        return torch.arange(len(labels)) if self.limit is None else balanced_subset(labels, self.limit, self.seed)


def load_images(
    source: str | os.PathLike[str] = "digits",
    *,
    image_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    augment: bool = True,
    max_bytes: int | None = None,
) -> ImageSplits:
    """Images to train and test on.

    Args:
        source: one of

            - "digits": scikit-learn's 1797 digits of 8×8, a third of each class held out (always the same third);
            - an IDX folder, as MNIST and Fashion-MNIST ship: {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz];
            - an image folder, root/train/<class>/… with root/val (or, without that, root/test), or root/<class>/… of
              which a fifth of each class is held out (always the same fifth). Decoded when fetched; three channels;
            - "hub:NAME", a data set of images and classes that the library `datasets` loads by that name, from Hugging
              Face's hub (hub:imagenet-1k) or from a folder of its files (hub:./folder), and keeps on disk. As an image
              folder otherwise; of what it holds besides "train", "validation" (or "val", or "test") is tested on.

            A folder that is itself called digits is "./digits".
        image_size: side in pixels. None: as stored for digits and IDX; for image folders the shorter side of the images,
            but at most 224: the median over up to 256 of them. Digits and IDX images are resized once, in memory
            (bilinear, antialiased); folders when read (bicubic).
        limit: train on this many only, as evenly over the classes as they allow. None or more than there are: all.
        seed: which ones `limit` keeps. It changes neither the split nor the augmentation.
        augment: augment the training set, from torch's global RNG. Digits and IDX: shifts by up to
            max(1, image_size // 8) pixels; folders: random resized crops. Horizontal flips for image folders and for
            IDX folders called *fashion*: digits do not survive them. The test set is never augmented.
        max_bytes: the most that one file may take, unpacked and decoded, checked before it is. None: 768 MiB for an IDX
            file and for digits and IDX images once they are resized, 256 MiB for decoding an image.

    Returns:
        The splits. Pixels are normalised by the mean and standard deviation, in each channel, of the training samples
        that are kept, for image folders estimated on up to 256 of them.

    Raises:
        DataError: the source is unknown, or a file is missing, malformed or too large; the message names it.
        ConfigError: `image_size`, `limit` or `seed` is no integer, or out of range.
        ImportError: scikit-learn, Pillow, numpy or datasets is needed and missing; the message names the extra.
    """
    for name, value, most in (("image_size", image_size, _LARGEST_SIDE), ("limit", limit, 2**63 - 1)):
        if value is not None and not 1 <= (as_integer(value) or 0) <= most:
            raise ConfigError(f"{name}={value!r}; expected None or a whole number, at least 1 and at most {most}")
    if (integer := as_integer(seed)) is None or not 0 <= integer < 2**63:
        raise ConfigError(f"seed={seed!r}; expected an integer from 0 to 2^63 - 1")
    options = _Options(as_integer(image_size), as_integer(limit), integer, augment, max_bytes)
    if isinstance(source, str) and source == "digits":
        return _digits(options)
    if isinstance(source, str) and source.startswith(PREFIX):
        name = source.removeprefix(PREFIX)
        return _lazy(*load_rows(name), name.rstrip("/").rpartition("/")[2], options)
    try:
        folder = Path(source).expanduser()
        # An empty string is the current folder to Path, and a mistake to everybody else.
        given = (
            "" if os.fspath(source) and folder.is_dir() else "is not a folder" if folder.exists() else "does not exist"
        )
    except (OSError, RuntimeError) as error:  # a name too long, a home that nobody has
        given = f"cannot be looked up ({getattr(error, 'strerror', None) or error})"
    if given:
        raise DataError(f"source {os.fspath(source)!r} {given}; expected 'digits' or a path to a folder that {LAYOUTS}")
    return _idx_folder(folder, options) if is_idx_folder(folder) else _image_folder(folder, options)


def _digits(options: _Options) -> ImageSplits:
    bunch = need("sklearn.datasets").load_digits()
    # Stored as 0..16; rounded, not truncated, so that 16 is 255 and steps are even.
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    train, test = stratified_split(labels, _DIGITS_PARTS)
    names = tuple(str(digit) for digit in range(10))
    return _in_memory(
        (images[train], labels[train]), (images[test], labels[test]), "digits", names, options, flip=False
    )


def _idx_folder(folder: Path, options: _Options) -> ImageSplits:
    most = idx.MAX_BYTES if options.max_bytes is None else options.max_bytes
    train, test = (read_idx_part(folder, part, max_bytes=most) for part in ("train", "test"))
    (train_path, _), (test_path, test_label_path) = idx_paths(folder, "train"), idx_paths(folder, "test")
    height, width = train[0].shape[1:]
    if test[0].shape[1:] != train[0].shape[1:]:
        given = "×".join(map(str, test[0].shape[1:]))
        raise DataError(f"{test_path}: images are {given}; expected {height}×{width} as in {train_path}")
    if height != width and options.image_size is None:
        raise DataError(f"{train_path}: images are {height}×{width}, not square; pass image_size to have them resized")
    unknown = sorted(set(test[1].unique().tolist()) - set(train[1].unique().tolist()))
    if unknown:
        raise DataError(f"{test_label_path}: holds labels {unknown}; expected only labels that the training set has")
    names = tuple(str(label) for label in range(int(train[1].max()) + 1))
    name = _name(folder)
    fashion = "fashion" in name.lower()
    if fashion and len(names) == len(_FASHION):
        names = _FASHION
    return _in_memory(train, test, name, names, options, flip=fashion)


def _name(folder: Path) -> str:
    """The folder's name as given, a link's own name included; "." and ".." have none and are looked up."""
    name = folder.absolute().name
    return folder.resolve().name if name in ("", "..") else name


def _in_memory(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    name: str,
    class_names: tuple[str, ...],
    options: _Options,
    *,
    flip: bool,
) -> ImageSplits:
    """Splits from grey images uint8 (n, H, W) with labels int64 (n,)."""
    size = options.image_size or train[0].shape[-1]
    kept = options.kept(train[1])
    most = idx.MAX_BYTES if options.max_bytes is None else options.max_bytes
    images, sides = len(kept) + len(test[0]), (size, size)
    if train[0].shape[1:] != sides and (resized := images * size * size) > most:
        raise DataError(
            f"{name}: {images} images of image_size={size} are kept in memory, which {too_large(resized, most)}"
        )
    # The limit first: what is not trained on need not be resized.
    pixels, held = resize(train[0][kept, None], size), resize(test[0][:, None], size)
    mean, std = channel_statistics(byte_histogram(pixels))
    shift = max(1, size // 8) if options.augment else 0
    return ImageSplits(
        train=InMemoryImages(
            pixels, train[1][kept], mean=mean, std=std, max_shift=shift, flip=flip and options.augment
        ),
        test=InMemoryImages(held, test[1], mean=mean, std=std),
        name=name,
        num_classes=len(class_names),
        class_names=class_names,
        channels=1,
        image_size=size,
        stored_size=min(train[0].shape[1:]),
    )


def _image_folder(folder: Path, options: _Options) -> ImageSplits:
    train, test, names = list_parts(folder)
    if len(names) < 2:
        raise DataError(f"{folder}: holds one class only ({names[0]}); expected a folder for each of several classes")
    return _lazy(train, test, names, _name(folder), options)


def _lazy(
    train: tuple[Sequence[Source], Tensor],
    test: tuple[Sequence[Source], Tensor],
    names: tuple[str, ...],
    name: str,
    options: _Options,
) -> ImageSplits:
    """Splits of images, with labels int64 (n,), that are decoded when they are fetched."""
    kept = options.kept(train[1])
    paths = [train[0][i] for i in kept.tolist()]
    most = folders.MAX_BYTES if options.max_bytes is None else options.max_bytes
    stored = stored_size(paths, max_bytes=most)
    size = options.image_size or min(stored, _LARGEST_FOLDER_SIZE)
    mean, std = folder_statistics(paths, size, max_bytes=most)
    made = partial(FolderImages, image_size=size, mean=mean, std=std, max_bytes=most)
    return ImageSplits(
        train=made(paths, train[1][kept], augment=options.augment),
        test=made(test[0], test[1], augment=False),
        name=name,
        num_classes=len(names),
        class_names=names,
        channels=3,
        image_size=size,
        stored_size=stored,
    )
