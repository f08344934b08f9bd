"""Image folders: found, read when asked for, cropped as promised, and every bad file named."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import write_image_folder, write_png
from PIL import Image
from torch.utils.data import DataLoader

from strassen_tile.data import collate, load_images
from strassen_tile.data.folders import FolderImages, central_box, random_box, read_pixels
from strassen_tile.errors import DataError


def pixels_of(data: FolderImages, index: int) -> torch.Tensor:
    """Back to 0..255."""
    sample = data[index]["pixel_values"]
    return (sample * data.std[:, None, None] + data.mean[:, None, None]) * 255


@pytest.mark.parametrize("held", ["val", "test"])
def test_round_trip(tmp_path: Path, held: str) -> None:
    root = write_image_folder(tmp_path / "bugs", {"train": 4, held: 2})
    splits = load_images(root, image_size=9)
    assert (splits.name, splits.num_classes, splits.class_names) == ("bugs", 3, ("ant", "bee", "cat"))
    assert (splits.channels, splits.image_size) == (3, 9)
    assert (len(splits.train), len(splits.test)) == (12, 6)
    for data in (splits.train, splits.test):
        for i in range(len(data)):
            label = int(data[i]["labels"])
            assert data[i]["pixel_values"].shape == (3, 9, 9)
            # Each class has its colour, whatever the crop.
            torch.testing.assert_close(pixels_of(data, i), torch.full((3, 9, 9), 40.0 * (label + 1)), atol=0.01, rtol=0)


def test_val_before_test(tmp_path: Path) -> None:
    splits = load_images(write_image_folder(tmp_path / "x", {"train": 2, "val": 1, "test": 5}))
    assert len(splits.test) == 3


@pytest.mark.parametrize(
    ("shapes", "stored", "size"),
    [
        ([(28, 40), (50, 28), (90, 30), (28, 28)], 28, 28),  # small images are not scaled up
        ([(300, 280), (260, 400), (250, 250), (20, 20)], 250, 224),  # large ones are scaled down; one odd one out
        ([(224, 224)] * 4, 224, 224),
    ],
)
def test_by_default_the_size_is_as_stored_and_at_most_224(tmp_path: Path, shapes, stored, size) -> None:
    for part in ("train", "val"):
        for i, (height, width) in enumerate(shapes):
            write_png(tmp_path / part / f"class {i % 2}" / f"{i}.png", np.zeros((height, width, 3), np.uint8))
    splits = load_images(tmp_path)
    assert (splits.stored_size, splits.image_size, splits.lazy) == (stored, size, True)
    assert splits.test[0]["pixel_values"].shape == (3, size, size)
    asked = load_images(tmp_path, image_size=32)
    assert (asked.stored_size, asked.image_size) == (stored, 32)


def test_split_without_train(tmp_path: Path) -> None:
    """Held-out images must not depend on the run, or two runs' accuracies are on different tests."""
    root = write_image_folder(tmp_path / "x", {"": 10})
    splits, again = load_images(root, image_size=8), load_images(root, image_size=8, seed=5)
    assert set(splits.train.paths).isdisjoint(splits.test.paths)
    assert len({*splits.train.paths, *splits.test.paths}) == 30
    assert splits.test.paths == again.test.paths
    assert splits.test.labels.bincount().tolist() == [2, 2, 2]
    assert all(
        Path(p).parent.name == splits.class_names[c] for p, c in zip(splits.test.paths, splits.test.labels, strict=True)
    )


def test_limit_keeps_files_with_their_labels(tmp_path: Path) -> None:
    splits = load_images(write_image_folder(tmp_path / "x", {"train": 8, "val": 1}), image_size=8, limit=6)
    assert splits.train.labels.bincount().tolist() == [2, 2, 2]
    assert all(
        Path(p).parent.name == splits.class_names[c]
        for p, c in zip(splits.train.paths, splits.train.labels, strict=True)
    )
    assert len(splits.test) == 3


def test_seeded_augmentation_and_fixed_test(tmp_path: Path) -> None:
    root = tmp_path / "x"
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            write_png(root / part / name / "0.png", random.integers(0, 256, (20, 30, 3), dtype=np.uint8))

    def epoch(data: FolderImages, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([batch["pixel_values"] for batch in DataLoader(data, batch_size=1, collate_fn=collate)])

    splits = load_images(root, image_size=12)
    assert torch.equal(epoch(splits.train, 1), epoch(splits.train, 1))
    assert not torch.equal(epoch(splits.train, 1), epoch(splits.train, 2))
    assert torch.equal(epoch(splits.test, 1), epoch(splits.test, 2))
    plain = load_images(root, image_size=12, augment=False).train
    assert torch.equal(epoch(plain, 1), epoch(plain, 2))
    assert plain[0]["pixel_values"].is_contiguous()
    pixels = epoch(plain, 0)
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_flip_happens_to_half(tmp_path: Path) -> None:
    """Left dark, right bright stays so unless flipped, whatever the crop of 0.6 of the area or more."""
    ramp = np.broadcast_to(np.linspace(0, 255, 32, dtype=np.uint8)[None, :, None], (32, 32, 3))
    path = str(write_png(tmp_path / "ramp.png", np.ascontiguousarray(ramp)))
    torch.manual_seed(0)
    made = torch.stack([read_pixels(path, 8, augment=True) for _ in range(200)]).int()
    flipped = (made[..., 0] > made[..., -1]).flatten(1).all(1)
    straight = (made[..., 0] < made[..., -1]).flatten(1).all(1)
    assert (flipped | straight).all()
    assert 60 < flipped.sum() < 140


def test_test_transform_is_resize_then_centre_crop(tmp_path: Path) -> None:
    """Against Pillow in two steps, as the recipe is usually written: shorter side to 256/224 of 28, then the centre."""
    y, x = np.mgrid[0:48, 0:64]
    smooth = np.stack([4 * y, 3 * x, 2 * (x + y)], -1).astype(np.uint8)
    path = write_png(tmp_path / "a.png", smooth)
    with Image.open(path) as image:
        two_steps = image.resize((43, 32), Image.Resampling.BICUBIC).crop((7, 2, 35, 30))
    expected = torch.from_numpy(np.array(two_steps)).movedim(-1, 0).int()
    made = read_pixels(str(path), 28, augment=False).int()
    assert (made - expected).abs().max() <= 3  # 42.67 pixels wide rather than 43: half a pixel at the edge


@settings(max_examples=200, deadline=None)
@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    size=st.sampled_from([8, 63, 64, 224]),
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=23, max_size=23),
)
def test_boxes_stay_inside(width: int, height: int, size: int, draws: list[float]) -> None:
    """A box one rounding error outside makes Pillow refuse a good image, once in many thousands."""
    for left, top, right, bottom in (random_box(width, height, size, draws), central_box(width, height)):
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
    left, top, right, bottom = random_box(width, height, size, draws)
    ratio, area = (right - left) / (bottom - top), (right - left) * (bottom - top)
    assert 0.749 < ratio < 1.334
    if max(width, height) <= 4 / 3 * min(width, height):  # not a banner
        assert area >= (0.08 if size >= 64 else 0.6) * width * height * 0.999 or area >= 0.74 * width * height


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [("L", 90, (90, 90, 90)), ("RGBA", (10, 20, 30, 0), (10, 20, 30)), ("P", 0, (0, 0, 0)), ("1", 1, (255, 255, 255))],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, colour: object, expected: tuple[int, ...]) -> None:
    path = tmp_path / "a.PNG"
    Image.new(mode, (3, 2), colour).save(path)
    assert read_pixels(str(path), 4, augment=False)[:, 0, 0].tolist() == list(expected)


def test_16_bit_is_refused(tmp_path: Path) -> None:
    """Pillow would turn nearly every pixel white, and training would go on."""
    path = write_png(tmp_path / "deep.png", np.full((4, 4), 40000, np.uint16))
    with pytest.raises(DataError, match=re.escape(str(path)) + ": is of Pillow mode I;16; expected 8 bits"):
        read_pixels(str(path), 4, augment=False)


@pytest.mark.parametrize("damage", ["noise", "cut", "empty", "gone"])
def test_undecodable_image_is_named_when_read(tmp_path: Path, damage: str) -> None:
    root = write_image_folder(tmp_path / "x", {"train": 2, "val": 2})
    bad = root / "val" / "bee" / "1.png"
    whole = bad.read_bytes()
    splits = load_images(root, image_size=8)
    if damage == "gone":
        bad.unlink()
    else:
        bad.write_bytes({"noise": b"not an image", "cut": whole[: len(whole) - 30], "empty": b""}[damage])
    loader = DataLoader(splits.test, batch_size=6, collate_fn=collate)
    with pytest.raises(DataError, match=re.escape(str(bad)) + ": cannot be decoded"):
        next(iter(loader))


def test_layouts_that_are_wrong(tmp_path: Path) -> None:
    """Each would otherwise train on fewer classes or images than the folder's owner believes."""

    def fails(root: Path, where: Path, wrong: str) -> None:
        with pytest.raises(DataError, match=re.escape(str(where)) + ": .*" + wrong):
            load_images(root, image_size=8)

    def fresh(name: str, **parts: int) -> Path:
        return write_image_folder(tmp_path / name, parts or {"train": 2, "val": 1})

    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", tmp_path / "empty", "neither IDX files nor class folders")
    root = fresh("no-val", train=2)
    fails(root, root, "has train/ but neither val/ nor test/")
    root = fresh("no-train", val=2)
    fails(root, root, "has val/ with class folders in it but no train/")
    root = fresh("fewer")
    shutil.rmtree(root / "val" / "bee")
    fails(root, root / "val", "classes differ .* missing bee, unexpected none")
    root = fresh("more")
    write_png(root / "val" / "dog" / "0.png", np.zeros((2, 2), np.uint8))
    fails(root, root / "val", "classes differ .* missing none, unexpected dog")
    root = fresh("hollow")
    (root / "train" / "cat" / "0.png").unlink()
    (root / "train" / "cat" / "1.png").rename(root / "train" / "cat" / "1.txt")
    fails(root, root / "train" / "cat", "class folder without images")
    root = fresh("flat-val")
    shutil.rmtree(root / "val")
    write_png(root / "val" / "0.png", np.zeros((2, 2), np.uint8))
    fails(root, root / "val", "holds no class folders")
    root = write_image_folder(tmp_path / "single", {"": 1})
    fails(root, root / "ant", "holds one image; expected two or more")
    root = write_image_folder(tmp_path / "one", {"": 3}, classes=("images",))
    fails(root, root, r"holds one class only \(images\)")


def test_hidden_and_other_files_are_passed_over_and_nested_ones_found(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "x", {"train": 1, "val": 1})
    (root / "train" / ".cache").mkdir()
    (root / "train" / "ant" / "notes.txt").write_text("")
    (root / "train" / "ant" / "._0.png").write_text("")
    write_png(root / "train" / "ant" / "images" / "deep.JPEG", np.zeros((4, 4, 3), np.uint8))
    splits = load_images(root, image_size=8)
    assert splits.class_names == ("ant", "bee", "cat")
    assert splits.train.labels.tolist() == [0, 0, 1, 2]
