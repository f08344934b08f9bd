"""The runner alone: runs that count and write records, of no images and no network worth the name."""

import errno
import json
import os
import pickle
from dataclasses import replace

import pytest
from torch import nn

from strassen_tile.convert import Conversion
from strassen_tile.errors import ConfigError, DivergedError
from strassen_tile.experiments import log
from strassen_tile.experiments.endings import Place, diverged_record, finish
from strassen_tile.experiments.runner import Comparison, Progress, Run, diverged, run
from strassen_tile.integrations.weights import WEIGHTS
from strassen_tile.report.runs import summarise


class Trainings:
    """Two epochs each, unless stopped; keeps what was trained."""

    def __init__(self) -> None:
        self.done: list[tuple[str, int]] = []
        self.stop_at: tuple[str, int] | None = None
        self.diverge_at: tuple[str, int] | None = None

    def run(self, method: str, variant: str, seed: int = 0, rank: int | None = None) -> Run:
        def train(model, folder, *, recorded, on_step, on_epoch) -> None:
            assert folder.is_dir()
            for epoch in range(recorded + 1, 3):
                on_step(epoch, 2)
                if (method + variant, epoch) == self.stop_at:
                    raise KeyboardInterrupt
                if (method + variant, epoch) == self.diverge_at:
                    raise DivergedError("not finite", epoch=epoch, step=10 * epoch)
                self.done.append((method + variant, epoch))
                on_epoch({"epoch": epoch, "perplexity": 10.0 - epoch, "seconds": 2.0})

        def build() -> tuple[nn.Module, Conversion]:
            return nn.Linear(1, 1), Conversion({}, {}, {})

        return Run(method, rank, variant, seed, 2, build, lambda model, conversion: {"params": len(variant)}, train)


def test_variants_of_one_rank_are_runs_of_their_own_in_the_order_given(tmp_path) -> None:
    made = Trainings()
    runs = [made.run("stl", variant, rank=24) for variant in ("r=24, mixing none", "r=24", "r=24, scope tile")]
    progress: list[Progress] = []
    rows = run(Comparison("x", runs, {"lr": 1}), tmp_path, on_progress=progress.append)
    assert [(row["variant"], row["epoch"]) for row in rows] == [
        (one.variant, epoch) for one in runs for epoch in (1, 2)
    ]
    assert [row["params"] for row in rows[::2]] == [17, 4, 16]
    assert [row["train_seconds"] for row in rows[:2]] == [2, 4]
    assert progress[2] == Progress("stl r=24, seed 0", 2, 3, 1, 2)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert not any((tmp_path / "runs").iterdir())


def test_it_goes_on_where_it_was_and_trains_nothing_twice(tmp_path) -> None:
    made = Trainings()
    runs = [made.run("a", ""), made.run("b", "x"), made.run("b", "y")]
    comparison = Comparison("x", runs, {"lr": 1}, facts={"classes": 3})
    made.stop_at = ("bx", 2)
    with pytest.raises(KeyboardInterrupt):
        run(comparison, tmp_path)
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["method"], row["epoch"]) for row in kept] == [("a", 1), ("a", 2), ("b", 1)]
    made.stop_at = None
    rows = run(comparison, tmp_path)
    assert made.done == [("a", 1), ("a", 2), ("bx", 1), ("bx", 2), ("by", 1), ("by", 2)]
    assert rows[:3] == kept and {row["classes"] for row in rows} == {3}
    more = run(replace(comparison, runs=[*runs, made.run("a", "", seed=1)]), tmp_path)
    assert more[:6] == rows and made.done[6:] == [("a", 1), ("a", 2)]


def test_another_recipe_is_refused_with_both_values_and_some_keys_may_change(tmp_path) -> None:
    made = Trainings()
    first = Comparison("x", [made.run("a", "")], {"lr": 1, "seeds": [0], "size": 8})
    run(first, tmp_path)
    run(replace(first, recipe={"lr": 1, "seeds": [0, 1], "size": 8}, may_change=frozenset({"seeds"})), tmp_path)
    with pytest.raises(ConfigError, match=r"other lr \(1 there, 2 now\), size \(8 there, 9 now\); give another --out"):
        run(replace(first, recipe={"lr": 2, "seeds": [0, 1], "size": 9}), tmp_path)
    # A key that the file there does not say, or leaves open, was as `earlier` has it.
    (tmp_path / "recipe.json").write_text('{"lr": 1, "seeds": [0, 1], "size": null}')
    new = replace(first, recipe={"lr": 1, "seeds": [0, 1], "size": 9, "new": True})
    with pytest.raises(ConfigError, match=r"other new \(None there, True now\), size \(8 there"):
        run(replace(new, earlier={"size": 8}), tmp_path)
    run(replace(new, earlier={"size": 9, "new": True}), tmp_path)
    assert len(made.done) == 2


def test_runs_that_cannot_be_told_apart_are_refused(tmp_path) -> None:
    made = Trainings()
    with pytest.raises(ConfigError, match="two runs of the comparison are the same"):
        run(Comparison("x", [made.run("a", "b"), made.run("a", "b")], {}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_are_safe_names_and_those_of_before() -> None:
    made = Trainings()
    names = [
        made.run(*one).folder
        for one in (
            ("dense", ""), ("2:4", "", 3), ("stl", "r=8"), ("dense+mix", ""), ("stl", "r=8, tile 1×4×4"),
            ("stl", "r=8. tile 1×4×4"), ("stl", "../../r"), ("stl", "..\\r"), ("stl", "x" * 300), ("stl", "x" * 301),
        )
    ]  # fmt: skip
    assert names[:4] == ["dense-0", "24-3", "stl-r=8-0", "dense+mix-0"]
    assert len(set(names)) == len(names)
    for name in names:
        assert (
            set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789=.+_-") and len(name) < 120
        )
        assert not name.startswith(".")


def test_a_run_that_diverges_has_its_row_and_the_next_one_begins(tmp_path) -> None:
    made = Trainings()
    runs = [made.run("a", ""), made.run("b", "x"), made.run("a", "", seed=1)]
    made.diverge_at = ("bx", 2)
    shown: list[int] = []
    rows = run(Comparison("x", runs, {}), tmp_path, on_rows=lambda rows: shown.append(len(rows)))
    assert [(row["method"], row["seed"], row["epoch"], row.get("diverged")) for row in rows] == [
        ("a", 0, 1, None), ("a", 0, 2, None), ("b", 0, 1, None), ("b", 0, 2, True), ("a", 1, 1, None), ("a", 1, 2, None),
    ]  # fmt: skip
    assert shown == [1, 2, 3, 4, 5, 6]
    assert (rows[3]["diverged_epoch"], rows[3]["diverged_step"], rows[3]["train_seconds"]) == (2, 20, 2.0)
    (line,) = diverged(runs, tmp_path, rows)
    assert line.startswith("b x, seed 0: diverged in epoch 2, at step 20: ") and "checkpoint" not in line
    (tmp_path / "runs" / "b-x-0" / "checkpoint-9").mkdir(parents=True)
    (line,) = diverged(runs, tmp_path, rows)
    assert line.endswith(f"its last good weights are in {tmp_path / 'runs' / 'b-x-0' / 'checkpoint-9'}")
    trained = list(made.done)
    made.diverge_at = None
    assert run(Comparison("x", runs, {}), tmp_path) == rows and made.done == trained
    assert (tmp_path / "runs" / "b-x-0" / "checkpoint-9").is_dir()


def test_the_error_reaches_other_processes_whole() -> None:
    error = pickle.loads(pickle.dumps(DivergedError("not finite", epoch=2, step=7)))
    assert (str(error), error.epoch, error.step) == ("not finite", 2, 7)


def test_a_full_disk_as_a_run_diverges_loses_no_row(tmp_path, monkeypatch) -> None:
    made = Trainings()
    comparison = Comparison("x", [made.run("a", ""), made.run("b", "")], {})
    made.diverge_at = ("a", 2)
    write = log.write_rows

    def full(path, rows) -> None:
        if any(row.get("diverged") for row in rows):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, rows)

    monkeypatch.setattr(log, "write_rows", full)
    with pytest.raises(OSError, match="No space left"):
        run(comparison, tmp_path)
    assert [row["epoch"] for row in json.loads((tmp_path / "rows.json").read_text())] == [1]
    monkeypatch.undo()
    rows = run(comparison, tmp_path)  # it diverges again, as it would have
    assert [(row["method"], row["epoch"], row.get("diverged")) for row in rows] == [
        ("a", 1, None), ("a", 2, True), ("b", 1, None), ("b", 2, None),
    ]  # fmt: skip


def test_a_mean_over_seeds_does_not_pass_over_one_that_diverged() -> None:
    def row(seed: int, **more) -> dict:
        return {"method": "a", "rank": None, "variant": "", "seed": seed, "epoch": 4, "top1": 90.0, **more}

    gone = {**row(1), **diverged_record(4, 2, 17)}
    del gone["top1"], gone["seconds"]
    assert summarise([row(0), row(2)])[0]["top1"] == 90.0
    (record,) = summarise([row(0), gone, row(2)])
    assert record["top1"] is None and record["complete"]


def test_weights_of_a_run_that_has_all_rows_come_to_their_place_however_often_it_ends(tmp_path) -> None:
    place = Place(tmp_path, "a-0")
    place.work.mkdir(parents=True)
    (place.work / WEIGHTS).write_bytes(b"weights")
    (place.work / "checkpoint-1").mkdir()
    for _ in range(2):
        finish(place)
        assert place.weights.read_bytes() == b"weights" and not place.work.exists()


def test_finished_runs_without_weights_are_named_and_not_trained_again(tmp_path) -> None:
    made = Trainings()
    comparison = Comparison("x", [made.run("a", ""), made.run("b", "")], {})
    run(comparison, tmp_path)
    trained = list(made.done)
    saving = replace(comparison, runs=[replace(one, saves=True) for one in comparison.runs])
    Place(tmp_path, "b-0").weights.parent.mkdir()
    Place(tmp_path, "b-0").weights.write_bytes(b"")
    with pytest.warns(UserWarning, match="has no weights of a, seed 0: finished without save, or moved since"):
        run(saving, tmp_path)
    assert made.done == trained
