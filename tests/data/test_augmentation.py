"""RandAugment, erasing, mixup and cutmix: drawn from torch's generator alone, labels shared out as pixels are."""

import importlib
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import write_image_folder

from strassen_tile.data import augmentation_text, augmented, load_images
from strassen_tile.data.images import InMemoryImages
from strassen_tile.errors import ConfigError


def _imports(*names: str) -> bool:
    try:
        return all(importlib.import_module(name) for name in names)
    except Exception:  # torchvision made for another torch fails in ways of its own
        return False


heavy = pytest.mark.skipif(
    not _imports("timm.data.auto_augment", "torchvision.transforms.v2"), reason="timm or torchvision is not installed"
)


@dataclass(frozen=True)
class How:
    randaugment: str | None = None
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0


def images(channels: int = 3, count: int = 12, side: int = 16) -> InMemoryImages:
    """Every pixel of image i is 20 i, of class i mod 3; nothing is normalised away."""
    pixels = (20 * torch.arange(count, dtype=torch.uint8))[:, None, None, None].expand(-1, channels, side, side)
    unit = torch.ones(channels)
    return InMemoryImages(pixels.contiguous(), torch.arange(count) % 3, mean=0 * unit, std=unit)


def test_nothing_asked_for_is_the_data_itself() -> None:
    data = images()
    assert augmented(data, How(), 3) is data
    assert augmentation_text(How()) == ""
    told = How(randaugment="rand-m9", erasing=0.25, mixup=0.8, cutmix=1.0)
    assert augmentation_text(told) == ", RandAugment rand-m9, random erasing 0.25, mixup 0.8, cutmix 1"


@pytest.mark.parametrize(
    ("how", "module"),
    [
        (How(randaugment="rand-m9"), "timm.data.auto_augment"),
        (How(erasing=0.5), "torchvision.transforms.v2"),
        (How(cutmix=1.0), "torchvision.transforms.v2"),
    ],
)
def test_what_is_missing_is_one_line_with_the_extra(monkeypatch, how, module) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'this augmentation needs \w+, .*pip install "strassen-tile\[imagenet\]"'):
        augmented(images(), how, 3)


def test_a_torchvision_for_another_torch_is_one_line_too(monkeypatch, tmp_path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text('raise RuntimeError("operator nms does not exist\\nmore")')
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="operator nms does not exist") as failed:
        augmented(images(), How(mixup=1.0), 3)
    assert "\n" not in str(failed.value)


@heavy
@pytest.mark.parametrize("how", [How(mixup=0.8), How(cutmix=1.0), How(mixup=0.8, cutmix=1.0)], ids=str)
@pytest.mark.parametrize("count", [1, 5, 12])
def test_labels_are_shared_out_as_the_pixels_are(how, count) -> None:
    """Every image is of one value, so the mean of a mixed image says how much of either it is. Odd batches too."""
    data = images()
    plain = torch.stack([one["pixel_values"].mean() for one in data.__getitems__(range(count))]).double()
    kinds = set()
    for seed in range(8):
        torch.manual_seed(seed)
        samples = augmented(data, how, 3).__getitems__(list(range(count)))
        assert len(samples) == count
        mixed = torch.stack([one["pixel_values"] for one in samples]).double()
        labels = torch.stack([one["labels"] for one in samples]).double()
        torch.testing.assert_close(labels.sum(1), torch.ones(count).double(), atol=1e-6, rtol=0)
        partner = plain.roll(1)
        share = (mixed.mean((1, 2, 3)) - partner) / (plain - partner) if count > 1 else torch.ones(1).double()
        torch.testing.assert_close(share, share[:1].expand(count), atol=1e-4, rtol=0)  # one for the batch
        own = torch.nn.functional.one_hot(torch.arange(count) % 3, 3)
        expected = share[:, None] * own + (1 - share[:, None]) * own.roll(1, 0)
        torch.testing.assert_close(labels, expected, atol=1e-4, rtol=0)
        kinds.add(bool((mixed[0] == mixed[0, 0, 0, 0]).all()))  # blended everywhere, or pasted in a box
    if count > 1 and how.mixup and how.cutmix:
        assert kinds == {True, False}


@heavy
@pytest.mark.parametrize("channels", [1, 3])
def test_draws_are_torchs_and_leave_the_other_generators_alone(channels) -> None:
    torch.manual_seed(3)
    base = images(channels)
    base.images = torch.randint(256, base.images.shape, dtype=torch.uint8)
    how = How(randaugment="rand-m9-mstd0.5-inc1", erasing=0.5, mixup=0.8, cutmix=1.0)
    data, drawn = augmented(base, how, 3), []
    for seed, other in ((0, 1), (0, 2), (1, 1)):
        random.seed(other)
        np.random.seed(other)
        python, arrays = random.getstate(), np.random.get_state()[1].tobytes()
        torch.manual_seed(seed)
        drawn.append(torch.stack([one["pixel_values"] for one in data.__getitems__(list(range(12)))]))
        assert random.getstate() == python and np.random.get_state()[1].tobytes() == arrays
    assert drawn[0].shape == (12, channels, 16, 16) and drawn[0].dtype == torch.float32
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert base.change is None  # what was given is as it was


@heavy
def test_randaugment_changes_bytes_before_and_erasing_numbers_after_normalisation(tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "x", {"train": 6, "val": 2})
    splits = load_images(folder, image_size=32, augment=False)
    plain = torch.stack([splits.train[i]["pixel_values"] for i in range(18)])
    torch.manual_seed(0)
    changed = augmented(splits.train, How(randaugment="rand-m9-n4-p1"), 3)
    bytes_again = (torch.stack([changed[i]["pixel_values"] for i in range(18)]) * splits.train.std[:, None, None]
                   + splits.train.mean[:, None, None]) * 255  # fmt: skip
    torch.testing.assert_close(bytes_again, bytes_again.round(), atol=2e-3, rtol=0)
    assert not torch.equal(plain[0], changed[0]["pixel_values"])
    erased = torch.stack(
        [one["pixel_values"] for one in augmented(splits.train, How(erasing=1.0), 3).__getitems__(range(18))]
    )
    parts = (erased != plain).all(1).float().mean((1, 2))  # of each image, what was written over
    assert float(parts.min()) > 0.01 and float(parts.max()) < 0.4
    noise = erased[(erased != plain).all(1)[:, None].expand_as(erased)]
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1


@pytest.mark.parametrize("text", ["augment", "rand-mX", "rand-q3"])
def test_what_is_no_configuration_is_named(text) -> None:
    with pytest.raises(ConfigError, match=f"randaugment must be .* got '{text}'"):
        augmented(images(), How(randaugment=text), 3)
