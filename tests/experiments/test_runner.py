"""The runner alone: runs that count and write records, of no images and no network worth the name."""

import json
from dataclasses import replace

import pytest
from torch import nn

from strassen_tile.convert import Conversion
from strassen_tile.errors import ConfigError
from strassen_tile.experiments.runner import Comparison, Progress, Run, run


class Trainings:
    """Two epochs each, unless stopped; keeps what was trained."""

    def __init__(self) -> None:
        self.done: list[tuple[str, int]] = []
        self.stop_at: tuple[str, int] | None = None

    def run(self, method: str, variant: str, seed: int = 0, rank: int | None = None) -> Run:
        def train(model, folder, *, recorded, on_step, on_epoch) -> None:
            assert folder.is_dir()
            for epoch in range(recorded + 1, 3):
                on_step(epoch, 2)
                if (method + variant, epoch) == self.stop_at:
                    raise KeyboardInterrupt
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
