"""`strassen-tile compare` from the command line to its files, on few images of the bundled digits."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from strassen_tile.baselines import dense, sparse_24, stl
from strassen_tile.cli import main
from strassen_tile.data import load_images
from strassen_tile.errors import ConfigError
from strassen_tile.experiments import vision

RECIPE = vision.Recipe(
    data="digits", model="t2t_vit_micro", image_size=None, methods=("dense", "stl"), ranks=(8,), seeds=(0,),
    tile=(4, 4, 4), mixing="sequence", encoder_scope="layer", init="random", epochs=2, batch_size=16, lr=1e-3, limit=64,
)  # fmt: skip
CONTRACT = {
    "method", "rank", "seed", "epoch", "top1", "loss", "params", "flops_per_image", "flop_ratio", "train_seconds",
    "command", "commit", "torch", "machine",
}  # fmt: skip


def command(out, *more: str) -> list[str]:
    fixed = ["--model", "t2t_vit_micro", "--limit", "64", "--epochs", "1", "--seeds", "1", "--ranks", "8"]
    return ["compare", *fixed, "--out", str(out), *more]


def measured(rows):
    return [{k: row[k] for k in ("method", "rank", "seed", "epoch", "top1", "loss", "train_loss")} for row in rows]


def test_command_leaves_rows_page_and_plot(tmp_path, capsys) -> None:
    assert main(command(tmp_path, "--methods", "dense,2:4,stl,low-rank,dense+mix")) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["method"] for row in rows] == ["dense", "2:4", "stl", "low-rank", "dense+mix"]
    for row in rows:
        assert set(row) >= CONTRACT
        assert 0 <= row["top1"] <= 100
        assert row["train_seconds"] > 0
    ratios = {row["method"]: row["flop_ratio_all_in"] for row in rows}
    assert ratios["dense"] == 1
    assert ratios["2:4"] == 0.5
    assert rows[2]["flop_ratio_products"] == 8 / 64 < ratios["stl"]
    assert ratios["dense+mix"] > 1
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert "<table" in page
    assert not re.search(r'(src|href)="?http|url\(http', page)  # it opens without a network
    assert "stl" in capsys.readouterr().out
    assert not any((tmp_path / "runs").iterdir())  # checkpoints of finished runs are gone


def test_repeating_trains_nothing_again_and_another_recipe_is_refused(tmp_path, capsys) -> None:
    assert main(command(tmp_path, "--methods", "dense")) == 0
    before = (tmp_path / "rows.json").read_text()
    assert main(command(tmp_path, "--methods", "dense")) == 0
    assert (tmp_path / "rows.json").read_text() == before
    assert main(command(tmp_path, "--methods", "dense", "--lr", "0.01")) == 1
    assert "other lr" in capsys.readouterr().err
    assert (tmp_path / "rows.json").read_text() == before


def test_an_interrupted_comparison_goes_on_as_if_it_had_not_been(tmp_path) -> None:
    whole = vision.compare(RECIPE, tmp_path / "whole")

    def interrupt(progress: vision.Progress) -> None:
        if progress.run == 2 and progress.step == 6:  # in the second epoch of the second run
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vision.compare(RECIPE, tmp_path / "parts", on_progress=interrupt)
    kept = json.loads((tmp_path / "parts" / "rows.json").read_text())
    assert measured(kept) == measured(whole)[:3]
    parts = vision.compare(RECIPE, tmp_path / "parts")
    assert measured(parts) == measured(whole)
    assert parts[0]["train_seconds"] == kept[0]["train_seconds"]  # the finished run was not touched


def test_every_method_starts_from_the_same_network() -> None:
    splits = load_images("digits", limit=64)
    models = [
        vision.build(RECIPE, splits, method, 5)[0] for method in (dense(), sparse_24(), stl(RECIPE.stl_config(8)))
    ]
    for name, parameter in models[0].named_parameters():
        for other in models[1:]:
            found = dict(other.named_parameters()).get(name)
            assert found is None or torch.equal(found, parameter)
    assert {n for n, _ in models[0].named_parameters()} - {n for n, _ in models[2].named_parameters()} == {
        n
        for n, _ in models[0].named_parameters()
        if n.startswith("blocks.") and "norm" not in n and n.endswith("weight")
    }


def test_flops_per_image_are_those_the_counter_sees() -> None:
    splits = load_images("digits", limit=64)
    model, conversion = vision.build(RECIPE, splits, stl(RECIPE.stl_config(24)), 0)
    fields = vision.cost_fields(model, conversion, splits)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.randn(1, 1, 8, 8))
    assert fields["flops_per_image"] == counter.get_total_flops()
    assert fields["flop_ratio_products"] == 24 / 64


@pytest.mark.parametrize(
    "change",
    [
        {"methods": ("denes",)},
        {"ranks": ()},
        {"init": "als"},
        {"epochs": 0},
        {"lr": 0.0},
        {"seeds": ()},
        {"seeds": (0, 2**31)},
        {"seeds": (-1,)},
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(change) -> None:
    with pytest.raises(ConfigError):
        replace(RECIPE, **change)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--data", "nowhere"], "nowhere"),
        (["--model", "t2t_vit_99"], "t2t_vit_99"),
        (["--init", "approximate", "--ranks", "17"], "no approximate basis"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(tmp_path, capsys, arguments, message) -> None:
    out = tmp_path / "out"
    assert main(["compare", "--out", str(out), "--limit", "32", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (out / "rows.json").exists()


@pytest.mark.parametrize("option", [["--tile", "0"], ["--ranks", "a"], ["--seeds", ""], ["--mixing", "some"]])
def test_options_that_are_not_values_show_the_usage(tmp_path, capsys, option) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "--out", str(tmp_path), *option])
    assert option[0] in capsys.readouterr().err
