"""The least rate and the cool-down, and the average of the weights: values, what is evaluated, and resuming."""

import math

import pytest
import torch
from small_runs import TRAINING, measure, rates_kept, splits, train
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerControl, TrainerState

from strassen_tile.errors import ConfigError
from strassen_tile.integrations.arguments import cores, machinery
from strassen_tile.integrations.averaging import Average, Averaging
from strassen_tile.integrations.images import ImageClassifier, classification_loss
from strassen_tile.integrations.training import ImageTraining, Training


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 10))


def test_rates_rise_from_the_least_and_end_at_it_for_as_long_as_is_said(tmp_path) -> None:
    """12 steps: 3 up, 5 of a cosine, and the epoch of 4 at the end."""
    least, peak = 1e-4, TRAINING.lr
    with rates_kept() as rates:
        train(network(), splits(64), tmp_path, epochs=3, warmup=0.25, min_lr=least, cooldown=1)
    up = [least + (peak - least) * step / 3 for step in range(3)]
    down = [least + (peak - least) * (1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)]
    assert rates == pytest.approx([*up, *down, *[least] * 4], rel=1e-9)


def average_of(weights: list[list[torch.Tensor]], decay: float) -> list[torch.Tensor]:
    """In float64: of the start and of what there is after every step."""
    found = [one.double() for one in weights[0]]
    for step, after in enumerate(weights[1:], start=1):
        keep = min(decay, (1 + step) / (10 + step))
        found = [keep * one + (1 - keep) * two.double() for one, two in zip(found, after, strict=True)]
    return found


def trainable(model: nn.Module) -> list[torch.Tensor]:
    return [one.detach().clone() for one in model.parameters() if one.requires_grad]


@pytest.mark.parametrize("decay", [0.35, 0.9])  # above and below what early steps allow
def test_the_average_is_evaluated_and_the_weights_go_on(tmp_path, decay) -> None:
    model, data = network(), splits(48)
    weights, records = [trainable(model)], []
    records += train(model, data, tmp_path / "a", ema=decay, on_step=lambda *_: weights.append(trainable(model)))
    for found, expected in zip(trainable(model), average_of(weights, decay), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert {key: records[-1][key] for key in ("top1", "loss")} == pytest.approx(measure(model, data), rel=1e-5)
    plain = network()
    without = train(plain, data, tmp_path / "b")
    assert [one["train_loss"] for one in without] == [one["train_loss"] for one in records]
    assert all(torch.equal(one, two) for one, two in zip(weights[-1], trainable(plain), strict=True))
    assert records[-1]["loss"] != without[-1]["loss"]


class KilledError(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_with_its_average_to_the_bit(tmp_path) -> None:
    how = {"ema": 0.8, "epochs": 3, "min_lr": 1e-4, "cooldown": 1}
    whole = network()
    records = train(whole, splits(48), tmp_path / "whole", **how)

    def die(step: int, steps: int) -> None:
        if step == 8:  # of 9: within the last epoch
            raise KilledError

    with pytest.raises(KilledError):
        train(network(), splits(48), tmp_path / "cut", on_step=die, **how)
    again = network()
    later = train(again, splits(48), tmp_path / "cut", recorded=2, **how)
    assert [{**one, "seconds": 0} for one in later] == [{**one, "seconds": 0} for one in records[2:]]
    state = whole.state_dict()
    assert all(torch.equal(state[key], value) for key, value in again.state_dict().items())


@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
def test_the_average_of_sharded_weights_is_that_of_whole_ones() -> None:
    """After an evaluation FSDP has gathered the outermost weights: what is written then must not be lost."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        found = []
        for sharded in (False, True):
            torch.manual_seed(1)
            inner = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
            model = ImageClassifier(inner, Average(inner))
            if sharded:
                fully_shard(inner[0], mesh=init_device_mesh("cpu", (1,)))
                fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            watch, state, control = Averaging(inner, model.average, 0.5), TrainerState(), TrainerControl()
            optimizer, seen = torch.optim.SGD(inner.parameters(), lr=0.1), []
            for _ in range(2):
                for _ in range(3):
                    model.train()(torch.randn(7, 6))["logits"].square().sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    state.global_step += 1
                    watch.on_step_end(None, state, control, model=model)
                watch.on_epoch_end(None, state, control, model=model)
                with torch.no_grad():
                    seen.append(model.eval()(torch.ones(2, 6))["logits"])
                watch.on_evaluate(None, state, control, model=model)
            watch.on_train_end(None, state, control, model=model)
            whole = [getattr(one, "full_tensor", lambda one=one: one)() for one in inner.parameters()]
            found.append([*seen, *whole, *model.average.buffers()])
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_shared_labels_is_that_of_their_classes(smoothing) -> None:
    """Over what counts: Trainer counts one number a class, and marks those of images that count for nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    classes, others = torch.randint(5, (2, 6), generator=generator)
    share = torch.rand(6, 1, generator=generator, dtype=torch.float64)
    hot = torch.nn.functional.one_hot
    labels = share * hot(classes, 5) + (1 - share) * hot(others, 5)
    smooth = (1 - smoothing) * labels + smoothing / 5
    expected = -(smooth * (logits - logits.logsumexp(1, keepdim=True))).sum(1)
    count = labels.ne(-100).sum()
    torch.testing.assert_close(classification_loss(logits, labels, smoothing, count), expected.mean())
    labels[4:] = -100
    count = labels.ne(-100).sum()
    torch.testing.assert_close(classification_loss(logits, labels, smoothing, count), expected[:4].mean())
    hard = classification_loss(logits, classes, smoothing, 6)
    torch.testing.assert_close(classification_loss(logits, hot(classes, 5).double(), smoothing, 30), hard)


def test_no_more_workers_than_cores_of_the_process(monkeypatch) -> None:
    training = Training(epochs=1, batch_size=2, workers=1000)
    alone = machinery(training)["dataloader_num_workers"]
    assert alone == cores() <= 1000
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    for processes, expected in ((1, 16), (4, 4), (3, 5), (32, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert machinery(training)["dataloader_num_workers"] == expected
    assert machinery(Training(epochs=1, batch_size=2))["dataloader_num_workers"] == 0


def test_sharding_over_one_process_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"fsdp=true shards over the GPUs of several processes; there are 1 processes"
    ):
        machinery(Training(epochs=1, batch_size=2, fsdp=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_lr": 2e-3}, r"min_lr must be from 0 to lr=0.001; got 0.002"),
        ({"min_lr": math.nan}, "min_lr must be"),
        ({"cooldown": -1}, "cooldown must not be negative"),
        ({"cooldown": 3, "warmup": 0.5}, r"warmup=0.5 of epochs=4 must leave room for it; got 3 \(0 for none\)"),
        ({"erasing": 1.5}, "erasing must be from 0 to 1"),
        ({"ema": 1.0}, "ema must be from 0 to below 1"),
        ({"mixup": -0.1}, "mixup and cutmix must be finite"),
        ({"cutmix": math.inf}, "mixup and cutmix must be finite"),
    ],
)
def test_what_makes_no_sense_is_refused(change, message) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageTraining(**{"epochs": 4, "batch_size": 1, **change})
