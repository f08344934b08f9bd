"""Images as a Trainer wants them: samples {"pixel_values", "labels"}, a whole batch at once, and reproducible.

Here are what every source shares (who is held out, who is kept by a limit, statistics, collate) and the dataset that
lives in memory as uint8. Augmentation draws from torch's global RNG and from nothing else: whatever seeds and restores
that (Trainer's `seed`, its checkpoints, a DataLoader's workers) seeds and restores the augmentation. Resuming from a
checkpoint at an epoch's end repeats the run exactly. One within an epoch repeats which images are in which batch, but
not their shifts and crops: accelerate fetches a batch ahead, and has drawn the next one when Trainer saves the RNG.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from strassen_tile.errors import ShapeError, shape_text

Sample = dict[str, Tensor]


def collate(samples: Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor]) -> Sample:
    """One batch from samples, or from what is a batch already; `data_collator=collate` for transformers' Trainer.

    Args:
        samples: B samples of "pixel_values" (C, H, W) and "labels" (), or one mapping with both batched. Labels of mixed
            images are their classes' shares, floating point (num_classes,).

    Returns:
        {"pixel_values": float32 (B, C, H, W), "labels": int64 (B,), or float32 (B, num_classes) of mixed images}.
    """
    if isinstance(samples, Mapping):
        pixels, labels = samples["pixel_values"], samples["labels"]
    else:
        pixels = torch.stack([sample["pixel_values"] for sample in samples])
        labels = torch.stack([sample["labels"] for sample in samples])
    return {
        "pixel_values": pixels.to(torch.float32),
        "labels": labels.float() if labels.is_floating_point() else labels.to(torch.int64),
    }


class InMemoryImages(Dataset[Sample]):
    """Images held as bytes; shifted, flipped and normalised a batch at a time when they are fetched.

    Args:
        images: uint8 (n, C, H, W).
        labels: int64 (n,).
        mean: per channel, of pixels scaled to 0..1, (C,).
        std: per channel, likewise (C,), positive.
        max_shift: each image is moved by up to this many pixels up or down and left or right; what moves in is 0,
            the background. 0: not moved.
        flip: mirror each image left to right with probability 1/2.
        change: made of each image, uint8 (C, H, W) before and after, once it is moved and mirrored. None: nothing.

    Raises:
        ShapeError: shapes or dtypes are not those above.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Tensor,
        std: Tensor,
        max_shift: int = 0,
        flip: bool = False,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise ShapeError(f"images are {images.dtype} {shape_text(images.shape)}; expected torch.uint8 (n, C, H, W)")
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise ShapeError(
                f"labels are {labels.dtype} {shape_text(labels.shape)}; expected torch.int64 (n,) with n={len(images)}"
            )
        self.images, self.labels = images, labels
        self.mean, self.std = mean, std
        self.max_shift, self.flip = max_shift, flip
        self.change = change

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`: "pixel_values" float32 (C, H, W), "labels" int64 ()."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The samples at B indices, made together; a DataLoader calls this once a batch.

        They are views of one (B, C, H, W) tensor, in a list as PyTorch defines `__getitems__`: Trainer puts a wrapper
        around the collator that takes the batch for a list of samples, and would read a dict's keys as samples.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        images = random_shift_flip(self.images[chosen], self.max_shift, self.flip)
        if self.change is not None:
            images = torch.stack([self.change(image) for image in images])
        pixels = normalise(images, self.mean, self.std)
        return [
            {"pixel_values": one, "labels": label}
            for one, label in zip(pixels.unbind(), self.labels[chosen].unbind(), strict=True)
        ]

    def __repr__(self) -> str:
        n, channels, height, width = self.images.shape
        return f"InMemoryImages({n} × {channels}×{height}×{width}, max_shift={self.max_shift}, flip={self.flip})"


def random_shift_flip(images: Tensor, max_shift: int, flip: bool) -> Tensor:
    """Move each image (B, C, H, W) by up to `max_shift` pixels, zeros moving in, and mirror each with probability 1/2.

    One gather for the batch: row and column numbers into the padded images, drawn an image from torch's global RNG.
    """
    if max_shift == 0 and not flip:
        return images
    batch, _, height, width = images.shape
    shift = torch.randint(0, 2 * max_shift + 1, (2, batch, 1))
    rows, columns = torch.arange(height).expand(batch, -1), torch.arange(width).expand(batch, -1)
    if flip:
        columns = torch.where(torch.rand(batch, 1) < 0.5, columns.flip(1), columns)
    rows, columns = rows + shift[0], columns + shift[1]
    padded = F.pad(images, (max_shift,) * 4)
    samples = torch.arange(batch)[:, None, None]
    # Indexing around the channel dimension puts it last: (B, H, W, C).
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Bytes (…, C, H, W) to float32 with the training set's mean 0 and standard deviation 1 in each channel (C,)."""
    scale = (1 / (255 * std))[:, None, None]
    return (pixels.to(torch.float32) * scale - (mean / std)[:, None, None]).contiguous()


def channel_statistics(histogram: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float32 (C,), of pixels scaled to 0..1, from counts (C, 256) of each byte value.

    Counts are exact at any number of pixels, where float sums over a data set are not. A constant channel gets 1 for
    its deviation: there is nothing to scale, and 0 would turn it into NaN.
    """
    share = histogram.to(torch.float64) / histogram.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.float(), torch.where(std > 0, std, 1.0).float()


def byte_histogram(images: Tensor) -> Tensor:
    """How often each byte value occurs in each channel of uint8 (n, C, H, W): int64 (C, 256)."""
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 (n, C, H, W) to (n, C, size, size), bilinear with antialiasing; a no-op at that size."""
    if images.shape[-2:] == (size, size):
        return images
    # In pieces: interpolate may hold float copies, and a whole data set of those is memory nobody asked for.
    pieces = [F.interpolate(piece, size=size, mode="bilinear", antialias=True) for piece in images.split(1024)]
    return torch.cat(pieces)


def _grouped(labels: Tensor, seed: int) -> tuple[Tensor, list[Tensor]]:
    """A seeded permutation (n,), and for each class the positions in it, ascending, of that class's samples."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = labels[shuffled].argsort(stable=True)
    return shuffled, list(by_class.split(torch.bincount(labels).tolist()))


def stratified_split(labels: Tensor, parts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices to train on and indices held out, each ascending: one in `parts` of every class is held out.

    At least one of every class is held out, and at least one stays if the class has two or more.
    """
    shuffled, groups = _grouped(labels, seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for group in groups:
        held[shuffled[group[: max(1, round(len(group) / parts))]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def balanced_subset(labels: Tensor, limit: int, seed: int) -> Tensor:
    """The first `limit` indices of a seeded permutation that deals one of each class in turn while classes last.

    A class holds at most one more than any other that has samples left; a smaller limit gives a prefix of a larger.
    """
    shuffled, groups = _grouped(labels, seed)
    turn = torch.empty_like(shuffled)
    for group in groups:
        turn[group] = torch.arange(len(group))
    return shuffled[turn.argsort(stable=True)[:limit]]
