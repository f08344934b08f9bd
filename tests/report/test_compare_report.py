"""If these fail, the comparison of methods states a wrong number, hides a run, or cannot be read."""

import base64
import math
import statistics
import struct
import sys

import pytest
from training_rows import METHODS, sample

from strassen_tile.errors import DataError
from strassen_tile.records import read_rows
from strassen_tile.report.compare import columns, figure, summarise, table_caption, write_report
from strassen_tile.report.table import filled


def test_summary_of_known_rows():
    rows = sample()
    summary = summarise(rows)
    assert [(record["method"], record["rank"]) for record in summary] == [(m, r) for m, r, _, _ in METHODS]
    last = [row["top1"] for row in rows if row["method"] == "2:4" and row["epoch"] == 12]
    record = summary[2]
    assert record["top1"] == pytest.approx(sum(last) / 2)
    assert record["top1_sd"] == pytest.approx(statistics.stdev(last))
    assert record["train_seconds"] == pytest.approx(240.5)
    assert record["train_seconds_sd"] == pytest.approx(math.sqrt(0.5))
    assert (record["epoch"], record["seeds"], record["complete"]) == (12, 2, True)
    assert (record["params"], record["machine"]) == (4_300_000, "a machine")
    assert "date" not in record  # It differs from row to row: no one value is the group's.


def test_summary_while_training_runs():
    rows = [row for row in sample(METHODS[:2]) if (row["method"], row["seed"]) != ("dense+token-mix", 1)]
    rows = [row for row in rows if row["method"] == "dense" or row["epoch"] <= 3]
    rows = [row for row in rows if (row["method"], row["seed"]) != ("dense", 1) or row["epoch"] <= 7]
    dense, mixed = summarise(rows)
    assert dense["top1"] == next(row["top1"] for row in rows if row["epoch"] == 12)  # Epoch 7 is not mixed in.
    assert (dense["top1_sd"], dense["seeds"], dense["seeds_started"]) == (None, 1, 2)
    assert dense["state"] == "seed 0: 12, seed 1: 7"
    assert (mixed["epoch"], mixed["complete"], dense["complete"]) == (3, False, False)
    assert "not finished" in table_caption([dense, mixed])
    shown, lines = filled(columns(state=True), [dense, mixed])
    assert (shown[-1].title, lines[0][-1]) == ("Epoch reached", "seed 0: 12, seed 1: 7")
    assert summarise([]) == []


def test_a_diverged_seed_is_not_left_out_of_the_mean():
    rows = sample(METHODS[:1])
    rows[-1]["loss"] = None
    (record,) = summarise(rows)
    assert record["loss"] is None
    assert record["top1"] is not None


def test_a_repeated_epoch_counts_once_and_the_later_row_wins():
    rows = sample(METHODS[:1], seeds=1)
    (record,) = summarise([*rows, {**rows[-1], "top1": 12.5}])
    assert (record["top1"], record["seeds"]) == (12.5, 1)


def test_rows_of_different_models_are_refused():
    rows = sample(METHODS[:1])
    rows[5]["flops_per_image"] = 7
    with pytest.raises(DataError, match="dense disagree on flops_per_image"):
        summarise(rows)
    with pytest.raises(DataError, match="row 0 has method=None"):
        summarise([{"rank": 3, "seed": 0, "epoch": 1}])


def test_table_states_both_counts_and_the_share():
    shown, lines = filled(columns(), summarise(sample()))
    line = dict(zip((column.title for column in shown), lines[3], strict=True))
    assert "Variant" not in line  # no row has one
    assert line.pop("Top-1, %").count("±") == 1
    assert line == {
        "Method": "stl", "Rank": "16", "Params": "4.3 M", "FLOPs per image": "450 M", "Conv. share": "83.0%",
        "FLOPs fewer, products": "2.67×", "FLOPs fewer, all-in": "2.05×", "FLOPs fewer, whole model": "2.51×",
        "Time, s": "240", "Test loss": "0.518 ± 0.000", "Epochs to dense's end": "not reached", "Seconds to it": "–",
        "times sooner": "–",
    }  # fmt: skip


DATA = {"train_images": 1198, "test_images": 599, "classes": 10, "image_size": 8, "stored_size": 8, "chance": 10.2}


def captioned(top1, seeds=2, **data):
    """The caption of a comparison whose methods have these last accuracies, on such data."""
    methods = [(f"m{index}", None, 1e9, 50) for index in range(len(top1))]
    accuracy = dict(zip((name for name, *_ in methods), top1, strict=True))
    return table_caption(
        summarise([{**row, "top1": accuracy[row["method"]], **data} for row in sample(methods, seeds, epochs=1)])
    )


def test_caption_says_what_the_data_are():
    text = captioned([80.0], **DATA)
    assert "1 198 training and 599 test images of 10 classes." in text
    assert "Images are 8 pixels a side. Chance, the largest class named always, is 10.2 %." in text
    assert "8 pixels a side, scaled up from 4.5." in captioned([80.0], **{**DATA, "stored_size": 4.5})
    assert "8 pixels a side, scaled down from 28." in captioned([80.0], **{**DATA, "stored_size": 28})
    assert "8 pixels a side." in captioned([80.0], **{**DATA, "stored_size": None})
    old = "Test top-1 at epoch 1: mean ± sample standard deviation over 2 seeds."
    assert captioned([80.0]) == old  # rows that say nothing of their data
    assert captioned([80.0], **dict.fromkeys(DATA)) == old


def test_caption_says_how_far_seeds_and_test_images_can_be_trusted():
    text = captioned([90.0, 80.0], seeds=1, **{**DATA, "test_images": 400})
    assert "±" not in text
    assert "of one seed: what another would change is not known" in text
    # √(0.8 · 0.2 / 400) = 0.02, the larger of the two; one of 400 is a quarter of a per cent.
    assert "standard error of up to 2 points. One image is 0.25 points." in text
    assert "One image is" in captioned([90.0], **{**DATA, "test_images": 999})
    assert "One image is" not in captioned([90.0], **{**DATA, "test_images": 1000})


def test_caption_says_when_nothing_was_learned():
    # One class of two, 100 images: the standard error is 5 points, and 60 % is not clearly above chance.
    coin = {**DATA, "chance": 50.0, "test_images": 100, "classes": 2}
    text = captioned([33.3, 60.0], **coin)
    assert "No method is clearly above chance: none is more than two standard errors (10 points) above it." in text
    text = captioned([33.3, 60.1], **coin)
    assert "1 of 2 are not clearly above chance" in text
    assert "No method" not in text
    assert "clearly above" not in captioned([60.1, 70.0], **coin)
    assert "clearly above" not in captioned([33.3], **{**coin, "chance": None})


def png_size(data):
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("rows", [[], [{"method": "dense", "rank": None, "seed": 0, "epoch": 1}]])
def test_nothing_measured_yet_is_still_a_report(tmp_path, rows):
    pytest.importorskip("matplotlib")
    page = write_report(tmp_path, rows, "t")
    assert png_size((tmp_path / "plot.png").read_bytes()) == (2100, 1350)
    assert "<table" in page.read_text(encoding="utf-8")
    assert [[text.get_text() for text in axes.texts] for axes in figure(rows).axes] == [["nothing to show yet"]] * 5


def test_report_leaves_rows_plot_and_page(tmp_path):
    settings = pytest.importorskip("matplotlib").rcParams
    before = settings.copy()  # Not dict(): reading the backend's name would import pyplot.
    had_pyplot = "matplotlib.pyplot" in sys.modules
    rows = [{**row, **DATA} for row in sample(epochs=3)]
    page = write_report(tmp_path / "out", rows, "A <title>", ["note & more"])
    assert sorted(path.name for path in page.parent.iterdir()) == ["plot.png", "report.html", "rows.json"]
    assert read_rows(page.parent / "rows.json") == rows
    plot = (page.parent / "plot.png").read_bytes()
    assert png_size(plot) == (2100, 1350)
    text = page.read_text(encoding="utf-8")
    for part in (
        "A &lt;title&gt;",
        "note &amp; more",
        "a machine",
        "00:00:01Z to 2026-01-01T00:00:03Z",
        "599 test",
        "Against dense</h2>",
        "Too few seeds",
    ):
        assert part in text
    assert base64.b64encode(plot).decode() in text
    assert settings.copy() == before
    assert had_pyplot or "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_the_rows_are_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "strassen-tile\[report\]"'):
        write_report(tmp_path, sample(epochs=1), "t")
    assert len(read_rows(tmp_path / "rows.json")) == 2 * len(METHODS)
