"""The report of `strassen-tile bench`: a table of speed-ups, and a plot of them against size with the limit drawn in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strassen_tile.records import Value
from strassen_tile.report import page
from strassen_tile.report.figures import COLORS, MARKERS, add_legend, drawing, new_figure, png
from strassen_tile.report.table import Column, field, number, ratio, seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def columns() -> tuple[Column, ...]:
    """Of the table, for the rows of a bench as they are: narrow enough for a terminal."""
    return (
        Column("N×K×M, dtype, pass", _what, "left"),
        Column("Method", lambda row: f"{row['method']} {row['rank'] or ''}".strip(), "left"),
        Column("Dense", field("dense_s", seconds)),
        Column("Time", field("median_s", seconds)),
        Column("Speed-up", field("speedup", ratio)),
        Column("Limit", field("limit", ratio)),
        Column("Predicted", _predicted),
    )


def page_columns() -> tuple[Column, ...]:
    """Of the page's table: the spread of the pairs and the error as well."""
    return (
        *columns(),
        Column("20–80 %", lambda row: f"{ratio(number(row, 'speedup_q20'))}–{ratio(number(row, 'speedup_q80'))}"),
        Column("Error", lambda row: f"{number(row, 'error') or 0:.1e}"),
    )


def prediction_error(rows: Iterable[Mapping[str, Value]]) -> float | None:
    """Median over rows of |predicted − measured| / measured, of STL times and the dense ones beside them."""
    errors = []
    for row in rows:
        for guess, truth in (("predicted_s", "median_s"), ("predicted_dense_s", "dense_s")):
            predicted, measured = number(row, guess), number(row, truth)
            if predicted is not None and measured:
                errors.append(abs(predicted - measured) / measured)
    return sorted(errors)[len(errors) // 2] if errors else None


def decisions(rows: Iterable[Mapping[str, Value]]) -> tuple[int, int]:
    """In how many rows the prediction is on the side of 1× that was measured, and of how many."""
    pairs = [
        (dense > stl, speedup > 1)
        for row in rows
        if (dense := number(row, "predicted_dense_s")) and (stl := number(row, "predicted_s"))
        if (speedup := number(row, "speedup"))
    ]
    return sum(guess == truth for guess, truth in pairs), len(pairs)


@drawing()
def figure(rows: Sequence[Mapping[str, Value]]) -> Figure:
    """Speed-up over dense against (NKM)^⅓: a panel for each dtype and pass, a line and a limit for each method and rank."""
    panels = list(dict.fromkeys((str(row["dtype"]), str(row["pass"])) for row in rows)) or [("", "")]
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    made = new_figure(6 * across, 4.4 * down)
    series = list(dict.fromkeys((str(row["method"]), row["rank"]) for row in rows))
    for axes, (dtype, name) in zip(made.subplots(down, across, squeeze=False).flat, panels, strict=False):
        for index, (method, rank) in enumerate(series):
            chosen = [r for r in rows if (r["dtype"], r["pass"], r["method"], r["rank"]) == (dtype, name, method, rank)]
            _line(axes, chosen, f"{method} r={rank}" if rank else method, index, method)
        axes.axhline(1.0, color="0.3", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("size, (N·K·M)^⅓")
        axes.set_ylabel("times faster than dense")
        axes.set_title(f"{dtype}, {name}")
    for axes in made.axes[len(panels) :]:
        axes.remove()
    add_legend(made)
    return made


def write_report(folder: Path, rows: Sequence[Mapping[str, Value]], title: str, notes: Sequence[str] = ()) -> Path:
    """Write `rows.json`, `plot.png` and `report.html`, see `page.write_report`; `notes` stand above the table."""
    caption = (
        "Speed-up: median over alternating pairs of runs of dense time over this one. Limit: arithmetic of the products "
        "alone. Error: relative, against float64. Predicted: from the machine's measured rates."
    )
    return page.write_report(
        folder,
        rows,
        title,
        lambda: [
            page.Section("Speed", tuple(notes), page.html_table(page_columns(), rows), caption=caption),
            page.Section(
                "Against size", figure=png(figure(rows)), caption="Dashed: the limit. Shaded: 20 to 80 % of the pairs."
            ),
        ],
    )


def _line(axes: Any, rows: Sequence[Mapping[str, Value]], label: str, index: int, method: str) -> None:
    points = sorted(
        (
            round((_real(r, "n") * _real(r, "k") * _real(r, "m")) ** (1 / 3)),
            _real(r, "speedup"), _real(r, "speedup_q20"), _real(r, "speedup_q80"), _real(r, "limit"),
        )
        for r in rows
    )  # fmt: skip
    if not points:
        return
    x, y, low, high, limit = zip(*points, strict=True)
    color, style = COLORS[(index + 1) % len(COLORS)], "-" if method == "stl" else ":"
    axes.plot(x, y, style, marker=MARKERS[index % len(MARKERS)], color=color, label=label)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    if method != "low-rank":
        axes.plot(x, limit, "--", color=color, linewidth=1, alpha=0.7)


def _what(row: Mapping[str, Value]) -> str:
    sizes = [int(_real(row, key)) for key in ("n", "k", "m")]
    shape = f"{sizes[0]}³" if len(set(sizes)) == 1 else "×".join(map(str, sizes))
    dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(str(row["dtype"]), str(row["dtype"]))
    return f"{shape} {dtype} {row['pass']}"


def _predicted(row: Mapping[str, Value]) -> str:
    dense, stl = number(row, "predicted_dense_s"), number(row, "predicted_s")
    return ratio(dense / stl if dense and stl else None)


def _real(row: Mapping[str, Value], key: str) -> float:
    return number(row, key) or 0.0
