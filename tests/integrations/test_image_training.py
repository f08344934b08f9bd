"""What images are drawn to depends on seed, epoch and batch: not on how many processes load them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from strassen_tile.data import load_images
from strassen_tile.errors import ConfigError, DataError
from strassen_tile.integrations.draws import SeededDraws
from strassen_tile.integrations.images import train_images
from strassen_tile.integrations.training import ImageTraining


class Kept(nn.Module):
    """A linear classifier that keeps the pixels it is trained on, and draws, as dropout does."""

    def __init__(self, side: int, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels * side * side, classes)
        self.seen: list[torch.Tensor] = []

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen.append(pixels.clone())
        return self.linear(nn.functional.dropout(pixels.flatten(1), 0.5, self.training))


def train(splits, folder, *, workers: int = 0, seed: int = 3) -> tuple[Kept, list[dict]]:
    torch.manual_seed(0)
    model, records = Kept(splits.image_size, splits.channels, splits.num_classes), []
    training = ImageTraining(epochs=2, batch_size=16, workers=workers, precision="float32")
    train_images(
        model, splits, folder, training, seed=seed, recorded=0, on_step=lambda *_: None, on_epoch=records.append
    )
    return model, records


@pytest.fixture
def photographs(tmp_path):
    """Files of their own, of which one cannot be read if `spoil` is called."""
    random = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 4)):
        for i in range(count):
            path = tmp_path / "photographs" / part / f"class {i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photographs"


@pytest.mark.parametrize("kind", ["in memory", pytest.param("files", marks=pytest.mark.slow)])
def test_results_do_not_depend_on_the_number_of_workers(tmp_path, photographs, kind) -> None:
    splits = load_images("digits", limit=40) if kind == "in memory" else load_images(photographs)
    alone, records = train(splits, tmp_path / "0")
    for workers in (1, 2):
        model, others = train(splits, tmp_path / str(workers), workers=workers)
        assert len(model.seen) == len(alone.seen) > 2
        for one, two in zip(alone.seen, model.seen, strict=True):
            assert torch.equal(one, two)
        assert torch.equal(model.linear.weight, alone.linear.weight)
        assert [{**one, "seconds": 0} for one in others] == [{**one, "seconds": 0} for one in records]


def test_epochs_batches_and_seeds_draw_anew(tmp_path, monkeypatch) -> None:
    """Else an image would be shifted alike in every epoch, and augmentation would add nothing."""
    images = load_images("digits", limit=32).train
    batches = set()
    for seed, epoch, first in ((3, 0, 4), (3, 1, 4), (4, 0, 4), (3, 0, 5)):
        data = SeededDraws(images, seed)
        data.set_epoch(epoch)
        batches.add(torch.stack([one["pixel_values"] for one in data.__getitems__([first, *range(8, 32)])[1:]]))
    assert len({batch.numpy().tobytes() for batch in batches}) == 4
    epochs = []
    monkeypatch.setattr(SeededDraws, "set_epoch", lambda _, epoch: epochs.append(epoch))
    train(load_images("digits", limit=16), tmp_path)
    assert set(epochs) == {0, 1} and epochs == sorted(epochs)


def test_draws_leave_the_generator_where_it_was() -> None:
    data = SeededDraws(load_images("digits", limit=16).train, 3)
    before = torch.get_rng_state()
    drawn = data.__getitems__([4, 2])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = data.__getitems__([4, 2])
    assert all(torch.equal(one["pixel_values"], two["pixel_values"]) for one, two in zip(drawn, again, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_one_line(tmp_path, photographs, workers) -> None:
    splits = load_images(photographs)
    bad = photographs / "train" / "class 0" / "4.png"
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(DataError) as failed:
        train(splits, tmp_path / "out", workers=workers)
    assert str(failed.value).startswith(f"{bad}: cannot be decoded") and "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"lr": float("nan")}, "lr must be a positive finite number"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"warmup": 2.0}, "warmup"),
        ({"label_smoothing": -1.0}, "label_smoothing"),
        ({"workers": -1}, "workers"),
        ({"precision": "float8"}, "precision must be one of auto, float32, bfloat16"),
    ],
)
def test_a_training_that_makes_no_sense_is_refused(change, message) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageTraining(**{"epochs": 1, "batch_size": 1, **change})
