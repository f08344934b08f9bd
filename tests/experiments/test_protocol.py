"""The protocol: rates chosen on validation images, the test set read once, runs spread over processes."""

import atexit
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from strassen_tile import baselines
from strassen_tile.data import hold_out, load_images
from strassen_tile.data.images import InMemoryImages
from strassen_tile.errors import ConfigError
from strassen_tile.experiments import building, rates, vision
from strassen_tile.experiments.entries import Compared
from strassen_tile.experiments.jobs import JobError, spread
from strassen_tile.experiments.recipe import recipe_of
from strassen_tile.experiments.runner import run
from strassen_tile.integrations.arguments import make_optimizer
from strassen_tile.report.runs import summarise

SMALL = {
    "model": "t2t_vit_micro",
    "limit": 24,
    "validation": 30,
    "epochs": 2,
    "batch_size": 12,
    "seeds": (3,),
    "methods": ("dense", "stl[rank=8]"),
    "precision": "float32",
}


def recipe(**changes):
    return recipe_of("digits", options={**SMALL, **changes})


def test_what_is_held_out_is_not_trained_on_and_is_the_same_for_all() -> None:
    splits = load_images("digits", limit=100)
    held = hold_out(splits, 30)
    train, validation = held.train, held.validation
    assert (len(train), len(validation), len(held.test)) == (70, 30, len(splits.test))
    assert validation.labels.bincount().tolist() == [3] * 10
    whole = Counter(bytes(image.flatten().tolist()) for image in splits.train.images)
    parts = [Counter(bytes(image.flatten().tolist()) for image in part.images) for part in (train, validation)]
    assert parts[0] + parts[1] == whole
    assert train.max_shift == splits.train.max_shift > 0 == validation.max_shift
    assert torch.equal(hold_out(splits, 30).validation.images, validation.images)
    assert len(splits.train) == 100
    for images in (0, 100, 101):
        with pytest.raises(ConfigError, match=f"validation={images} must be from 1 to 99: there are 100 training"):
            hold_out(splits, images)


def test_images_in_folders_are_held_out_too(tmp_path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name in "ab":
        (tmp_path / name).mkdir()
        for index in range(10):
            image.new("RGB", (16, 16), (index, 0, 0)).save(tmp_path / name / f"{index}.png")
    splits = hold_out(load_images(tmp_path), 4)
    assert splits.train.augment and not splits.validation.augment
    assert not set(splits.train.paths) & set(splits.validation.paths)
    assert [path.split("/")[-2] for path in splits.validation.paths] == ["a", "a", "b", "b"]
    assert splits.validation.labels.tolist() == [0, 0, 1, 1] and len(splits.train) == 12


def test_the_test_set_is_read_once_after_the_last_epoch(tmp_path, monkeypatch) -> None:
    read = Counter()
    fetch = InMemoryImages.__getitems__

    def counted(self, indices):
        read[len(self)] += len(indices)
        return fetch(self, indices)

    monkeypatch.setattr(InMemoryImages, "__getitems__", counted)
    rows = vision.compare(recipe(methods=("dense",)), tmp_path)
    assert read == {24: 2 * 24, 30: 2 * 30, 599: 599}
    first, last = rows
    assert "top1" not in first and "loss" not in first
    assert 0 <= last["top1"] <= 100 and last["loss"] > 0
    assert all(0 <= row["val_top1"] <= 100 and row["val_loss"] > 0 for row in rows)
    assert (last["train_images"], last["val_images"], last["test_images"]) == (24, 30, 599)
    assert (last["lr"], last["optimizer"], last["weight_decay"]) == (1e-3, "adamw", 0.05)


def test_rates_are_those_that_end_best_on_validation_images_and_tests_are_not_read_for_them(tmp_path) -> None:
    grid = (1e-5, 2e-3)
    how = recipe(lr_grid=grid, methods=("dense", "stl[rank=8]", "dense[width=64,lr=3e-3]"), limit=12)
    rows = vision.compare(how, tmp_path)
    tried = run(vision.tuning(how), tmp_path / "tuning")
    assert not any("top1" in row for row in tried)
    ends = {(row["method"], row["lr"]): row["val_loss"] for row in tried if row["epoch"] == 2}
    assert set(ends) == {(method, lr) for method in ("dense", "stl") for lr in grid}
    for row in rows:
        if row["variant"] != "width 64, lr 0.003":
            others = [ends[row["method"], lr] for lr in grid]
            assert ends[row["method"], row["lr"]] == min(others)
            assert row["tuned"] == "1e-05, 0.002"
    assert {row["variant"] for row in rows if row["method"] == "stl"} <= {"r=8, lr 1e-05", "r=8, lr 0.002"}
    assert {row["lr"] for row in rows if "width" in row["variant"]} == {3e-3}


def test_the_best_rate_is_of_the_last_epoch_and_a_run_that_diverged_is_never_it() -> None:
    def row(lr, epoch, top1, loss):
        return {
            "method": "m",
            "variant": f"mix tile, lr {lr:g}",
            "lr": lr,
            "epoch": epoch,
            "val_top1": top1,
            "val_loss": loss,
        }

    rows = [row(1.0, 1, 90.0, 0.1), row(1.0, 2, 80.0, 0.5), row(2.0, 2, 80.0, 0.4), row(4.0, 2, 70.0, 0.3)]
    grid = (1.0, 2.0, 4.0, 8.0)
    assert rates.best_rates(rows, grid) == {("m", "mix tile"): 4.0}
    for nothing in (float("nan"), None):
        assert rates.best_rates([*rows, row(8.0, 2, 99.0, nothing)], grid) == {("m", "mix tile"): 4.0}
    assert rates.best_rates([*rows, {**row(8.0, 2, 99.0, 0.2), "diverged": True}], grid) == {("m", "mix tile"): 4.0}
    assert rates.best_rates(rows, (1.0, 2.0)) == {("m", "mix tile"): 2.0}  # others are of another grid, from before
    (nothing,) = rates.best_rates([row(8.0, 2, 99.0, None)], grid).values()
    assert math.isnan(nothing)


def told(run):
    """What its rows say of how it trains."""
    return run.cost.args[-1]


def test_a_named_rate_is_never_chosen_anew(tmp_path) -> None:
    """Not if it is the recipe's own, nor if the same method stands there without one."""
    entries = ("dense", "dense[lr=5e-4]", "stl[rank=8,lr=1e-3]", "2:4[lr=1e-3]")
    how = recipe(lr_grid=(2e-3, 4e-3), methods=entries)
    assert how.lr == 1e-3
    tried = vision.tuning(how).runs
    assert {(run.method, told(run)["lr"]) for run in tried} == {("dense", 2e-3), ("dense", 4e-3)}
    runs = vision.comparison(how, {("dense", ""): 4e-3}).runs
    assert {(run.method, told(run)["lr"], told(run).get("tuned")) for run in runs} == {
        ("dense", 4e-3, "0.002, 0.004"), ("dense", 5e-4, None), ("stl", 1e-3, None), ("2:4", 1e-3, None),
    }  # fmt: skip
    runs = vision.comparison(replace(how, methods=("dense", "dense[lr=4e-3]")), {("dense", ""): 4e-3}).runs
    assert [told(run)["lr"] for run in runs] == [4e-3] * len(how.seeds)


def test_what_diverged_at_every_rate_is_left_out_and_said() -> None:
    how = recipe(lr_grid=(1e10, 1e12), methods=("dense", "stl[rank=8]"))
    made = vision.comparison(how, {("dense", ""): 1e10, ("stl", "r=8"): float("nan")})
    assert {run.method for run in made.runs} == {"dense"}
    assert "stl r=8 is left out: it diverged at every rate of the grid." in made.left_out


def test_the_seed_that_chooses_rates_is_refused() -> None:
    with pytest.raises(ConfigError, match="that choose rates"):
        vision.tuning(recipe(lr_grid=(1e-3,), seeds=(1_000_000,)))


@pytest.mark.parametrize("entry", ["dense[width=0]", "stl[rank=24,width=6]", "dense[weight_norm=term]"])
def test_what_cannot_be_made_is_said_before_anything_is_trained(entry) -> None:
    with pytest.raises(ConfigError, match=r"methods: (dense|stl r=24),? .* cannot be made"):
        vision.comparison(recipe(methods=("dense", entry)))


@pytest.mark.parametrize("entry", ["monarch[flop_ratio=0.5,zero_last=true]", "rotated[zero_last=true]"])
def test_branches_of_any_method_can_start_at_zero(entry) -> None:
    assert vision.comparison(recipe(methods=(entry,))).runs


def test_an_entry_can_do_without_a_base_width() -> None:
    how = recipe(base_width=64, methods=("dense", "dense[base_width=none]"))
    assert [(run.variant, told(run)["base_width"]) for run in vision.comparison(how).runs[:2]] == [
        ("", 64), ("no base width", None),
    ]  # fmt: skip


def test_rates_that_differ_in_their_last_digit_are_told_apart() -> None:
    how = recipe(methods=("dense[lr=0.00123456]", "dense[lr=0.001234564]", "dense[weight_decay=0.0500000001]"))
    assert {run.variant for run in vision.comparison(how).runs} == {
        "lr 0.00123456", "lr 0.001234564", "decay 0.0500000001",
    }  # fmt: skip


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param("stl[rank=24,width=192]", marks=pytest.mark.slow),
        pytest.param("low-rank[flop_ratio=0.5,width=192]", marks=pytest.mark.slow),
        pytest.param("dense[width=192,mix=grid]", marks=pytest.mark.slow),
    ],
)
def test_flops_of_a_narrow_network_are_held_against_the_wide_dense_one(entry, tmp_path) -> None:
    """By hand: the same entry at its own width, scaled by the FLOPs of dense layers of both widths."""
    plain = entry.replace("width=192", "zero_last=false")
    how = recipe(methods=(entry, plain, "dense", "dense[width=192]"), epochs=1, limit=16, seeds=(0,))
    rows = {row["variant"].replace("width 192", "").strip(" ,") + str("width" in row["variant"]): row
            for row in vision.compare(how, tmp_path) if row["method"] == entry.partition("[")[0]}  # fmt: skip
    narrow = next(row for key, row in rows.items() if key.endswith("True") and (key != "True" or "mix" not in entry))
    wide = next(row for key, row in rows.items() if key.endswith("False") and (key != "False" or "mix" not in entry))
    squared = (192 / 128) ** 2  # the model's own width is 128
    assert narrow["flop_ratio_products"] == pytest.approx(
        wide["flop_ratio_products"] * squared, rel=0.01
    )  # ranks are whole
    if entry.startswith("stl"):  # encoding is linear in the width
        assert wide["flop_ratio_all_in"] * 1.5 < narrow["flop_ratio_all_in"] < wide["flop_ratio_all_in"] * squared


def test_a_grid_wants_validation_images_and_rates() -> None:
    for changes, message in (
        ({"validation": 0, "lr_grid": (1e-3,)}, "lr_grid is chosen from on validation images"),
        ({"lr_grid": (1e-3, 1e-3)}, "lr_grid has a rate twice"),
        ({"lr_grid": (-1.0,)}, "lr must be a positive finite number"),
        ({"validation": -1}, "validation must not be negative"),
        ({"jobs": 0}, "jobs must be from 1"),
        ({"methods": ("dense[lr=-1]",)}, "lr must be a positive"),
        ({"methods": ("dense[optimizer=adam]",)}, "optimizer: one of adamw, sgd, soap is wanted"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipe(**changes)


@pytest.mark.slow
def test_runs_in_two_processes_are_those_of_one(tmp_path) -> None:
    torch.set_num_threads(1)
    how = recipe(methods=("dense", "2:4", "stl[rank=8,mixing=none]"))
    alone = vision.compare(how, tmp_path / "alone")
    seen = []
    spread_out = vision.compare(replace(how, jobs=2), tmp_path / "spread", on_progress=seen.append)
    told = ("method", "variant", "seed", "epoch")
    results = ("val_top1", "val_loss", "top1", "loss", "train_loss", "params", "flops_per_image")

    def by_run(rows):
        return {tuple(row[key] for key in told): [row.get(key) for key in results] for row in rows}

    assert by_run(spread_out) == by_run(alone) and len(alone) == 6
    assert {at.run for at in seen} == {1, 2, 3} and not any((tmp_path / "spread" / "runs").iterdir())
    # Nothing is left to do, in one process or two.
    assert vision.compare(how, tmp_path / "spread", on_progress=lambda at: pytest.fail("trained again")) == spread_out


def _fails(task, send) -> None:
    send(task)
    if task == "raise":
        raise ConfigError("no")
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("task", "error"),
    [pytest.param("raise", ConfigError, marks=pytest.mark.slow), pytest.param("die", JobError, marks=pytest.mark.slow)],
)
def test_what_stops_a_job_stops_all_and_is_said(task, error) -> None:
    seen = []
    with pytest.raises(error):
        spread(partial(_fails), ["fine", task], 2, seen.append)
    assert task != "raise" or set(seen) <= {"fine", "raise"}


def _leaves_word(folder, task, send) -> None:
    atexit.register((folder / f"{os.getpid()}").touch)


@pytest.mark.slow
def test_jobs_with_nothing_left_to_do_end_by_themselves(tmp_path) -> None:
    """What libraries clean up at the end, as semaphores of progress bars, is cleaned up."""
    spread(partial(_leaves_word, tmp_path), [1, 2, 3], 2, print)
    assert 1 <= len(list(tmp_path.iterdir())) <= 2


def test_a_narrow_network_is_compared_with_the_wide_one() -> None:
    how = recipe()
    how, splits = vision._loaded(how)
    dense = Compared(baselines.dense(), "")
    model, conversion = building.build(how, splits, replace(dense, width=64), 0)
    fields = building.fixed_fields(how, splits, True, {}, model, conversion)
    wide = building.fixed_fields(how, splits, False, {}, *building.build(how, splits, dense, 0))
    assert fields["flop_ratio"] == fields["flops_per_image"] / wide["flops_per_image"] < 0.5
    linear = conversion.converted
    # Every layer of a block is half as wide on both sides.
    assert fields["flop_ratio_all_in"] == pytest.approx(0.25) and len(linear) == 16


@pytest.mark.parametrize("name", ["adamw", "sgd", "soap"])
def test_optimizers_decay_what_the_groups_say_and_go_down(name) -> None:
    if name == "soap":
        pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    decayed, other = (torch.nn.Parameter(torch.ones(3, 4, 5)) for _ in range(2))
    groups = [
        {"params": [decayed], "lr": 0.1, "weight_decay": 0.5},
        {"params": [other], "lr": 0.1, "weight_decay": 0.0},
    ]
    optimizer = make_optimizer(name, groups)
    for _ in range(3):
        for parameter in (decayed, other):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert torch.equal(other, torch.ones(3, 4, 5)) and (decayed < 0.95).all()
    target = torch.randn(3, 4, 5)
    before = float((other.detach() - target).square().sum())
    for _ in range(20):
        other.grad = 2 * (other.detach() - target)
        optimizer.step()
    assert float((other.detach() - target).square().sum()) < before / 2


def test_an_entry_may_have_a_schedule_of_its_own(tmp_path) -> None:
    """Half as long, its rate falls to zero by then; the others go on."""
    rows = vision.compare(recipe(methods=("dense", "dense[epochs=1]"), limit=36), tmp_path)
    ends = {row["variant"]: row for row in rows if "top1" in row}
    assert {variant: row["epoch"] for variant, row in ends.items()} == {"": 2, "1 epochs": 1}
    first = next(row for row in rows if row["variant"] == "" and row["epoch"] == 1)
    assert first["train_loss"] != ends["1 epochs"]["train_loss"]
    shown = {row["variant"]: row for row in summarise(rows)}
    assert shown[None]["complete"] and shown["1 epochs"]["complete"]


_PARENT = """
import sys, time
sys.path.insert(0, {tests!r})
from test_protocol import _tells_and_waits
from strassen_tile.experiments.jobs import spread

if __name__ == "__main__":
    spread(_tells_and_waits, [{folder!r}, {folder!r}], 2, print)
"""


def _tells_and_waits(folder, send) -> None:
    (Path(folder) / str(os.getpid())).touch()
    while len(list(Path(folder).iterdir())) < 3:
        time.sleep(0.05)


@pytest.mark.slow
def test_jobs_end_with_the_process_that_started_them(tmp_path) -> None:
    """On kill -9 as well, when nobody tells them, and also where they wait for work."""
    script, folder = tmp_path / "parent.py", tmp_path / "ids"
    folder.mkdir()
    script.write_text(_PARENT.format(tests=str(Path(__file__).parent), folder=str(folder)))
    parent = subprocess.Popen([sys.executable, str(script)])
    ids = waited_for(lambda: (found := [int(path.name) for path in folder.iterdir()]) and len(found) == 2 and found)
    parent.kill()
    parent.wait()
    (folder / "0").touch()  # their tasks are done, and there are no others
    assert waited_for(lambda: not any(Path(f"/proc/{one}").exists() for one in ids))


def waited_for(found):
    """What `found` comes to be, for a minute."""
    for _ in range(600):
        if value := found():
            return value
        time.sleep(0.1)
    return None


def test_what_an_optimizer_lacks_is_said_before_anything_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match=r"optimizer soap needs pytorch_optimizer.*strassen-tile\[optimizers\]"):
        vision.compare(recipe(methods=("dense", "stl[rank=8,optimizer=soap]")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_finished_starts_no_process(tmp_path, monkeypatch) -> None:
    how = recipe(methods=("dense",), limit=12)
    rows = vision.compare(how, tmp_path)
    monkeypatch.setattr(
        "multiprocessing.context.SpawnContext.Process", lambda **_: pytest.fail("a process was started")
    )
    assert vision.compare(replace(how, jobs=2), tmp_path) == rows
