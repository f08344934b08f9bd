"""Losses and weights that are not finite: training stops, the last good checkpoint stays, and a comparison goes on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_runs import TRAINING, measure, network, splits, spoilt_at, train
from test_compare import RECIPE, command
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from strassen_tile.cli import main
from strassen_tile.data import load_images
from strassen_tile.errors import DivergedError, STLError
from strassen_tile.experiments import building, rates, vision
from strassen_tile.experiments.commands import DIVERGED
from strassen_tile.integrations.checkpoints import resumable
from strassen_tile.integrations.weights import WEIGHTS, save_weights
from strassen_tile.models import load_checkpoint

pytestmark = pytest.mark.usefixtures("among_few")
STEPS = 4  # an epoch of 64 images


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [STEPS + 1, 2 * STEPS])
def test_a_loss_that_is_not_finite_stops_training_and_the_last_good_checkpoint_stays(tmp_path, step, value) -> None:
    model, steps = spoilt_at(step, value)
    records: list[dict] = []
    with pytest.raises(DivergedError) as raised:
        train(model, splits(64), tmp_path, epochs=3, save=True, records=records)
    assert isinstance(raised.value, STLError) and (raised.value.epoch, raised.value.step) == (2, step)
    said, kept = str(raised.value), tmp_path / f"checkpoint-{STEPS}"
    assert f"epoch 2, at step {step}" in said and f"lower lr than {TRAINING.lr:g}" in said and str(kept) in said
    assert "\n" not in said
    assert [record["epoch"] for record in records] == [1]  # what was measured before is kept; nothing is made up
    assert len(steps) == 2 * STEPS  # it ends with the epoch
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    assert resumable(tmp_path, ImageWeights(model), 1) == kept
    assert all(value.isfinite().all() for value in load_file(kept / "model.safetensors").values())


def ImageWeights(model: nn.Module) -> nn.Module:  # noqa: N802  as the network is called in checkpoints
    holder = nn.Module()
    holder.model = model
    return holder


def test_weights_that_are_spoilt_by_the_last_step_of_an_epoch_are_in_no_checkpoint(tmp_path) -> None:
    """All losses up to then are finite; a checkpoint of such weights would be gone on from."""
    model, done = network(), []

    def spoil(*_: object) -> None:
        done.append(None)
        if len(done) == 2 * STEPS:
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] = float("nan")

    hook = register_optimizer_step_post_hook(spoil)
    try:
        with pytest.raises(DivergedError, match=f"epoch 2, at step {2 * STEPS}"):
            train(model, splits(64), tmp_path, epochs=3)
    finally:
        hook.remove()
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{STEPS}"]


def test_in_a_long_epoch_it_does_not_go_on_to_the_end(tmp_path) -> None:
    model, steps = spoilt_at(7, float("nan"))
    with pytest.raises(DivergedError, match=r"epoch 1, at step 7: .* no epoch had ended before"):
        train(model, splits(64), tmp_path, epochs=1, batch_size=2)  # of 32 steps
    assert 7 <= len(steps) <= 27
    assert not list(tmp_path.iterdir())


def test_a_run_after_one_that_diverged_is_what_it_is_alone(tmp_path) -> None:
    """The last batch is not whole: what Trainer's parts share across runs must not be left as it was."""
    alone, after = network(), network()
    expected = train(alone, splits(67), tmp_path / "alone")
    with pytest.raises(DivergedError):
        train(spoilt_at(6, float("nan"))[0], splits(67), tmp_path / "diverged")
    found = train(after, splits(67), tmp_path / "after")
    assert [{**one, "seconds": 0} for one in found] == [{**one, "seconds": 0} for one in expected]
    assert all(torch.equal(alone.state_dict()[key], value) for key, value in after.state_dict().items())


def test_in_a_comparison_the_next_run_begins_and_the_end_says_so(tmp_path, capsys) -> None:
    arguments = command(tmp_path, "--methods", "dense[lr=1e30],dense", "--epochs", "2", "--save")
    assert main(arguments) == DIVERGED
    text = (tmp_path / "rows.json").read_text()
    diverged, *fine = json.loads(text)
    assert (diverged["epoch"], diverged["diverged"], diverged["diverged_epoch"]) == (2, True, 1)
    assert "NaN" not in text and "Infinity" not in text and "top1" not in diverged
    assert [row["epoch"] for row in fine] == [1, 2]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"dense lr 1e+30, seed 0: diverged in epoch 1, at step {diverged['diverged_step']}" in error
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["dense-0.safetensors"]
    assert (tmp_path / "report.html").exists() and not any((tmp_path / "runs").iterdir())
    assert main(arguments) == DIVERGED  # it is not trained again, and still said
    assert (tmp_path / "rows.json").read_text() == text and capsys.readouterr().err == error


@pytest.mark.slow
def test_runs_in_processes_of_their_own_diverge_alike(tmp_path) -> None:
    arguments = ["--methods", "dense,dense[lr=1e30]", "--epochs", "2", "--save"]
    assert main(command(tmp_path / "one", *arguments)) == DIVERGED
    assert main(command(tmp_path / "two", *arguments, "--jobs", "2")) == DIVERGED
    one, two = (
        {(row["variant"], row["epoch"]): row.get("diverged_step", row.get("top1")) for row in read(tmp_path / name)}
        for name in ("one", "two")
    )
    assert one == two and len(one) == 3
    assert [path.name for path in (tmp_path / "two" / "models").iterdir()] == ["dense-0.safetensors"]


def read(folder: Path) -> list[dict]:
    return json.loads((folder / "rows.json").read_text())


def test_a_rate_that_diverges_is_not_the_best() -> None:
    rows = [
        {"method": "stl", "variant": "r=8, lr 0.1", "lr": 0.1, "epoch": 2, "diverged": True},
        {"method": "stl", "variant": "r=8, lr 0.01", "lr": 0.01, "epoch": 2, "val_top1": 3.0, "val_loss": 9.0},
    ]
    for order in (rows, rows[::-1]):
        assert list(rates.best_rates(order, (0.01, 0.1)).values()) == [0.01]


def test_weights_kept_are_those_that_were_tested_and_load_again(tmp_path) -> None:
    recipe = replace(RECIPE, methods=("stl",), save=True, augment=False)
    rows = vision.compare(recipe, tmp_path)
    path = tmp_path / "models" / "stl-r=8-0.safetensors"
    data = load_images("few", limit=64, augment=False)
    model = building.build(replace(recipe, model="t2t_vit_micro"), data, recipe.roster()[0], 1)[0]
    load_checkpoint(model, path)
    assert measure(model, data) == pytest.approx({key: rows[-1][key] for key in ("top1", "loss")}, rel=1e-6)
    with safe_open(path, "pt") as file:
        about = {key: json.loads(value) for key, value in file.metadata().items()}
    assert (about["method"], about["variant"], about["seed"]) == ("stl", "r=8", 0)
    assert about["recipe"]["lr"] == recipe.lr and about["recipe"]["image_size"] == 8
    path.unlink()
    with pytest.warns(UserWarning, match="no weights of stl r=8, seed 0"):
        assert vision.compare(recipe, tmp_path) == rows  # nobody asked for days of training


def test_tensors_that_share_memory_are_kept_apart(tmp_path) -> None:
    tied = torch.randn(3, 4)
    save_weights(tmp_path / WEIGHTS, {"a": tied, "b": tied.T})
    found = load_file(tmp_path / WEIGHTS)
    assert torch.equal(found["a"], tied) and torch.equal(found["b"], tied.T)
