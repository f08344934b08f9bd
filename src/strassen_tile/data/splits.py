"""What `load_images` gives: a training and a test set that agree, and what is to be said of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch

from strassen_tile.data.folders import FolderImages
from strassen_tile.data.images import InMemoryImages, balanced_subset
from strassen_tile.errors import ConfigError

ImageDataset = InMemoryImages | FolderImages


@dataclass(frozen=True)
class ImageSplits:
    """A training and a test set that agree on classes, channels and size.

    Both are torch Datasets of {"pixel_values": float32 (channels, image_size, image_size), "labels": int64 ()}.
    Labels are 0..num_classes − 1 and index `class_names`. `name` is "digits" or the folder's. `stored_size` is the shorter
    side of the images as they are stored, in pixels; where it varies, the median over a sample. `validation`, where
    `hold_out` made one, is of the same kind: held out of the training set, and never augmented.
    """

    train: ImageDataset
    test: ImageDataset
    name: str
    num_classes: int
    class_names: tuple[str, ...]
    channels: int
    image_size: int
    stored_size: int
    validation: ImageDataset | None = None

    @property
    def lazy(self) -> bool:
        """Whether images are read from files of their own as they are fetched."""
        return isinstance(self.train, FolderImages)

    @property
    def chance(self) -> float:
        """The part of the test set that is of its largest class: the top-1 of naming that class always."""
        return float(self.test.labels.bincount().max()) / len(self.test)

    @property
    def preparation(self) -> str:
        """What is done to images before a model sees them, as half a sentence."""
        train = self.train
        if isinstance(train, FolderImages):
            changed = "random crops, scaled, and flips in training" if train.augment else "the same in training"
            return f"the central 7/8 of the shorter side, scaled, in tests; {changed}"
        flips = " and flips" if train.flip else ""
        return f"shifts by up to {train.max_shift} pixels{flips} in training" if train.max_shift else "no augmentation"


def hold_out(splits: ImageSplits, images: int, *, seed: int = 0) -> ImageSplits:
    """The splits with `images` of the training set held out for validation, as evenly over the classes as they allow.

    Which ones depends on the seed alone, not on that of a run: every method and every run has the same. Mean and
    standard deviation of the pixels stay those of the whole training set.

    Raises:
        ConfigError: not at least one image, or none would be left of the training set.
    """
    train = splits.train
    if not 1 <= images < len(train):
        raise ConfigError(
            f"validation={images} must be from 1 to {len(train) - 1}: there are {len(train)} training images"
        )
    held = torch.zeros(len(train), dtype=torch.bool)
    held[balanced_subset(train.labels, images, seed)] = True
    return replace(splits, train=_part(train, ~held), validation=_plain(_part(train, held)))


def _part(data: ImageDataset, kept: torch.Tensor) -> ImageDataset:
    """The samples that `kept`, bool (n,), marks."""
    part = copy.copy(data)
    part.labels = data.labels[kept]
    if isinstance(part, FolderImages):
        part.paths = [path for path, keep in zip(part.paths, kept.tolist(), strict=True) if keep]
    else:
        part.images = part.images[kept]
    return part


def _plain(data: ImageDataset) -> ImageDataset:
    """The same samples without augmentation."""
    plain = copy.copy(data)
    if isinstance(plain, FolderImages):
        plain.augment = False
    else:
        plain.max_shift, plain.flip = 0, False
    return plain
