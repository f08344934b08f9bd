"""If these fail, a table shows a wrong number, hides a missing one, or breaks on its own content."""

import io
import math
import sys

import pytest
from training_rows import matrix

from strassen_tile.errors import DataError
from strassen_tile.report import table
from strassen_tile.report.compare import columns as compare_columns
from strassen_tile.report.compare import summarise
from strassen_tile.report.table import Column, filled, number, plus_minus, rich_table, sample_sd

ROWS = [{"name": "[bold]a|b", "n": 1_130_000_000, "x": 0.5}, {"name": "c\nd <i>*", "n": None, "x": None}]
COLUMNS = (
    Column("Name | it", "name", "left"),
    Column("FLOPs per image", table.field("n", table.flops)),
    Column("x", "x", "center"),
)


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (table.count, 640, "640"),
        (table.count, 12_600, "12.6 k"),
        (table.count, 4_300_000, "4.3 M"),
        (table.count, 999_960, "1.0 M"),
        (table.count, 999.7, "1.0 k"),
        (table.count, -12_600, "-12.6 k"),
        (table.count, 0, "0"),
        (table.flops, 1_130_000_000, "1.13 G"),
        (table.flops, 620_000_000, "620 M"),
        (table.flops, 12_600_000, "12.6 M"),
        (table.flops, 999_600, "1.00 M"),
        (table.flops, 3.2e15, "3.20 P"),
        (table.percent, 0.834, "83.4%"),
        (table.ratio, 8 / 3, "2.67×"),
        (table.seconds, 0, "0 s"),
        (table.seconds, 8.5e-4, "850.0 µs"),
        (table.seconds, 0.0123, "12.3 ms"),
        (table.seconds, 4.2, "4.2 s"),
        (table.seconds, 59.97, "1 min 00 s"),
        (table.seconds, 200, "3 min 20 s"),
        (table.seconds, 3599.7, "1 h 00 min"),
        (table.seconds, 7500, "2 h 05 min"),
        (table.rate, 1e-3, "1e-3"),
        (table.rate, 2.5e-4, "2.5e-4"),
        (table.rate, 0.0, "0"),
        (table.rate, 2.0, "2e0"),
        (table.signed, 0.517, "+0.52"),
        (table.signed, -0.3, "−0.30"),
        (table.signed, -0.001, "0.00"),
        (table.p_value, 0.0214, "0.021"),
        (table.p_value, 0.00005, "< 0.0001"),
        (table.plain, True, "yes"),
        (table.plain, 12345.6, "12346"),
        (table.plain, 3.14159, "3.142"),
        (table.plain, "2:4", "2:4"),
    ],
)
def test_formatters(form, value, text):
    assert form(value) == text


@pytest.mark.parametrize(
    "form",
    [table.count, table.flops, table.percent, table.ratio, table.rate, table.signed, table.p_value, table.seconds,
     table.plain],
)  # fmt: skip
def test_what_is_missing_is_never_zero(form):
    assert form(None) == "–"
    assert "nan" in form(math.nan)


def test_sd_is_the_sample_sd():
    # Of 1, 2, 3, 4 the population's is 1.118, the sample's sqrt(5/3) = 1.291.
    assert plus_minus(2.5, sample_sd([1, 2, 3, 4]), 3) == "2.500 ± 1.291"
    assert plus_minus(88.41, sample_sd([88.41])) == "88.41"
    assert plus_minus(1.0, sample_sd([1.0, 1.0])) == "1.00 ± 0.00"
    assert plus_minus(None, None) == "–"


def test_a_misspelt_field_is_no_empty_column():
    with pytest.raises(DataError, match=r"'nmae'.*name, n, x"):
        filled((Column("Name", "nmae"),), ROWS)
    assert filled((Column("Name", "nmae"),), []) == ([Column("Name", "nmae")], [])


def test_an_optional_column_is_there_when_a_row_has_something_in_it():
    name, extra = Column("Name", "name"), Column("Perplexity", "perplexity", optional=True)
    assert filled((name, extra), [{"name": "a"}, {"name": "b", "perplexity": None}]) == ([name], [["a"], ["b"]])
    assert filled((name, extra), [{"name": "a", "perplexity": ""}]) == ([name], [["a"]])
    rows = [{"name": "a"}, {"name": "b", "perplexity": 12.5}]
    assert filled((name, extra), rows) == ([name, extra], [["a", "–"], ["b", "12.5"]])


def test_number_refuses_text():
    assert number({"a": 3}, "a") == 3
    assert number({}, "a") is None
    with pytest.raises(DataError, match="'a'"):
        number({"a": "3"}, "a")


@pytest.mark.parametrize("width", [60, 200])
def test_rich_table_shows_every_cell_as_it_is(width):
    console = pytest.importorskip("rich.console")
    buffer = io.StringIO()
    console.Console(file=buffer, width=width).print(rich_table("A [red]title", COLUMNS, ROWS, "caption [x]"))
    text = buffer.getvalue()
    for part in ("A [red]title", "caption [x]", "[bold]a|b", "1.13 G", "0.5", "–"):
        assert part in text


def test_a_narrow_terminal_breaks_headings_before_numbers():
    console = pytest.importorskip("rich.console")
    columns = [Column("a rather long heading", "x")] * 8
    buffer = io.StringIO()
    console.Console(file=buffer, width=80).print(rich_table("t", columns, [{"x": "123.45 M"}]))
    assert buffer.getvalue().count("123.45 M") == 8


def test_a_terminal_too_narrow_leaves_out_what_is_spare_and_says_so():
    console = pytest.importorskip("rich.console")
    columns = [Column("Name", "name", "left"), *(Column(f"c{n}", "x", spare=n) for n in (2, 0, 3, 1))]
    rows = [{"name": "method " * 5, "x": "123456789"}]
    # Text folds and so takes 20 letters at most, the others 9 each, and there is one between and at the edges.
    for width, left in ((62, []), (61, ["c3"]), (52, ["c3"]), (51, ["c2", "c3"])):
        buffer = io.StringIO()
        console.Console(file=buffer, width=width).print(rich_table("t", columns, rows))
        text = buffer.getvalue()
        said = [line for line in text.splitlines() if line.startswith("For want of width")]
        assert said == ([f"For want of width without: {'; '.join(left)}."] if left else [])
        assert text.count("123456789") == 4 - len(left)
    # What is not spare stays, however little room there is.
    assert rich_table("t", columns, rows).kept(20) == [0, 2]


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_the_comparison_names_its_methods_on_any_screen(width):
    console = pytest.importorskip("rich.console")
    buffer, summary = io.StringIO(), summarise(matrix(mixes=("", "mix grid"), epochs=2))
    console.Console(file=buffer, width=width).print(rich_table("t", compare_columns(), summary))
    lines = buffer.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "…" not in buffer.getvalue()
    assert [line.split()[0] for line in lines if "×" in line] == [record["method"] for record in summary]


def test_a_missing_package_is_answered_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.box", None)
    with pytest.raises(ModuleNotFoundError, match=r'rich is not installed.*pip install "strassen-tile\[report\]"'):
        rich_table("t", COLUMNS, ROWS)
