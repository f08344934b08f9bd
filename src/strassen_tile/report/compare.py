"""The report of `strassen-tile compare`: its table, and the files it leaves.

Row fields are in `report.runs`, drawing in `report.figures`; everything the command needs is importable from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from strassen_tile.records import Row, Value, environment_of, write_rows
from strassen_tile.report.figures import figure_accuracy_flops, figure_curves, plot
from strassen_tile.report.page import Section, figure_svg, html_table, write_page
from strassen_tile.report.runs import Group, group_rows, summarise
from strassen_tile.report.table import MISSING, Column, count, fewer, field, flops, number, percent, plus_minus

__all__ = [
    "Group",
    "columns",
    "figure_accuracy_flops",
    "figure_curves",
    "group_rows",
    "plot",
    "summarise",
    "table_caption",
    "write_report",
]

# The two ways of counting stand side by side in the table; this says which is which.
_COUNTS = (
    "FLOPs fewer is dense over this method: 2× is half the operations. Products counts, in the converted layers only, "
    "the operations of the products in the place of the dense one; all-in adds what encoding and decoding take; whole "
    "model is the FLOPs of a dense model's image over this one's, everything counted. Conv. share is the part of the "
    "dense model's FLOPs that lies in the layers converted; time is that of training."
)


def columns(state: bool = False) -> tuple[Column, ...]:
    """The columns of the comparison, for records of `summarise`.

    Args:
        state: end with a column that says how far each seed is; for runs that have not all finished.
    """
    shown = (
        Column("Method", "method", "left"),
        Column("Rank", "rank"),
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
    """What the numbers of the table are: of which epoch, over how many seeds, finished or not."""
    if not summary:
        return "No rows yet."
    epochs = sorted({int(number(record, "epoch") or 0) for record in summary})
    seeds = sorted({int(number(record, "seeds") or 0) for record in summary})
    epoch = f"epoch {epochs[0]}" if len(epochs) == 1 else f"the last epoch reached ({epochs[0]} to {epochs[-1]})"
    over = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    noun = "seed" if seeds == [1] else "seeds"
    spread = "" if seeds == [1] else " ± sample standard deviation"
    text = f"Test top-1 at {epoch}: mean{spread} over {over} {noun}."
    if not all(record["complete"] for record in summary):
        text += " Training has not finished: only the seeds at a method's last epoch are averaged."
    return text


def write_report(
    out_dir: str | Path, rows: Sequence[Mapping[str, Value]], title: str, notes: Sequence[str] = ()
) -> Path:
    """Write `rows.json`, `plot.png` and `report.html` into `out_dir`, each atomically; needs matplotlib.

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
    folder = Path(out_dir)
    # The rows first: whatever goes wrong in the drawing, what was measured is kept.
    write_rows(folder / "rows.json", rows)
    summary: list[Row] = summarise(rows)
    plot(rows, folder / "plot.png")
    running = not all(record["complete"] for record in summary)
    page = folder / "report.html"
    write_page(
        page,
        title,
        [
            Section(
                "Result",
                (*notes, _COUNTS),
                table=html_table(columns(state=running), summary),
                caption=table_caption(summary),
            ),
            Section(
                "Accuracy against FLOPs",
                figure=figure_svg(figure_accuracy_flops(rows)),
                caption="Test top-1 after the last epoch against the FLOPs of one image, encoding and decoding "
                "included. Up and to the left is better. Bars: sample standard deviation over seeds.",
            ),
            Section(
                "Training",
                figure=figure_svg(figure_curves(rows)),
                caption="Test top-1 and training loss against the epoch. Lines: mean over seeds; bands: lowest to "
                "highest seed. The scale is that of the later three quarters of a long training.",
            ),
        ],
        environment_of(rows),
    )
    return page
