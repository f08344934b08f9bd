"""`strassen-tile compare` from the command line to its files, on few images of the bundled digits."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from strassen_tile.baselines import dense, sparse_24, stl
from strassen_tile.cli import main
from strassen_tile.data import load_images
from strassen_tile.errors import ConfigError
from strassen_tile.experiments import building, runner, vision
from strassen_tile.experiments.entries import Compared
from strassen_tile.experiments.recipe import Recipe
from strassen_tile.report.runs import summarise

pytestmark = pytest.mark.usefixtures("among_few")
RECIPE = Recipe(
    data="few", model="t2t_vit_micro", image_size=None, methods=("dense", "stl"), ranks=(8,), seeds=(0,),
    tile=(4, 4, 4), mixing="sequence", encoder_scope="layer", init="random", epochs=2, batch_size=16, lr=1e-3, limit=64,
)  # fmt: skip
CONTRACT = {
    "method", "rank", "seed", "epoch", "top1", "loss", "params", "flops_per_image", "flop_ratio", "train_seconds",
    "command", "commit", "torch", "machine",
}  # fmt: skip


RESULTS = Path(__file__).parents[2] / "results"


def command(out, *more: str) -> list[str]:
    data = "--recipe digits --data few --limit 64 --validation 0 --methods dense,2:4,stl"
    fixed = f"{data} --model t2t_vit_micro --epochs 1 --seeds 1 --ranks 8"
    return ["compare", *fixed.split(), "--out", str(out), *more]


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

    def interrupt(progress: runner.Progress) -> None:
        if progress.run == 2 and progress.step == 6:  # in the second epoch of the second run
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vision.compare(RECIPE, tmp_path / "parts", on_progress=interrupt)
    kept = json.loads((tmp_path / "parts" / "rows.json").read_text())
    assert measured(kept) == measured(whole)[:3]
    parts = vision.compare(RECIPE, tmp_path / "parts")
    assert measured(parts) == measured(whole)
    assert parts[0]["train_seconds"] == kept[0]["train_seconds"]  # the finished run was not touched


@pytest.mark.slow
def test_two_settings_of_one_rank_in_one_command(tmp_path, capsys) -> None:
    """They were one run, whose rows replaced each other."""
    methods = "dense,stl,stl[rank=8,mixing=none,tile=1x4x4],stl[encoder_scope=tile]"
    assert main(command(tmp_path, "--methods", methods)) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["method"], row["rank"], row["variant"]) for row in rows] == [
        ("dense", None, ""),
        ("stl", 8, "r=8"),
        ("stl", 8, "r=8, tile 1×4×4, mixing none"),
        ("stl", 8, "r=8, scope tile"),
    ]
    assert [row["flop_ratio_products"] for row in rows[1:]] == [8 / 64, 8 / 16, 8 / 64]
    assert rows[1]["params"] < rows[3]["params"]  # an encoder for every column tile
    page = (tmp_path / "report.html").read_text()
    assert "tile 1×4×4, mixing none" in page and "scope tile" in page
    before = (tmp_path / "rows.json").read_bytes()
    assert main(command(tmp_path, "--methods", "stl[encoder_scope=tile],dense")) == 0  # a part, in another order
    assert (tmp_path / "rows.json").read_bytes() == before


def test_rows_say_what_their_numbers_are_measured_by(tmp_path) -> None:
    assert main(command(tmp_path, "--methods", "dense", "--data", "digits")) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    labels = load_images("digits").test.labels.tolist()
    expected = {
        "train_images": 64, "test_images": 599, "classes": 10, "image_size": 8, "stored_size": 8,
        "chance": 100 * max(labels.count(digit) for digit in range(10)) / 599,
    }  # fmt: skip
    assert {key: row[key] for key in expected} == pytest.approx(expected)
    kept = json.loads((tmp_path / "recipe.json").read_text())
    assert (kept["image_size"], kept["model"], kept["methods"]) == (8, "t2t_vit_micro", ["dense"])  # resolved


def photographs(folder: Path, side: int) -> Path:
    random = np.random.default_rng(0)
    for i in range(12):
        path = folder / f"class {i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (side, side + 4, 3), dtype=np.uint8)).save(path)
    return folder


def test_small_images_in_folders_are_not_scaled_up_unless_asked_and_then_it_is_said(tmp_path, capsys) -> None:
    """They were, to 224 pixels, without a word."""
    data = photographs(tmp_path / "data", 14)
    arguments = [
        "compare",
        "--data",
        str(data),
        "--epochs",
        "1",
        "--methods",
        "dense",
        "--seeds",
        "1",
        "--workers",
        "0",
    ]
    assert main([*arguments, "--out", str(tmp_path / "as stored")]) == 0
    (row,) = json.loads((tmp_path / "as stored" / "rows.json").read_text())
    assert (row["image_size"], row["stored_size"], row["chance"]) == (14, 14, 50)
    assert json.loads((tmp_path / "as stored" / "recipe.json").read_text())["model"] == "t2t_vit_micro"
    assert "scaled up" not in capsys.readouterr().out
    assert main([*arguments, "--image-size", "20", "--out", str(tmp_path / "larger")]) == 0
    said = "Images of 14 pixels are scaled up to 20."
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "larger" / "report.html").read_text()
    # A folder from before sizes were in the recipe has images of 224 pixels.
    kept = tmp_path / "as stored" / "recipe.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "image_size": None}))
    assert main([*arguments, "--out", str(tmp_path / "as stored")]) == 1
    assert "other image_size (224 there, 14 now)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["digits-8-epochs", "digits-wide"])
def test_results_of_before_variants_load_resume_and_report(tmp_path, name) -> None:
    """Nothing is trained: the test would take minutes."""
    for file in ("rows.json", "recipe.json"):
        shutil.copy(RESULTS / name / file, tmp_path)
    before = json.loads((tmp_path / "rows.json").read_text())
    # What the recipe of the digits was then.
    then = [] if name == "digits-wide" else ["--methods", "dense,2:4,stl,dense+mix", "--epochs", "8"]
    said = shlex.split(before[0]["command"])
    assert main([*said[1 : said.index("--out")], "--out", str(tmp_path), *then, "--validation", "0"]) == 0
    assert json.loads((tmp_path / "rows.json").read_text()) == before
    assert not (tmp_path / "runs").exists()
    assert (tmp_path / "plot.png").exists()
    summary = summarise(before)
    assert [(one["method"], one["rank"], one["variant"]) for one in summary[:2]] == [
        ("dense", None, None),
        ("2:4", None, None) if name == "digits-8-epochs" else ("stl", 16, None),
    ]


def test_every_method_starts_from_the_same_network() -> None:
    splits = load_images("digits", limit=64)
    models = [
        building.build(RECIPE, splits, Compared(method, ""), 5)[0]
        for method in (dense(), sparse_24(), stl(RECIPE.config(8)))
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
    model, conversion = building.build(RECIPE, splits, Compared(stl(RECIPE.config(24)), ""), 0)
    fields = building.fixed_fields(RECIPE, splits, False, {}, model, conversion)
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
        (["--init", "approximate", "--ranks", "7"], "no approximate basis"),
        (["--methods", "stl[encoder_scope=tile],stl[encoder_scope=row]"], "one of layer, tile is wanted; got 'row'"),
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
