"""Batches from memory: augmentation moves content and nothing else, reproducibly; the split and the limit are fair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from strassen_tile.data import collate
from strassen_tile.data.images import (
    InMemoryImages,
    balanced_subset,
    byte_histogram,
    channel_statistics,
    random_shift_flip,
    resize,
    stratified_split,
)
from strassen_tile.errors import ShapeError

labels_strategy = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(torch.tensor)


def dataset(n: int = 40, channels: int = 3, size: int = 8, **options) -> InMemoryImages:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)
    mean, std = channel_statistics(byte_histogram(images))
    return InMemoryImages(images, torch.arange(n) % 7, mean=mean, std=std, **options)


def variants(image: Tensor, max_shift: int, flip: bool) -> list[Tensor]:
    """Every image that augmentation may make, by writing each pixel where it goes."""
    _, height, width = image.shape
    found = []
    for source in (image, image.flip(-1)) if flip else (image,):
        for down in range(-max_shift, max_shift + 1):
            for right in range(-max_shift, max_shift + 1):
                moved = torch.zeros_like(image)
                for y in range(height):
                    for x in range(width):
                        if 0 <= y + down < height and 0 <= x + right < width:
                            moved[:, y + down, x + right] = source[:, y, x]
                found.append(moved)
    return found


@pytest.mark.parametrize("size", [(3, 5), (1, 1), (4, 4)])
@pytest.mark.parametrize(("max_shift", "flip"), [(0, False), (0, True), (1, False), (2, True)])
def test_augmentation_makes_every_variant_and_no_other(size: tuple[int, int], max_shift: int, flip: bool) -> None:
    """Wrapping around instead of zeros, a shift never drawn, or channels moved apart would show."""
    torch.manual_seed(0)
    image = torch.randint(1, 256, (2, *size), dtype=torch.uint8)
    made = random_shift_flip(image.expand(600, -1, -1, -1), max_shift, flip)
    assert made.dtype == torch.uint8
    expected = torch.stack(variants(image, max_shift, flip)).flatten(1).unique(dim=0)
    assert torch.equal(made.flatten(1).unique(dim=0), expected)


def test_augmentation_is_drawn_an_image_and_keeps_labels() -> None:
    torch.manual_seed(0)
    augmented, plain = dataset(n=400, max_shift=1, flip=True), dataset(n=400)
    batch, original = collate(augmented.__getitems__(range(400))), collate(plain.__getitems__(range(400)))
    assert torch.equal(batch["labels"], original["labels"])
    moved = (batch["pixel_values"] != original["pixel_values"]).flatten(1).any(1)
    assert 350 < moved.sum() < 400  # one image in 18 is left as it is


def test_normalised_over_train() -> None:
    pixels = collate(dataset(channels=3).__getitems__(range(40)))["pixel_values"]
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_constant_channel_is_not_nan() -> None:
    images = torch.full((3, 1, 4, 4), 7, dtype=torch.uint8)
    mean, std = channel_statistics(byte_histogram(images))
    pixels = InMemoryImages(images, torch.zeros(3, dtype=torch.int64), mean=mean, std=std)[0]["pixel_values"]
    torch.testing.assert_close(pixels, torch.zeros(1, 4, 4), atol=1e-6, rtol=0)


def test_single_and_batched_fetch_agree() -> None:
    data = dataset()
    indices = [3, 39, 0, 3, -1]
    batch = collate(data.__getitems__(indices))
    singly = collate([data[i] for i in indices])
    assert batch["pixel_values"].shape == (5, 3, 8, 8)
    assert batch["labels"].dtype == torch.int64
    for key in ("pixel_values", "labels"):
        assert torch.equal(batch[key], singly[key])
    assert collate(batch).keys() == batch.keys()
    assert torch.equal(collate(batch)["pixel_values"], batch["pixel_values"])
    with pytest.raises(IndexError):
        data[40]


def test_iterates_and_subsets() -> None:
    """Without an IndexError at the end a plain loop never stops; Subset passes `__getitems__` on."""
    data = dataset(n=5)
    assert [int(sample["labels"]) for sample in data] == [0, 1, 2, 3, 4]
    batches = list(DataLoader(Subset(data, [4, 2]), batch_size=2, collate_fn=collate))
    assert batches[0]["labels"].tolist() == [4, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_same_seed_same_batches(workers: int) -> None:
    """A random state of its own would escape Trainer's seed and its checkpoints."""

    def batches(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        loader = DataLoader(data, batch_size=16, shuffle=True, collate_fn=collate, num_workers=workers)
        return [batch["pixel_values"] for batch in loader]

    data = dataset(max_shift=1, flip=True)
    first, again, other = batches(3), batches(3), batches(4)
    assert [len(batch) for batch in first] == [16, 16, 8]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_wrong_tensors_are_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(ShapeError, match=r"expected torch.uint8 \(n, C, H, W\)"):
        InMemoryImages(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), mean=one, std=one)
    with pytest.raises(ShapeError, match=r"expected torch.int64 \(n,\) with n=2"):
        InMemoryImages(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3), mean=one, std=one)


@settings(deadline=None)
@given(labels=labels_strategy, parts=st.integers(2, 5), seed=st.integers(0, 5))
def test_split_is_stratified_disjoint_and_repeatable(labels: Tensor, parts: int, seed: int) -> None:
    """A sample on both sides would make the test accuracy a lie."""
    train, test = stratified_split(labels, parts, seed)
    assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(len(labels)))
    assert torch.equal(test, test.sort().values)
    for label in labels.unique():
        count, held = int((labels == label).sum()), int((labels[test] == label).sum())
        assert held == max(1, round(count / parts))
        assert held < count or count == 1
    assert all(torch.equal(a, b) for a, b in zip((train, test), stratified_split(labels, parts, seed), strict=True))


@settings(deadline=None)
@given(labels=labels_strategy, limit=st.integers(1, 70), seed=st.integers(0, 5))
def test_limit_is_balanced_and_nested(labels: Tensor, limit: int, seed: int) -> None:
    kept = balanced_subset(labels, limit, seed)
    assert len(kept) == len(set(kept.tolist())) == min(limit, len(labels))
    counts = {int(c): int((labels[kept] == c).sum()) for c in labels.unique()}
    for label, count in counts.items():
        if count < int((labels == label).sum()):  # has samples left, so nobody may be two ahead of it
            assert max(counts.values()) <= count + 1
    assert torch.equal(kept, balanced_subset(labels, limit + 5, seed)[: len(kept)])


def test_limit_depends_on_the_seed() -> None:
    labels = torch.arange(100) % 10
    assert not torch.equal(balanced_subset(labels, 30, 0), balanced_subset(labels, 30, 1))


def test_resize_keeps_constant_images_and_averages() -> None:
    """Without antialiasing, bilinear at a quarter of the size sees the two middle columns of each four: black."""
    stripes = torch.tensor([255, 0, 0, 255], dtype=torch.uint8).repeat(4).expand(16, 16)
    images = torch.stack([stripes[None], torch.full((1, 16, 16), 200, dtype=torch.uint8)])
    small = resize(images, 4)
    assert small.shape == (2, 1, 4, 4)
    assert small.dtype == torch.uint8
    assert (small[0] > 90).all()
    assert (small[1] == 200).all()
    assert resize(images, 16) is images
