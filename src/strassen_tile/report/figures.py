"""How figures look, and what reports of training draw: results against cost, and the course of training.

Drawn through matplotlib's objects, never pyplot, and in one style whatever the user's matplotlibrc says; the caller's
plotting state stays as it was. matplotlib is imported when the first figure is made.
"""

from __future__ import annotations

import contextlib
import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from strassen_tile.records import Value
from strassen_tile.report.runs import Group
from strassen_tile.report.table import number, report_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which colour-blind readers can tell apart too.
COLORS = ("#24292f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_LINES = ("solid", (0, (5, 1.5)), (0, (2, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "os^DvPX<>*ph"
_STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 9,
    "grid.color": "#dfe3e8",
}


class Curve(NamedTuple):
    """One group of runs, its record of `runs.summarise`, and how it is drawn (matplotlib's keywords)."""

    group: Group
    record: Mapping[str, Value]
    style: dict[str, Any]


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Around everything that makes or saves a figure, also as a decorator: matplotlib is there, in our style."""
    with report_extra():
        import matplotlib.style
    with matplotlib.style.context(["default", _STYLE]):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, whose parts make room for each other."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@drawing()
def png(figure: Figure) -> bytes:
    """A figure as a PNG file of 150 dots an inch, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def curves_of(groups: Sequence[Group], summary: Sequence[Mapping[str, Value]]) -> list[Curve]:
    """Groups with their records and looks: a colour for each method (of one alone, each group), a marker for each group."""
    methods = list(dict.fromkeys(group.method for group in groups))
    curves = []
    for index, (group, record) in enumerate(zip(groups, summary, strict=True)):
        of_method = [other for other in groups if other.method == group.method]
        style = {
            "color": COLORS[(methods.index(group.method) if methods[1:] else index) % len(COLORS)],
            "linestyle": _LINES[of_method.index(group) % len(_LINES)],
            "marker": MARKERS[index % len(MARKERS)],
        }
        curves.append(Curve(group, record, style))
    return curves


def draw_results(axes: Any, curves: Sequence[Curve], *, cost: str, result: str) -> None:
    """Field `result` at the last epoch against field `cost`, with bars of a standard deviation; labelled for a legend."""
    from matplotlib.ticker import EngFormatter

    furthest = max((number(curve.record, "epoch") or 0 for curve in curves), default=0)
    for group, record, style in curves:
        # A run still in training is not to be taken for a finished one.
        label = group.label if record["epoch"] == furthest else f"{group.label} (epoch {record['epoch']})"
        x, y, sd = (number(record, key) for key in (cost, result, f"{result}_sd"))
        if x is None or y is None:
            axes.plot([], [], label=f"{label} (no point: cost or result unknown)", **style)
            continue
        axes.plot(x, y, markersize=8, label=label, **style)
        if sd:
            axes.errorbar(x, y, sd, fmt="none", ecolor=style["color"], capsize=3)
    axes.margins(y=0.15)
    # From zero: the distance to the left edge is then the cost itself.
    axes.set_xlim(0, 1.06 * max((number(curve.record, cost) or 0 for curve in curves), default=0) or 1)
    axes.xaxis.set_major_formatter(EngFormatter())
    _say_if_empty(axes)


def draw_course(axes: Any, curves: Sequence[Curve], field: str) -> None:
    """Field `field` against the epoch: the mean over seeds, and a band from the lowest to the highest of them."""
    from matplotlib.ticker import MaxNLocator

    last = max((curve.group.epochs[-1] for curve in curves), default=1)
    # Long runs begin so far off that on a scale for all of it the differences at the end cannot be seen: the height
    # fits what comes after the first quarter, and the ends of runs that stopped before.
    start = min([1 + last // 4 if last >= 8 else 1, *(curve.group.epochs[-1] for curve in curves)])
    seen = []
    for group, _, style in curves:
        epochs = group.epochs
        mean, low, high = zip(*(_spread(group.values(field, epoch)) for epoch in epochs), strict=True)
        axes.fill_between(epochs, low, high, color=style["color"], alpha=min(0.15, 0.9 / len(curves)), linewidth=0)
        axes.plot(epochs, mean, markersize=5, markevery=[-1], **style)
        seen += [value for epoch, *ends in zip(epochs, low, high, strict=True) if epoch >= start for value in ends]
    finite = [value for value in seen if math.isfinite(value)]
    if finite:
        margin = 0.05 * (max(finite) - min(finite)) or 0.5
        axes.set_ylim(min(finite) - margin, max(finite) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _say_if_empty(axes)


def mark_level(axes: Any, level: float | None, label: str) -> None:
    """A dotted line at `level` if that is within the limits of the axes."""
    low, high = axes.get_ylim()
    if level is not None and low <= level <= high:
        axes.axhline(level, color="0.4", linestyle=":", linewidth=1.2, label=label)


def add_legend(figure: Figure) -> None:
    """One legend for the whole figure, below it, of what is labelled in any of its axes."""
    named = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if named:
        # At this size an inch holds 12 letters or more, and line, marker and gaps take the place of 11.
        columns = max(1, min(len(named), int(12 * figure.get_figwidth()) // (11 + max(map(len, named)))))
        legend = figure.legend(
            named.values(), named, loc="outside lower center", ncols=columns, handlelength=4, frameon=False
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # a dollar in a name is a dollar


def _spread(values: Sequence[float | None]) -> tuple[float, float, float]:
    """Mean, lowest and highest; NaN, which interrupts a line, where one is unknown."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return math.nan, math.nan, math.nan
    return statistics.fmean(known), min(known), max(known)


def _say_if_empty(axes: Any) -> None:
    if not any(math.isfinite(y) for line in axes.lines for y in line.get_ydata()):
        axes.text(0.5, 0.5, "nothing to show yet", transform=axes.transAxes, ha="center", va="center", color="0.4")
