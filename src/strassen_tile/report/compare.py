"""The report of `strassen-tile compare`: its columns, its figure, and what is to be said of its numbers.

What the rows hold and how they are summed up is in `report.runs`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from strassen_tile.records import Value
from strassen_tile.report import page
from strassen_tile.report.figures import (
    add_legend,
    curves_of,
    draw_course,
    draw_results,
    drawing,
    mark_level,
    new_figure,
    png,
)
from strassen_tile.report.runs import group_rows, summarise
from strassen_tile.report.table import MISSING, Column, count, fewer, field, flops, number, percent, plus_minus

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
_FEW_IMAGES = 1000


def columns(state: bool = False) -> tuple[Column, ...]:
    """The columns of the comparison, for records of `summarise`; a new one is a line here.

    Args:
        state: end with a column that says how far each seed is; for runs that have not all finished.
    """
    shown = (
        Column("Method", "method", "left"),
        Column("Rank", "rank"),
        Column("Variant", "variant", "left", optional=True),
        Column("Top-1, %", lambda row: plus_minus(number(row, "top1"), number(row, "top1_sd"))),
        Column("Params", field("params", count)),
        Column("FLOPs per image", field("flops_per_image", flops)),
        Column("Conv. share", field("share_converted", percent)),
        Column("FLOPs fewer, products", field("flop_ratio_products", fewer)),
        Column("FLOPs fewer, all-in", field("flop_ratio_all_in", fewer)),
        Column("FLOPs fewer, whole model", field("flop_ratio", fewer)),
        Column("Time, s", field("train_seconds", lambda s: MISSING if s is None else f"{s:.0f}")),
    )
    return (*shown, Column("Epoch reached", "state", "left")) if state else shown


def table_caption(summary: Sequence[Mapping[str, Value]]) -> str:
    """What the numbers of the table are, of which data and over how many seeds, and what chance makes of them.

    Args:
        summary: records of `summarise`. Of the data it says what their fields `train_images`, `test_images`, `classes`,
            `image_size` and `stored_size` (pixels a side) and `chance` (per cent) say; older rows have none of them.
    """
    if not summary:
        return "No rows yet."
    epochs = sorted({int(number(record, "epoch") or 0) for record in summary})
    seeds = sorted({int(number(record, "seeds") or 0) for record in summary})
    epoch = f"epoch {epochs[0]}" if len(epochs) == 1 else f"the last epoch reached ({epochs[0]} to {epochs[-1]})"
    if seeds == [1]:
        said = [f"Test top-1 at {epoch}, of one seed: what another would change is not known."]
    else:
        over = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        said = [f"Test top-1 at {epoch}: mean ± sample standard deviation over {over} seeds."]
    if not all(record["complete"] for record in summary):
        said.append("Training has not finished: only the seeds at a method's last epoch are averaged.")
    if len({record.get("draws") for record in summary}) > 1:  # rows of before do not say
        said.append(
            "Some rows are older and were augmented by other random draws: small differences may come from that."
        )
    return " ".join([*said, *_about_data(summary), *_about_test_set(summary)])


def _about_data(summary: Sequence[Mapping[str, Value]]) -> list[str]:
    train, test, classes, size, stored, chance = (
        _common(summary, key)
        for key in ("train_images", "test_images", "classes", "image_size", "stored_size", "chance")
    )
    said = []
    if train is not None and test is not None and classes is not None:
        said.append(f"{train:,.0f} training and {test:,.0f} test images of {classes:,.0f} classes.".replace(",", " "))
    if size is not None:
        scaled = (
            "" if stored in (None, size) else f", scaled {'up' if size > (stored or 0) else 'down'} from {stored:g}"
        )
        said.append(f"Images are {size:g} pixels a side{scaled}.")
    if chance is not None:
        said.append(f"Chance, the largest class named always, is {chance:.1f} %.")
    return said


def _about_test_set(summary: Sequence[Mapping[str, Value]]) -> list[str]:
    """What the number of test images leaves open, as standard errors √(p(1 − p)/n) of a share p of n images."""
    images, chance = _common(summary, "test_images"), _common(summary, "chance")
    known = [top1 for record in summary if (top1 := number(record, "top1")) is not None]
    if not images or not known:
        return []
    error = max(_standard_error(top1, images) for top1 in known)
    said = [f"The choice of test images alone leaves a standard error of up to {error:.2g} points."]
    if images < _FEW_IMAGES:
        said.append(f"One image is {100 / images:.2g} points.")
    if chance is not None:
        margin = 2 * _standard_error(chance, images)
        near = sum(top1 <= chance + margin for top1 in known)
        rule = f"more than two standard errors ({margin:.2g} points) above it"
        if near == len(known):
            said.append(f"No method is clearly above chance: none is {rule}.")
        elif near:
            said.append(f"{near} of {len(known)} are not clearly above chance: not {rule}.")
    return said


def _standard_error(top1: float, images: float) -> float:
    """Of a share in per cent of so many images, in per cent."""
    return math.sqrt(max(top1 * (100 - top1), 0.0) / images)


def _common(summary: Sequence[Mapping[str, Value]], key: str) -> float | None:
    """The one value that the records have in field `key`; None if there is none, or more than one."""
    values = {number(record, key) for record in summary} - {None}
    return values.pop() if len(values) == 1 else None


@drawing()
def figure(rows: Sequence[Mapping[str, Value]]) -> Figure:
    """Test top-1 at the last epoch against FLOPs of one image; beside it, test top-1 and training loss by epoch."""
    groups, summary = group_rows(rows), summarise(rows)
    curves = curves_of(groups, summary)
    made = new_figure(12, 6)
    axes = made.subplot_mosaic("ab;ac", sharex=False)
    axes["a"].set(title="Test top-1 against FLOPs", ylabel="test top-1, %")
    axes["a"].set_xlabel("FLOPs per image (whole model, encoding and decoding included)")
    axes["b"].set(title="Test top-1, %")
    axes["c"].set(title="Training loss", xlabel="epoch")
    draw_results(axes["a"], curves, cost="flops_per_image", result="top1")
    draw_course(axes["b"], curves, "top1")
    draw_course(axes["c"], curves, "train_loss")
    for panel in "ab":
        mark_level(axes[panel], _common(summary, "chance"), "chance")
    add_legend(made)
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
    return [
        page.Section(
            "Result", (*notes, _COUNTS), table=page.html_table(shown, summary), caption=table_caption(summary)
        ),
        page.Section(
            "Accuracy, FLOPs and training",
            figure=png(figure(rows)),
            caption="Left: test top-1 after the last epoch against the FLOPs of one image, encoding and decoding "
            "included; up and to the left is better; bars are a sample standard deviation over seeds. Right: test top-1 "
            "and training loss by epoch; lines are means over seeds, bands go from the lowest to the highest seed. The "
            "scale is that of the later three quarters of a long training.",
        ),
    ]
