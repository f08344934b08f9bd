"""If these fail, the figure of a comparison shows a wrong number, or a run that cannot be told from others."""

import pytest
from training_rows import METHODS, sample

from strassen_tile.report.compare import figure, summarise


def lines_named(axes, name):
    return [line for line in axes.lines if line.get_label() == name]


def test_figure_marks_chance_where_it_is_in_range():
    pytest.importorskip("matplotlib")
    rows = sample(epochs=1)
    low = min(row["top1"] for row in rows)
    for chance, marks in ((10.0, 0), (low, 1), (60.0, 0)):
        results, course, _ = figure([{**row, "chance": chance} for row in rows]).axes
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
        name if rank is None else f"{name} r={rank}" for name, rank, *_ in methods
    ]
    looks = [(line.get_color(), line.get_marker()) for line in legend.get_lines()]
    assert len(set(looks)) == len(methods)


def test_figure_shows_the_means_at_their_costs():
    pytest.importorskip("matplotlib")
    rows = sample(epochs=12)
    results, course, loss = figure(rows).axes
    for name, record in zip([f"{m} r={r}" if r else m for m, r, *_ in METHODS], summarise(rows), strict=True):
        (point,) = lines_named(results, name)
        assert point.get_xydata().tolist() == [[record["flops_per_image"], record["top1"]]]
    assert results.get_xlim() == (0, pytest.approx(1.06 * 1.15e9))
    for axes, key in ((course, "top1"), (loss, "train_loss")):
        ends = [line.get_xydata()[-1].tolist() for line in axes.lines]
        assert ends == [[12, record[key]] for record in summarise(rows)]
        low, high = axes.get_ylim()
        assert all(low < y < high for _, y in ends)


def test_a_line_ends_where_a_seed_diverges():
    pytest.importorskip("matplotlib")
    rows = sample(METHODS[:1], epochs=3)
    rows[-1]["train_loss"] = None
    _, course, loss = figure(rows).axes
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
