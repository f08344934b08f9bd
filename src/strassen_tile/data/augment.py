"""Heavier augmentation of training images, from timm and torchvision: RandAugment, random erasing, mixup and cutmix.

As all augmentation here it draws from torch's global generator and from nothing else. In order: crop or shift and flip
(the data set's own), RandAugment on the bytes, normalisation, erasing, and last, over the images of a batch (those that
one process trains on), mixup or cutmix.

Sources: RandAugment, Cubuk et al. 2019 (arXiv 1909.13719); random erasing, Zhong et al. 2017 (1708.04896), filled with
noise a pixel; mixup, Zhang et al. 2017 (1710.09412); cutmix, Yun et al. 2019 (1905.04899). Where both are wanted, each
batch has one of them, either with probability 1/2, and one share for all of its images.
"""

from __future__ import annotations

import contextlib
import copy
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from strassen_tile.data.idx import need
from strassen_tile.data.images import Sample, collate
from strassen_tile.data.splits import ImageDataset
from strassen_tile.errors import ConfigError

_CONFIG = re.compile(r"rand(-(m\d+|n\d+|p\d*\.?\d+|mstd\d*\.?\d+|mmax\d+|inc[01]))*")


class Augmentation(Protocol):
    """What `augmented` is told; None and 0 for nothing. `ImageTraining` has these fields."""

    @property
    def randaugment(self) -> str | None: ...

    @property
    def erasing(self) -> float: ...

    @property
    def mixup(self) -> float: ...

    @property
    def cutmix(self) -> float: ...


def augmented(data: ImageDataset, how: Augmentation, num_classes: int) -> Dataset[Sample]:
    """`data` with more augmentation; itself where `how` asks for none.

    Args:
        data: training images, (C, H, W) each. It is not changed.
        how: `randaugment`, timm's configuration string ("rand-m9-mstd0.5-inc1"); `erasing`, the probability that part of
            an image is erased; `mixup` and `cutmix`, the α of the Beta(α, α) that shares are drawn from.
        num_classes: of the labels. With mixup or cutmix, labels are shares of the classes, float32 (num_classes,).

    Raises:
        ConfigError: `randaugment` is no such configuration.
        ImportError: timm or torchvision is needed and missing; the message names the extra.
    """
    if how.randaugment is not None:
        data = copy.copy(data)
        data.change = _RandAugment(how.randaugment, data.mean, _side(data))
    if not (how.erasing or how.mixup or how.cutmix):
        return data
    return _Augmented(data, how, num_classes)


def augmentation_text(how: Augmentation) -> str:
    """What `augmented` adds, as half a sentence that begins with a comma; "" where that is nothing."""
    parts = {
        f"RandAugment {how.randaugment}": how.randaugment,
        f"random erasing {how.erasing:g}": how.erasing,
        f"mixup {how.mixup:g}": how.mixup,
        f"cutmix {how.cutmix:g}": how.cutmix,
    }
    return "".join(f", {text}" for text, wanted in parts.items() if wanted)


class _Augmented(Dataset[Sample]):
    """Images erased in part, and batches mixed, as they are fetched."""

    def __init__(self, data: ImageDataset, how: Augmentation, num_classes: int) -> None:
        self.data = data
        v2 = _needed("torchvision.transforms.v2")
        self.erase = v2.RandomErasing(p=how.erasing, value="random") if how.erasing else None
        mixes = [
            kind(alpha=alpha, num_classes=num_classes)
            for kind, alpha in ((v2.MixUp, how.mixup), (v2.CutMix, how.cutmix))
            if alpha
        ]
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of a batch, made together."""
        fetch: Callable[[Sequence[int]], list[Sample]] | None = getattr(self.data, "__getitems__", None)
        batch = collate([self.data[index] for index in indices] if fetch is None else fetch(indices))
        pixels, labels = batch["pixel_values"], batch["labels"]
        if self.erase is not None:
            pixels = torch.stack([self.erase(image) for image in pixels])
        if self.mix is not None:
            pixels, labels = self.mix(pixels, labels)
        pairs = zip(pixels.unbind(), labels.unbind(), strict=True)
        return [{"pixel_values": one, "labels": label} for one, label in pairs]


class _RandAugment:
    """timm's RandAugment of bytes, (C, size, size); what moves in is of the training images' mean colour."""

    def __init__(self, config: str, mean: Tensor, size: int) -> None:
        colours = [round(255 * value) for value in mean.tolist()]
        fill = tuple(colours if len(colours) == 3 else colours[:1] * 3)
        # timm passes over what it cannot read in silence.
        if not _CONFIG.fullmatch(config):
            raise ConfigError(
                f"randaugment must be one of timm's configurations, such as rand-m9-mstd0.5-inc1, or none; got {config!r}"
            )
        make = _needed("timm.data.auto_augment").rand_augment_transform
        self.change: Callable[[Any], Any] = make(config, {"translate_const": int(0.45 * size), "img_mean": fill})

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (C, H, W) to the same, C = 3, or 1 for grey."""
        channels, height, width = pixels.shape
        mode = "RGB" if channels == 3 else "L"
        before = pixels.movedim(0, -1).contiguous().numpy().tobytes()
        image = need("PIL.Image").frombytes(mode, (width, height), before).convert("RGB")
        with _others_drawing_from_torch():
            image = self.change(image)
        after = bytearray(image.convert(mode).tobytes())
        return torch.frombuffer(after, dtype=torch.uint8).view(height, width, channels).movedim(-1, 0).contiguous()


@contextlib.contextmanager
def _others_drawing_from_torch() -> Iterator[None]:
    """Timm draws from Python's and from numpy's generator. Within, those follow torch's; after it they are as before."""
    numpy = need("numpy").random
    before = random.getstate(), numpy.get_state()
    seed = int(torch.randint(2**31, ()))
    try:
        random.seed(seed)
        numpy.seed(seed)
        yield
    finally:
        random.setstate(before[0])
        numpy.set_state(before[1])


def _side(data: ImageDataset) -> int:
    """The side of the images that come out, in pixels."""
    return int(data.image_size if hasattr(data, "image_size") else data.images.shape[-1])


def _needed(module: str) -> Any:
    return need(module, "this augmentation", "imagenet")
