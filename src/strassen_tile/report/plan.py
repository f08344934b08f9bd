"""The report of `strassen-tile plan`: a table of layers, like ones in one line, and each line's predicted speed-up as a bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from strassen_tile.records import Row, Value
from strassen_tile.report import page
from strassen_tile.report.figures import COLORS, drawing, new_figure, png
from strassen_tile.report.table import Column, field, number, ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {"convert": COLORS[1], "leave": "#b0b7bf"}
_SHOWN = 60  # bars


def columns() -> tuple[Column, ...]:
    """Of the table."""
    return (
        Column("Layer", "layer", "left"),
        Column("Layers", "count"),
        Column("N×K×M", "shape", "left"),
        Column("Decision", "decision", "left"),
        Column("Predicted", field("predicted_speedup", ratio)),
        Column("Reason", "reason", "left"),
    )


def grouped(rows: Sequence[Mapping[str, Value]]) -> list[Row]:
    """One row for all layers that are alike but for the numbers in their names, "*" in their place; how many is `count`."""
    groups: dict[tuple[Value, ...], list[Mapping[str, Value]]] = {}
    for row in rows:
        alike = ".".join("*" if part.isdigit() else part for part in str(row["layer"]).split("."))
        groups.setdefault((alike, row["shape"], row["decision"], row["reason"]), []).append(row)
    return [
        {**members[0], "layer": str(alike) if len(members) > 1 else members[0]["layer"], "count": len(members)}
        for (alike, *_), members in groups.items()
    ]


def totals(rows: Sequence[Mapping[str, Value]]) -> tuple[float, float]:
    """Predicted seconds of all layers: dense, and with those converted that the plan converts."""
    dense = sum(number(row, "predicted_dense_s") or 0.0 for row in rows)
    keys = ("predicted_s" if row["decision"] == "convert" else "predicted_dense_s" for row in rows)
    return dense, sum(number(row, key) or 0.0 for row, key in zip(rows, keys, strict=True))


@drawing()
def figure(rows: Sequence[Mapping[str, Value]]) -> Figure:
    """Predicted speed-up of each kind of layer; grey where it is left as it is."""
    lines = grouped(rows)
    shown = lines[:_SHOWN]
    made = new_figure(9, 1.2 + 0.26 * len(shown))
    axes = made.subplots()
    places = range(len(shown))
    axes.barh(
        list(places),
        [number(row, "predicted_speedup") or 0.0 for row in shown],
        color=[_COLORS[str(row["decision"])] for row in shown],
    )
    axes.set_yticks(
        list(places),
        [f"{row['layer']} (×{row['count']})" if row["count"] != 1 else str(row["layer"]) for row in shown],
        fontsize="small",
    )
    axes.invert_yaxis()
    axes.axvline(1.0, color="0.3", linewidth=1)
    left_out = f" (first {_SHOWN} of {len(lines)} kinds of layers)" if len(lines) > _SHOWN else ""
    axes.set_xlabel(f"predicted times faster than dense{left_out}")
    axes.grid(visible=False, axis="y")
    return made


def write_report(folder: Path, rows: Sequence[Mapping[str, Value]], title: str, notes: Sequence[str]) -> Path:
    """Write `rows.json`, `plot.png` and `report.html`, see `page.write_report`; `notes` stand above the table."""
    caption = "Blue: worth converting. Grey: left as it is, for the reason given."
    return page.write_report(
        folder,
        rows,
        title,
        lambda: [
            page.Section("Layers", tuple(notes), page.html_table(columns(), grouped(rows)), png(figure(rows)), caption)
        ],
    )
