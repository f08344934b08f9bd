"""`load_images` as a training run meets it: the sources, their options, their failures, and Trainer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import write_idx, write_idx_folder, write_image_folder
from torch import Tensor, nn

from strassen_tile.data import ImageSplits, collate, load_images
from strassen_tile.errors import ConfigError, DataError

FASHION = Path("/usr/share/datasets/fashion-mnist")


def whole(data) -> dict[str, Tensor]:
    return collate(data.__getitems__(range(len(data))))


def test_digits() -> None:
    """The numbers quoted for digits hold only on this split of these images."""
    splits = load_images()
    assert (splits.name, splits.num_classes, splits.channels, splits.image_size) == ("digits", 10, 1, 8)
    assert splits.class_names == tuple("0123456789")
    assert (len(splits.train), len(splits.test)) == (1198, 599)
    assert (int(splits.train.images.min()), int(splits.train.images.max())) == (0, 255)
    every = splits.train.labels.bincount() + splits.test.labels.bincount()
    assert every.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert ((splits.test.labels.bincount() - every / 3).abs() < 1).all()
    # Everything held out is held out again, whatever the seed.
    assert torch.equal(splits.test.images, load_images(seed=7).test.images)
    assert torch.equal(splits.train.images, load_images(seed=7).train.images)


def test_digits_are_what_scikit_learn_has() -> None:
    from sklearn.datasets import load_digits

    bunch, splits = load_digits(), load_images()
    known = {(image.astype(int).tobytes(), int(label)) for image, label in zip(bunch.images, bunch.target, strict=True)}
    for data in (splits.train, splits.test):
        sixteenths = (data.images[:, 0].double() * 16 / 255).round().long().numpy()
        assert all((i.tobytes(), int(c)) in known for i, c in zip(sixteenths, data.labels, strict=True))


def test_digits_learnable() -> None:
    """Labels out of step with images pass every test of shapes; nearest class mean gets 9 in 10 only if they fit."""
    splits = load_images(augment=False)
    train, test = whole(splits.train), whole(splits.test)
    means = torch.stack([train["pixel_values"][train["labels"] == c].mean(0) for c in range(10)])
    nearest = torch.cdist(test["pixel_values"].flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == test["labels"]).float().mean() > 0.85


def test_normalised_and_augmented_only_in_train() -> None:
    splits, plain = load_images(), load_images(augment=False)
    pixels = whole(plain.train)["pixel_values"]
    assert abs(float(pixels.mean())) < 1e-4
    assert abs(float(pixels.std(correction=0)) - 1) < 1e-4
    assert (splits.train.max_shift, splits.train.flip) == (1, False)
    assert not torch.equal(whole(splits.train)["pixel_values"], whole(splits.train)["pixel_values"])
    assert torch.equal(whole(splits.test)["pixel_values"], whole(plain.test)["pixel_values"])
    assert torch.equal(whole(splits.train)["labels"], whole(plain.train)["labels"])


def test_size_and_limit() -> None:
    splits = load_images(image_size=16, limit=53, seed=1)
    assert splits.image_size == 16
    assert splits.train[0]["pixel_values"].shape == splits.test[0]["pixel_values"].shape == (1, 16, 16)
    assert splits.train.max_shift == 2
    assert len(splits.test) == 599
    counts = splits.train.labels.bincount(minlength=10)
    assert (int(counts.sum()), int(counts.min()), int(counts.max())) == (53, 5, 6)
    assert not torch.equal(splits.train.images, load_images(image_size=16, limit=53, seed=2).train.images)
    assert len(load_images(limit=10**6).train) == 1198
    pixels = whole(load_images(limit=53, augment=False).train)["pixel_values"]
    assert abs(float(pixels.mean())) < 1e-5


@pytest.mark.parametrize("option", [{"limit": 0}, {"limit": -1}, {"image_size": 0}])
def test_senseless_options(option: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))}=.*at least 1"):
        load_images(**option)


def test_idx_folder(tmp_path: Path) -> None:
    splits = load_images(write_idx_folder(tmp_path / "shapes"))
    assert isinstance(splits, ImageSplits)
    assert (splits.name, splits.num_classes, splits.class_names) == ("shapes", 3, ("0", "1", "2"))
    assert (splits.channels, splits.image_size, splits.train.flip) == (1, 10, False)
    assert splits.test.labels.tolist() == [0, 1, 2] * 4
    # Three classes are not Fashion-MNIST's ten, whatever the folder is called; flips go by the folder.
    fashion = load_images(str(write_idx_folder(tmp_path / "My-Fashion")))
    assert fashion.class_names == ("0", "1", "2")
    assert fashion.train.flip
    assert not load_images(tmp_path / "My-Fashion", augment=False).train.flip


def test_names_of_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_idx_folder(tmp_path / "fashion")
    (folder / "sub").mkdir()
    monkeypatch.chdir(folder)
    assert load_images(".").name == "fashion"
    monkeypatch.chdir(folder / "sub")
    assert load_images("..").name == "fashion"


def test_idx_sizes(tmp_path: Path) -> None:
    folder = write_idx_folder(tmp_path / "wide", size=(6, 10))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: images are 6×10, not square; pass image_size"):
        load_images(folder)
    assert load_images(folder, image_size=12).train[0]["pixel_values"].shape == (1, 12, 12)


@pytest.mark.parametrize(
    ("name", "array", "wrong"),
    [
        ("t10k-images-idx3-ubyte.gz", np.zeros((12, 9, 10), np.uint8), "images are 9×10; expected 10×10 as in "),
        ("t10k-labels-idx1-ubyte", np.full(12, 9, np.uint8), r"holds labels \[9\]; expected only labels that"),
        ("t10k-images-idx3-ubyte.gz", None, "no such file; an IDX folder holds"),
    ],
)
def test_idx_test_set_must_fit(tmp_path: Path, name: str, array: np.ndarray | None, wrong: str) -> None:
    folder = write_idx_folder(tmp_path / "idx")
    (folder / name).unlink()
    if array is not None:
        write_idx(folder / name, array)
    with pytest.raises(DataError, match=re.escape(str(folder / name.removesuffix(".gz"))) + ".*" + wrong):
        load_images(folder)


def test_unknown_sources(tmp_path: Path) -> None:
    for source, given in (("digit", "does not exist"), ("", "is not a folder"), (__file__, "is not a folder")):
        with pytest.raises(DataError, match=f"source '{re.escape(source)}' {given}; expected 'digits' or a path to"):
            load_images(source)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'needs sklearn, .*pip install "strassen-tile\[vision\]"'):
        load_images()


def test_import_is_lean() -> None:
    """Who uses the operator only must not need, or wait for, what the experiments need."""
    # torch itself imports numpy where there is one, so numpy is hidden rather than looked for.
    code = (
        "import sys; sys.modules['numpy'] = None; import strassen_tile.data; "
        "print([m for m in ('PIL', 'sklearn', 'transformers', 'accelerate', 'pandas') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.skipif(not FASHION.is_dir(), reason=f"{FASHION} does not exist")
def test_fashion_mnist() -> None:
    splits = load_images(FASHION, limit=2000)
    assert (len(splits.train), len(splits.test), splits.num_classes) == (2000, 10000, 10)
    assert splits.class_names[0] == "T-shirt/top"
    assert splits.class_names[9] == "Ankle boot"
    assert splits.train.labels.bincount().tolist() == [200] * 10
    assert splits.test.labels.bincount().tolist() == [1000] * 10
    assert (splits.train.max_shift, splits.train.flip, splits.image_size) == (3, True, 28)
    # The published statistics of the whole training set; a tenth of a deviation apart would be another data set.
    assert abs(float(splits.train.mean) - 0.2860) < 0.01
    assert abs(float(splits.train.std) - 0.3530) < 0.01


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.linear(pixel_values.flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_trainer_takes_it_and_resumes(tmp_path: Path) -> None:
    """With Trainer's defaults, column removal included; a run cut in two must see the batches of a run in one.

    Cut at the end of an epoch, 3 steps: within one, accelerate has already drawn the next batch when Trainer saves.
    """
    transformers = pytest.importorskip("transformers")
    splits = load_images(limit=96)

    def trainer(out: Path) -> object:
        transformers.set_seed(0)
        arguments = transformers.TrainingArguments(
            output_dir=str(out), max_steps=6, per_device_train_batch_size=32, learning_rate=0.05, save_steps=3,
            use_cpu=True, disable_tqdm=True, report_to="none", eval_strategy="no", seed=3,
        )  # fmt: skip
        return transformers.Trainer(
            _Classifier(), arguments, data_collator=collate, train_dataset=splits.train, eval_dataset=splits.test
        )

    full = trainer(tmp_path / "a")
    full.train()
    assert full.evaluate()["eval_loss"] > 0
    resumed = trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert torch.equal(full.model.linear.weight, resumed.model.linear.weight)


@pytest.mark.parametrize("source", ["x" * 5000, "~nobody-at-all/x"])
def test_a_path_that_cannot_be_looked_up(source: str) -> None:
    with pytest.raises(DataError, match="cannot be looked up"):
        load_images(source)


SENSELESS = [{"image_size": size} for size in (4.5, "8", True, 10**6)] + [{"limit": limit} for limit in ("3", 2.0)]


@pytest.mark.parametrize("option", [*SENSELESS, {"seed": -1}, {"seed": 2**70}, {"seed": 0.5}], ids=str)
def test_options_of_another_type_or_range(option: dict[str, object]) -> None:
    """A TypeError from deep inside interpolate, or terabytes for one digit."""
    with pytest.raises(ConfigError, match=next(iter(option))):
        load_images(**option)


def test_integers_of_numpy_are_integers() -> None:
    assert load_images(image_size=np.int64(8), limit=np.int32(20), seed=np.int64(1)).image_size == 8


def test_chance_is_the_share_of_the_largest_class_of_the_test_set(tmp_path: Path) -> None:
    for part, counts in (("train", {"a": 3, "b": 3}), ("val", {"a": 1, "b": 7})):
        write_image_folder(tmp_path / part, counts, classes=("",))
    splits = load_images(tmp_path, image_size=8)
    assert splits.chance == 7 / 8
    labels = load_images("digits").test.labels.tolist()
    assert load_images("digits").chance == max(labels.count(digit) for digit in range(10)) / len(labels)


def test_stored_size_is_that_before_resizing(tmp_path: Path) -> None:
    assert load_images(image_size=16).stored_size == load_images().stored_size == 8
    folder = write_idx_folder(tmp_path / "x", size=(6, 10))
    assert load_images(folder, image_size=12).stored_size == 6
