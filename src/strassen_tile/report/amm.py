"""The report of `strassen-tile amm`: error of approximate products against FLOPs and against seconds.

A row is one method at one budget on one product: `data`, `n`, `k`, `m`, `method`, `basis`, `flop_ratio` (all in, of dense's),
`error` (relative, squared; the mean over `trials`, `error_sd`), `predicted` (on Gaussian data), `cosine`, `time_ratio` (of
dense's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strassen_tile.records import Value
from strassen_tile.report import page
from strassen_tile.report.figures import LINES, MARKERS, MORE_COLORS, add_legend, drawing, new_figure, png
from strassen_tile.report.table import Column, field, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NOTE = (
    "Error: ‖x w − approximation‖² / ‖x w‖². FLOPs: of what is done at every call, all in (encoding, maps, products, "
    "decoding; a table row added is an addition a number), as a fraction of dense's; the weight is prepared beforehand. "
    "int8 has as many operations as dense, of integers. rademacher is counted as additions and fast-jl as a sparse map, but "
    "both run as dense products. Time: median over alternating pairs, as a fraction of dense's on "
    "this machine. What is fitted to rows was fitted to others than are measured. Nothing was retrained."
)


def columns() -> tuple[Column, ...]:
    """The columns of the table, for rows as they are."""
    return (
        Column("Product", lambda row: str(row["data"]), "left"),
        Column("Method", lambda row: str(row.get("basis") or row["method"]), "left"),
        Column("FLOPs, of dense's", field("flop_ratio", _three)),
        Column("Error", _error),
        Column("Predicted", field("predicted", _four), optional=True, spare=2),
        Column("Cosine", field("cosine", _four), spare=3),
        Column("Time, of dense's", field("time_ratio", lambda x: "–" if x is None else f"{x:.2f}"), spare=1),
    )


@drawing()
def figure(rows: Sequence[Mapping[str, Value]]) -> Figure:
    """Error against FLOPs and against time: two panels for each product, a line for each method."""
    products = list(dict.fromkeys(str(row["data"]) for row in rows)) or [""]
    methods = list(dict.fromkeys(str(row["method"]) for row in rows))
    made = new_figure(12, 4.5 * len(products))
    axes = made.subplots(len(products), 2, squeeze=False)
    for row_of_axes, product in zip(axes, products, strict=True):
        for panel, cost, label in zip(
            row_of_axes, ("flop_ratio", "time_ratio"), ("FLOPs, of dense's", "time, of dense's"), strict=True
        ):
            for index, method in enumerate(methods):
                _line(
                    panel,
                    [row for row in rows if row["data"] == product and row["method"] == method],
                    cost,
                    index,
                    method,
                )
            panel.set(title=product, xlabel=label, ylabel="relative squared error", yscale="log", xscale="log")
            panel.axvline(1.0, color="0.3", linewidth=1)
            _plain_ticks(panel.xaxis)
    add_legend(made)
    return made


def write_report(out: Path, rows: Sequence[Mapping[str, Value]], title: str) -> Path:
    """Write `rows.json`, `plot.png` and `report.html` into `out`; the path of the page."""
    return page.write_report(
        out,
        rows,
        title,
        lambda: [
            page.Section("Error, FLOPs and time", (_NOTE,), figure=png(figure(rows))),
            page.Section(
                "All of them", table=page.html_table(columns(), rows), caption="In the order they were measured."
            ),
        ],
    )


def _line(axes: Any, rows: Sequence[Mapping[str, Value]], cost: str, index: int, label: str) -> None:
    found = ((number(row, cost), number(row, "error")) for row in rows)
    points = sorted((at, error) for at, error in found if at and error and error > 1e-9)
    if points:
        stl = label == "stl"
        look = {"color": MORE_COLORS[index % len(MORE_COLORS)], "marker": MARKERS[index % len(MARKERS)]}
        dashes = LINES[index // len(MORE_COLORS) % len(LINES)]
        axes.plot(
            *zip(*points, strict=True), label=label, linewidth=2.5 if stl else 1, linestyle=dashes, markersize=4, **look
        )


def _plain_ticks(axis: Any) -> None:
    """Ratios as people write them, 0.2 and 5, and no more of them than a panel has room for."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _error(row: Mapping[str, Value]) -> str:
    error, sd = number(row, "error"), number(row, "error_sd")
    if error is None:
        return "–"
    return f"{error:.2g}" if error < 1e-3 else f"{error:.4f}" + ("" if sd is None else f" ± {sd:.4f}")


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _four(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
