"""If these fail, the comparison of methods states a wrong number, hides a run, or cannot be read."""

import itertools
import math
import random
import statistics
import struct
import sys

import pytest

from strassen_tile.errors import DataError
from strassen_tile.records import read_rows
from strassen_tile.report.compare import (
    columns,
    figure_accuracy_flops,
    figure_curves,
    plot,
    summarise,
    table_caption,
    write_report,
)
from strassen_tile.report.labels import spread
from strassen_tile.report.table import cells, markdown_table

METHODS = [
    ("dense", None, 1.13e9, 88.0),
    ("dense+token-mix", None, 1.15e9, 88.2),
    ("2:4", None, 0.62e9, 87.4),
    ("stl", 16, 0.45e9, 86.8),
    ("stl", 32, 0.64e9, 87.8),
    ("low-rank", 8, 0.6e9, 85.5),
]


def sample(methods=METHODS, seeds=2, epochs=12):
    rng = random.Random(0)
    return [
        {
            "method": method,
            "rank": rank,
            "seed": seed,
            "epoch": epoch,
            "top1": top - 50 * math.exp(-epoch / 2) + rng.gauss(0, 0.1),
            "loss": 0.5 + math.exp(-epoch / 3),
            "train_loss": 0.2 + 0.01 * (88 - top) + math.exp(-epoch / 3),
            "params": 4_300_000,
            "flops_per_image": flops,
            "flop_ratio_products": 0.375,
            "flop_ratio_all_in": 1 / 2.05,
            "flop_ratio": flops / 1.13e9,
            "share_converted": 0.83,
            "train_seconds": 20.0 * epoch + seed,
            "machine": "a machine",
            "date": f"2026-01-01T00:00:{epoch:02d}Z",
        }
        for method, rank, flops, top in methods
        for seed in range(seeds)
        for epoch in range(1, epochs + 1)
    ]


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
    assert "seed 0: 12, seed 1: 7" in markdown_table(columns(state=True), [dense, mixed])
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
    titles = [column.title for column in columns()]
    assert {"FLOPs fewer, products", "FLOPs fewer, all-in", "FLOPs fewer, whole model", "Conv. share"} <= set(titles)
    line = dict(zip(titles, cells(columns(), summarise(sample()))[3], strict=True))
    assert line["Method"] == "stl"
    assert line["Rank"] == "16"
    assert "±" in line["Top-1, %"]
    assert line["Params"] == "4.3 M"
    assert line["FLOPs per image"] == "450 M"
    assert line["Conv. share"] == "83.0%"
    assert [line[title] for title in titles if "fewer" in title] == ["2.67×", "2.05×", "2.51×"]
    assert line["Time, s"] == "240"


def overlaps(figure):
    """Pairs of labels that lie on each other, and labels that leave the figure."""
    text = pytest.importorskip("matplotlib.text").Text
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    boxes = [
        (label.get_text(), text.get_window_extent(label, renderer)) for axes in figure.axes for label in axes.texts
    ]
    width, height = figure.bbox.size
    out = [a for a, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]
    return len(boxes), [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)], out


@pytest.mark.parametrize("epochs", [1, 12])
def test_labels_name_every_run_and_never_overlap(epochs):
    rows = sample(epochs=epochs)
    assert overlaps(figure_accuracy_flops(rows)) == (len(METHODS), [], [])
    assert overlaps(figure_curves(rows)) == (2 * len(METHODS), [], [])


def test_a_crowd_of_nearly_equal_methods_is_still_labelled():
    crowd = [(f"method {index}", 4, 1e9 + 2e6 * index, 88 + 0.02 * index) for index in range(10)]
    assert overlaps(figure_accuracy_flops(sample(crowd, epochs=2))) == (10, [], [])
    assert overlaps(figure_curves(sample(crowd, epochs=2))) == (20, [], [])


def test_a_method_that_cannot_be_placed_is_named():
    rows = [{**row, "flops_per_image": None} if row["method"] == "2:4" else row for row in sample(epochs=1)]
    (axes,) = figure_accuracy_flops(rows).axes
    assert axes.get_title(loc="right").endswith(": 2:4")


def test_spread_keeps_order_distance_and_bounds():
    places = spread([1.0, 2.0, 50.0, 99.0, 100.0, 100.0], 5.0, 100.0)
    assert all(b - a >= 5 - 1e-9 for a, b in itertools.pairwise(places))
    assert places[0] >= 0
    assert places[-1] <= 100
    assert places[2] == 50.0  # Nothing is near: it stays where it wants to be.


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("rows", [[], [{"method": "dense", "rank": None, "seed": 0, "epoch": 1}]])
def test_nothing_measured_yet_is_still_a_plot(tmp_path, rows):
    pytest.importorskip("matplotlib")
    plot(rows, tmp_path / "plot.png")
    assert png_size(tmp_path / "plot.png") == (2250, 900)


def test_report_leaves_rows_plot_and_page(tmp_path):
    settings = pytest.importorskip("matplotlib").rcParams
    before = settings.copy()  # Not dict(): reading the backend's name would import pyplot.
    had_pyplot = "matplotlib.pyplot" in sys.modules
    rows = sample(epochs=3)
    page = write_report(tmp_path / "out", rows, "A <title>", ["note & more"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["plot.png", "report.html", "rows.json"]
    assert read_rows(tmp_path / "out" / "rows.json") == rows
    assert png_size(tmp_path / "out" / "plot.png") == (2250, 900)
    text = page.read_text(encoding="utf-8")
    for part in ("A &lt;title&gt;", "note &amp; more", "a machine", "00:00:01Z to 2026-01-01T00:00:03Z", "<svg"):
        assert part in text
    assert text.count("<svg") == 2
    assert settings.copy() == before
    assert had_pyplot or "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_the_rows_are_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "strassen-tile\[report\]"'):
        write_report(tmp_path, sample(epochs=1), "t")
    assert len(read_rows(tmp_path / "rows.json")) == 2 * len(METHODS)
