"""What `load_images` gives: a training and a test set that agree, and what is to be said of them."""

from __future__ import annotations

from dataclasses import dataclass

from strassen_tile.data.folders import FolderImages
from strassen_tile.data.images import InMemoryImages

ImageDataset = InMemoryImages | FolderImages


@dataclass(frozen=True)
class ImageSplits:
    """A training and a test set that agree on classes, channels and size.

    Both are torch Datasets of {"pixel_values": float32 (channels, image_size, image_size), "labels": int64 ()}.
    Labels are 0..num_classes − 1 and index `class_names`. `name` is "digits" or the folder's. `stored_size` is the shorter
    side of the images as they are stored, in pixels; where it varies, the median over a sample.
    """

    train: ImageDataset
    test: ImageDataset
    name: str
    num_classes: int
    class_names: tuple[str, ...]
    channels: int
    image_size: int
    stored_size: int

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
