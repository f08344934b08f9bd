"""The report of `strassen-tile compare`: its columns, its figure, and its page.

What the rows hold is in `report.groups`, how they are summed up in `report.runs`, what is said of the numbers in
`report.captions`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from strassen_tile.records import Value
from strassen_tile.report import page
from strassen_tile.report.captions import common, differences, table_caption
from strassen_tile.report.figures import add_legend, drawing, new_figure, png
from strassen_tile.report.groups import furthest_of, group_rows, plain_dense
from strassen_tile.report.plots import curves_of, draw_course, draw_results, key_of, mark_end, mark_level
from strassen_tile.report.runs import summarise
from strassen_tile.report.sooner import flops_of
from strassen_tile.report.table import (
    MISSING,
    Column,
    count,
    fewer,
    field,
    flops,
    number,
    p_value,
    percent,
    plus_minus,
    rate,
    signed,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["columns", "figure", "summarise", "table_caption", "write_report"]

# The two ways of counting stand side by side in the table; this says which is which.
_COUNTS = (
    "FLOPs fewer is dense over this method: 2× is half the operations. Products counts, in the converted layers only, "
    "the operations of the products in the place of the dense one; all-in adds what encoding and decoding take; whole "
    "model is the FLOPs of a dense model's image over this one's, everything counted. Conv. share is the part of the "
    "dense model's FLOPs that lies in the layers converted; time is that of training."
)
_FIGURE = (
    "Above: test top-1 after the last epoch against the FLOPs of one image through the whole model (filled: everything "
    "counted; hollow beside it: without encoding and decoding), against parameters, and against measured seconds of "
    "training; up and to the left is better; bars are a sample standard deviation over seeds. Below: top-1, on the "
    "validation split where there is one, and training loss, against training FLOPs where they are known (three times those "
    "of the forward passes, as the backward pass takes twice as many); lines are means over seeds, bands, where drawn, go "
    "from the lowest to the highest seed; a line's markers are where it reaches dense's end, and its own end. Dotted: "
    "where dense ends. The scale is that of the later three quarters of a long training."
)


def columns(state: bool = False) -> tuple[Column, ...]:
    """The columns of the comparison, for records of `summarise`; a new one is a line here.

    Args:
        state: end with a column that says how far each seed is; for runs that have not all finished.
    """
    shown = (
        Column("Method", "method", "left"),
        Column("Rank", "rank"),
        Column("Variant", "variant", "left", optional=True),
        Column("LR", field("lr", rate), optional=True, spare=3),
        Column("Top-1, %", _mean("top1")),
        *([Column("Validation top-1, %", _mean("val_top1"), optional=True)] if state else []),
        Column("Test loss", _mean("loss", 3), optional=True, spare=8),
        Column("Epochs", "schedule", optional=True),
        Column("Training FLOPs fewer", field("run_flops_ratio", fewer), optional=True),
        Column("Seconds fewer", field("run_seconds_ratio", fewer), optional=True, spare=2),
        Column("Epochs to dense's end", _epochs_to_target, optional=True),
        Column("Training FLOPs to it", field("flops_to_target", flops), optional=True, spare=6),
        Column("times fewer", field("flops_ratio_to_target", fewer), optional=True),
        Column("Seconds to it", field("seconds_to_target", _whole), optional=True, spare=5),
        Column("times sooner", field("seconds_ratio_to_target", fewer), optional=True),
        Column("Params", field("params", count), spare=4),
        Column("FLOPs per image", field("flops_per_image", flops), spare=1),
        Column("Conv. share", field("share_converted", percent), spare=9),
        Column("FLOPs fewer, products", field("flop_ratio_products", fewer)),
        Column("FLOPs fewer, all-in", field("flop_ratio_all_in", fewer)),
        Column("FLOPs fewer, whole model", field("flop_ratio", fewer), spare=2),
        Column("Time, s", field("train_seconds", _whole), spare=7),
    )
    return (*shown, Column("Epoch reached", "state", "left")) if state else shown


def difference_columns() -> tuple[Column, ...]:
    """The columns of the table that holds methods against dense, for the same records."""
    return (
        Column("Method", "method", "left"),
        Column("Rank", "rank"),
        Column("Variant", "variant", "left", optional=True),
        Column("Seeds shared", "difference_seeds"),
        Column("Top-1 less dense's, points", _difference),
        Column("p", field("p", p_value)),
        Column("p, Holm-corrected", field("p_holm", p_value)),
    )


@drawing()
def figure(rows: Sequence[Mapping[str, Value]]) -> Figure:
    """Test top-1 at the end against FLOPs of one image, parameters and seconds; below, the course of training.

    The course is top-1 (on the validation split, or of runs without one on the test set) and training loss, against
    training FLOPs; against epochs where a method's are not known.
    """
    groups, summary = group_rows(rows), summarise(rows)
    curves = curves_of(groups, summary)
    dense = plain_dense(groups)
    by_flops = bool(groups) and all(flops_of(group, 1) is not None for group in groups)
    validated = any(group.course == "val_top1" for group in groups)
    split, course = ("Validation", "val_top1") if validated else ("Test", "top1")
    made = new_figure(14, 9)
    axes = made.subplot_mosaic("aabbcc;dddeee")
    axes["a"].set(title="Test top-1 against FLOPs", ylabel="test top-1, %")
    axes["a"].set_xlabel("FLOPs per image, whole model (filled: all-in; hollow: products only)")
    axes["b"].set(title="Test top-1 against parameters", xlabel="parameters")
    axes["c"].set(title="Test top-1 against time", xlabel="seconds of training")
    axes["d"].set(title=f"{split} top-1, %")
    axes["e"].set(title="Training loss")
    for panel, cost in (("a", "flops_per_image"), ("b", "params"), ("c", "train_seconds")):
        draw_results(axes[panel], curves, cost=cost, result="top1", named=panel == "a", beside=panel == "a")
        mark_level(axes[panel], common(summary, "chance"), "chance")
    for panel, key in (("d", course), ("e", "train_loss")):
        axes[panel].set_xlabel("training FLOPs (3 × forward, all-in)" if by_flops else "epoch")
        draw_course(axes[panel], curves, key, by_flops=by_flops)
        if dense is not None and dense.over(furthest_of(groups)):
            # Of top-1 that is the target, over more than one epoch: where a curve's first marker says it is reached.
            end = common(summary, "target") if panel == "d" else dense.mean(key, dense.epochs[-1])
            mark_end(axes[panel], dense, end, by_flops=by_flops)
    mark_level(axes["d"], common(summary, "chance"), "chance")
    add_legend(made, key_of(curves))
    return made


def write_report(
    out_dir: str | Path, rows: Sequence[Mapping[str, Value]], title: str, notes: Sequence[str] = ()
) -> Path:
    """Write `rows.json`, `plot.png` and `report.html` into `out_dir`, see `page.write_report`.

    Args:
        out_dir: the folder; made if missing.
        rows: the rows of the comparison, finished or not.
        title: of the page.
        notes: plain-text paragraphs above the table: the recipe, the data, which layers were converted.

    Returns:
        The path of `report.html`.

    Raises:
        DataError: rows that are not of a comparison; `rows.json` is written all the same.
    """
    return page.write_report(out_dir, rows, title, lambda: _sections(rows, notes))


def _sections(rows: Sequence[Mapping[str, Value]], notes: Sequence[str]) -> list[page.Section]:
    summary = summarise(rows)
    shown = columns(state=not all(record["complete"] for record in summary))
    against = [record for record in summary if number(record, "difference_seeds") is not None]
    return [
        page.Section(
            "Result", (*notes, _COUNTS), table=page.html_table(shown, summary), caption=table_caption(summary)
        ),
        *(
            [
                page.Section(
                    "Against dense", table=page.html_table(difference_columns(), against), caption=_tests(summary)
                )
            ]
            if against
            else []
        ),
        page.Section("Accuracy, cost and training", figure=png(figure(rows)), caption=_FIGURE),
    ]


def _tests(summary: Sequence[Mapping[str, Value]]) -> str:
    return " ".join(["Differences are means ± sample standard deviation over the seeds shared.", *differences(summary)])


def _mean(key: str, digits: int = 2) -> Callable[[Mapping[str, Value]], str]:
    return lambda row: plus_minus(number(row, key), number(row, f"{key}_sd"), digits)


def _whole(s: float | None) -> str:
    return MISSING if s is None else f"{s:.0f}"


def _epochs_to_target(row: Mapping[str, Value]) -> str:
    return "not reached" if row.get("reached") is False else field("epochs_to_target", _whole)(row)


def _difference(row: Mapping[str, Value]) -> str:
    mean, sd = number(row, "difference"), number(row, "difference_sd")
    return signed(mean) + ("" if mean is None or sd is None else f" ± {sd:.2f}")
