"""Data sets that `datasets` loads: the same splits as an image folder with the same images, and every refusal in one line."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from image_files import write_image_folder

from strassen_tile.data import load_images
from strassen_tile.data.folders import read_pixels
from strassen_tile.data.hub import HubImage, _Part
from strassen_tile.errors import DataError

loads = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Nothing is fetched, and nothing kept outside of the test."""
    if importlib.util.find_spec("datasets") is not None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()


def parquet(folder: Path, images: Path, parts: dict[str, str], names=("ant", "bee", "cat")) -> Path:
    """The images of a folder as the hub has them: one file of rows a part."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    folder.mkdir()
    for part, called in parts.items():
        paths = sorted((images / part).glob("*/*"))
        rows = {
            "image": [{"bytes": path.read_bytes(), "path": None} for path in paths],
            "label": [names.index(path.parent.name) for path in paths],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{called}-00000-of-00001.parquet")
    return folder


@loads
def test_a_data_set_of_rows_is_the_image_folder_of_the_same_images(tmp_path, cache) -> None:
    images = write_image_folder(tmp_path / "bugs", {"train": 4, "val": 2})
    expected = load_images(images, image_size=9)
    found = load_images(
        f"hub:{parquet(tmp_path / 'rows', images, {'train': 'train', 'val': 'validation'})}", image_size=9
    )
    assert (found.name, found.class_names, found.channels) == ("rows", expected.class_names, 3)
    assert (found.stored_size, found.lazy) == (expected.stored_size, True)
    for one, two in ((found.train, expected.train), (found.test, expected.test)):
        assert torch.equal(one.labels, two.labels) and torch.equal(one.mean, two.mean)
        for index in range(len(two)):
            torch.manual_seed(index)
            pixels = one[index]["pixel_values"]
            torch.manual_seed(index)
            assert torch.equal(pixels, two[index]["pixel_values"])
    limited = load_images(f"hub:{tmp_path / 'rows'}", limit=5)
    assert len(limited.train) == 5 and len(limited.test) == len(expected.test)


@loads
def test_what_is_no_data_set_of_images_and_classes_is_refused(tmp_path, cache) -> None:
    import datasets

    images = write_image_folder(tmp_path / "bugs", {"train": 2, "val": 2})
    with pytest.raises(DataError, match="has train; expected train, and one of validation, val, test"):
        load_images(f"hub:{parquet(tmp_path / 'alone', images, {'train': 'train'})}")
    (tmp_path / "numbers").mkdir()
    for part in ("train", "test"):
        datasets.Dataset.from_dict({"x": [1, 2]}).to_parquet(tmp_path / "numbers" / f"{part}.parquet")
    with pytest.raises(DataError, match=r"has the columns x \(Value\); expected one of images"):
        load_images(f"hub:{tmp_path / 'numbers'}")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": b"", "path": None}] * 2, "label": [0, -1]}  # as ImageNet's own test set
    (tmp_path / "unlabelled").mkdir()
    for part in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "unlabelled" / f"{part}.parquet")
    with pytest.raises(DataError, match="rows without a label; expected labels from 0 to 1"):
        load_images(f"hub:{tmp_path / 'unlabelled'}")


@loads
def test_what_cannot_be_reached_says_what_to_try(tmp_path, cache) -> None:
    for name in ("imagenet-1k", f"{tmp_path}/nowhere"):
        with pytest.raises(DataError, match=r"cannot be loaded.*licence accepted.*hf auth login") as failed:
            load_images(f"hub:{name}")
        assert "\n" not in str(failed.value)


def test_without_the_library_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'a data set of the hub needs datasets, .*"strassen-tile\[imagenet\]"'):
        load_images("hub:imagenet-1k")


def test_a_bad_row_is_named_and_limits_hold(tmp_path) -> None:
    file = next(write_image_folder(tmp_path / "bugs", {"": 1}).glob("*/*"))
    good = file.read_bytes()
    stored = [{"bytes": good, "path": None}, {"bytes": None, "path": str(file)}, {"bytes": good[:36], "path": None}]
    stored += [{"bytes": None, "path": None}, None]
    part = _Part("hub:x train", [{"picture": one} for one in stored], "picture")
    expected = read_pixels(str(file), 8, augment=False)
    for row in (0, 1):
        assert torch.equal(read_pixels(HubImage(part, row), 8, augment=False), expected)
        with pytest.raises(DataError, match=f"^hub:x train, image {row}: .*more than the limit"):
            read_pixels(HubImage(part, row), 8, augment=False, max_bytes=20)
    for row, message in ((2, "cannot be decoded"), (3, "the row has no image"), (4, "the row has no image")):
        with pytest.raises(DataError, match=f"^hub:x train, image {row}: .*{message}"):
            read_pixels(HubImage(part, row), 8, augment=False)
