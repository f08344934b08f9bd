"""If these fail, the figure of a comparison shows a wrong number, or a run that cannot be told from others."""

import pytest
from training_rows import METHODS, fair, matrix, sample

from strassen_tile.report.compare import figure, summarise
from strassen_tile.report.groups import group_rows
from strassen_tile.report.plots import curves_of


def lines_named(axes, name):
    return [line for line in axes.lines if line.get_label() == name]


def test_figure_marks_chance_where_it_is_in_range():
    pytest.importorskip("matplotlib")
    rows = sample(epochs=1)
    low = min(row["top1"] for row in rows)
    for chance, marks in ((10.0, 0), (low, 1), (60.0, 0)):
        results, _, _, course, _ = figure([{**row, "chance": chance} for row in rows]).axes
        assert len(lines_named(results, "chance")) == len(lines_named(course, "chance")) == marks
        if marks:
            assert list(lines_named(results, "chance")[0].get_ydata()) == [low, low]


CROWD = [(f"method {index}", 4, 1e9 + 2e6 * index, 88 + 0.02 * index) for index in range(14)]
WIDE = [(f"W{index}" * 12, 4, 1e9, 88) for index in range(5)]


@pytest.mark.parametrize(("methods", "epochs"), [(METHODS, 1), (METHODS, 12), (CROWD, 2), (WIDE, 2)])
def test_one_legend_names_every_run_and_covers_nothing(methods, epochs):
    pytest.importorskip("matplotlib")
    made = figure(sample(methods, epochs=epochs))
    made.draw_without_rendering()
    (legend,) = made.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= made.bbox.width
    assert box.y0 >= 0
    assert not [axes for axes in made.axes if axes.get_tightbbox().overlaps(box)]
    assert [text.get_text() for text in legend.get_texts()] == [
        *(name if rank is None else f"{name} r={rank}" for name, rank, *_ in methods),
        *(["dense's end"] if methods is METHODS else []),
    ]
    looks = [(line.get_color(), line.get_marker()) for line in legend.get_lines()[: len(methods)]]
    assert len(set(looks)) == len(methods)


def test_figure_shows_the_means_at_their_costs():
    pytest.importorskip("matplotlib")
    rows = sample(epochs=12)
    results, _, _, course, loss = figure(rows).axes
    for name, record in zip([f"{m} r={r}" if r else m for m, r, *_ in METHODS], summarise(rows), strict=True):
        (point,) = lines_named(results, name)
        assert point.get_xydata().tolist() == [[record["flops_per_image"], record["top1"]]]
    assert results.get_xlim() == (0, pytest.approx(1.06 * 1.15e9))
    for axes, key in ((course, "top1"), (loss, "train_loss")):
        ends = [line.get_xydata()[-1].tolist() for line in axes.lines if line.get_label().startswith("_child")]
        assert ends == [[12, record[key]] for record in summarise(rows)]
        low, high = axes.get_ylim()
        assert all(low < y < high for _, y in ends)


def test_a_line_ends_where_a_seed_diverges():
    pytest.importorskip("matplotlib")
    rows = sample(METHODS[:1], epochs=3)
    rows[-1]["train_loss"] = None
    *_, course, loss = figure(rows).axes
    assert [y == y for y in loss.lines[0].get_ydata()] == [True, True, False]
    assert [y == y for y in course.lines[0].get_ydata()] == [True, True, True]


def test_groups_of_one_method_alone_have_their_own_colours():
    pytest.importorskip("matplotlib")
    made = figure(sample([("stl", rank, rank * 1e7, 80) for rank in (8, 16, 24)], epochs=1))
    assert len({line.get_color() for line in made.legends[0].get_lines()}) == 3
    made = figure(sample(epochs=1))
    colours = {line.get_label(): line.get_color() for line in made.legends[0].get_lines()}
    assert colours["stl r=16"] == colours["stl r=32"] != colours["dense"]


def test_a_run_behind_or_without_a_point_is_named_as_such():
    pytest.importorskip("matplotlib")
    rows = [{**row, "flops_per_image": None} if row["method"] == "2:4" else row for row in sample(epochs=3)]
    rows = [row for row in rows if row["method"] != "low-rank" or row["epoch"] < 3]
    names = [text.get_text() for text in figure(rows).legends[0].get_texts()]
    assert "2:4 (no point: cost or result unknown)" in names
    assert "low-rank r=8 (epoch 2)" in names
    assert "dense" in names


def test_names_are_not_taken_for_formulas():
    pytest.importorskip("matplotlib")
    made = figure(sample([("$\\frac{$", None, 1e9, 50.0)], epochs=1))
    made.draw_without_rendering()
    assert made.legends[0].get_texts()[0].get_text() == "$\\frac{$"


def test_products_only_stand_beside_in_hollow():
    """Dense takes 125 FLOPs, 0.8 of them in converted layers, where encoding takes a quarter: 25 of the 100."""
    pytest.importorskip("matplotlib")
    rows = [*fair("dense", [80.0], flops=125, flop_ratio=1.0, flop_ratio_all_in=1.0, flop_ratio_products=1.0, test=80.0),
            *fair("stl", [90.0], rank=24, variant="r=24", test=90.0)]  # fmt: skip
    results, params, seconds, *_ = figure(rows).axes
    (beside,) = [line for line in results.lines if "products only" in line.get_label()]
    assert beside.get_xydata().tolist() == [[75, 90], [100, 90]]
    assert beside.get_markerfacecolor() == "none" and beside.get_markevery() == [0]
    (filled,) = lines_named(results, "stl r=24")
    assert filled.get_markerfacecolor() == beside.get_color() == filled.get_color()
    assert [lines_named(axes, "_stl r=24")[0].get_xydata().tolist() for axes in (params, seconds)] == [
        [[1000, 90]], [[2, 90]]
    ]  # fmt: skip


def test_curves_go_by_training_flops_and_dense_s_end_is_marked():
    pytest.importorskip("matplotlib")
    dense, stl = [60.0, 70.0, 80.0, 80.0, 80.0], [80.0, 80.0, 80.0, 85.0, 86.0]
    rows = [*fair("dense", dense, test=81.0), *fair("stl", stl, flops=40, test=85.0)]
    made = figure(rows)
    *_, course, loss = made.axes
    lines = [line for line in course.lines if line.get_label().startswith("_child")]
    assert lines[0].get_xydata().tolist() == [[3000 * epoch, top1] for epoch, top1 in enumerate(dense, 1)]
    assert lines[1].get_xydata().tolist() == [[1200 * epoch, top1] for epoch, top1 in enumerate(stl, 1)]
    assert [line.get_markevery() for line in lines] == [[2, 4], [0, 4]]  # where it reaches 80, and its end
    for axes, height in ((course, 80), (loss, 0.4)):
        assert list(lines_named(axes, "dense's end")[0].get_ydata()) == [height, height]
        assert list(lines_named(axes, "_dense's end")[0].get_xdata()) == [15_000, 15_000]
    assert course.get_title(loc="left") == "Validation top-1, %" and "training FLOPs" in course.get_xlabel()
    # Of twelve epochs the end is the mean of three: what is marked is what has to be reached.
    long = figure(fair("dense", [*[60.0] * 9, 75.0, 81.0, 84.0], test=81.0)).axes[3]
    assert list(lines_named(long, "dense's end")[0].get_ydata()) == [80, 80]
    older = figure([{**row, "train_images": None} for row in rows]).axes[3]
    assert older.get_xlabel() == "epoch" and older.lines[0].get_xdata().tolist() == [1, 2, 3, 4, 5]


def test_many_runs_are_told_apart_by_colour_and_stroke():
    pytest.importorskip("matplotlib")
    rows = matrix()
    made = figure(rows)
    made.draw_without_rendering()
    (legend,) = made.legends
    bases = ["dense", "narrow", "2:4", "low-rank", "monarch", "stl r=16", "stl r=24", "stl r=32"]
    bases += ["stl r=6, mixing none", "naive r=64"]
    mixes = ["without a mix", "with mix tile", "with mix grid"]
    assert [text.get_text() for text in legend.get_texts()] == [*bases, *mixes, "dense's end"]
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= made.bbox.width and box.y0 >= 0
    assert not [axes for axes in made.axes if axes.get_tightbbox().overlaps(box)]
    key = dict(zip([text.get_text() for text in legend.get_texts()], legend.get_lines(), strict=True))
    results, looks = made.axes[0], set()
    for base in bases:
        for mix in ("", "mix tile", "mix grid"):
            label = "_" + (f"{base}{', ' if ' r=' in base else ' '}{mix}" if mix else base)
            (point,) = lines_named(results, label)
            assert point.get_color() == key[base].get_color()
            assert point.get_marker() == key[f"with {mix}" if mix else "without a mix"].get_marker()
            looks.add((point.get_color(), point.get_marker()))
    assert len(looks) == 30
    strokes = {(one.style["color"], one.style["linestyle"]) for one in curves_of(group_rows(rows), summarise(rows))}
    assert len(strokes) == 30
