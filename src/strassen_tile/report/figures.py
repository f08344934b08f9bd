"""The figures of `strassen-tile compare`: accuracy against FLOPs, and the course of training.

Drawn through matplotlib's objects, never pyplot: the caller's plotting state stays. matplotlib is imported when the
first figure is made. A method has a colour (the palette of Okabe and Ito, told apart by colour-blind readers as well)
and a marker, its ranks have line styles, and every point and line is labelled where it is.
"""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strassen_tile.files import write_bytes
from strassen_tile.records import Value
from strassen_tile.report.labels import SIZE, Box, label_ends, label_points, measure
from strassen_tile.report.runs import Group, group_rows
from strassen_tile.report.table import number, report_extra, sample_sd

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

DPI = 150
_INK = "#24292f"
_GRID = "#dfe3e8"
# Colour of lines and points; the same darkened, for text, which needs more contrast on white; marker.
_STYLES = (
    ("#24292f", "#24292f", "o"),
    ("#0072b2", "#005a8c", "s"),
    ("#d55e00", "#a84a00", "^"),
    ("#009e73", "#00704f", "D"),
    ("#cc79a7", "#994371", "v"),
    ("#e69f00", "#8f6200", "P"),
    ("#56b4e9", "#1f75a8", "X"),
)
_LINES = ("solid", (0, (5, 1.5)), (0, (2, 1.5)), (0, (6, 1.5, 1.5, 1.5)))


@dataclass(frozen=True)
class _Series:
    group: Group
    color: str
    ink: str
    marker: str
    line: Any


@dataclass(frozen=True)
class _Point:
    series: _Series
    label: str
    cost: float
    mean: float
    sd: float


def figure_accuracy_flops(rows: Iterable[Mapping[str, Value]]) -> Figure:
    """Test top-1 at the last epoch (mean, sample standard deviation over seeds) against FLOPs per image."""
    figure = _new_figure(7.5, 5.6)
    _draw_accuracy_flops(figure, _series(rows))
    return figure


def figure_curves(rows: Iterable[Mapping[str, Value]]) -> Figure:
    """Test top-1 above training loss against the epoch: mean over seeds, and the band from lowest to highest."""
    figure = _new_figure(7.5, 6.4)
    _draw_curves(figure, _series(rows))
    return figure


def plot(rows: Iterable[Mapping[str, Value]], path: str | Path) -> None:
    """Both figures side by side as a PNG of 2250 × 900 pixels, written atomically."""
    series = _series(rows)
    figure = _new_figure(15, 6)
    grid = figure.add_gridspec(1, 2)
    _draw_accuracy_flops(figure.add_subfigure(grid[0]), series)
    _draw_curves(figure.add_subfigure(grid[1]), series)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())


def _new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, on an Agg canvas: labels are measured before anything is saved."""
    with report_extra():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _series(rows: Iterable[Mapping[str, Value]]) -> list[_Series]:
    groups = group_rows(rows)
    methods = list(dict.fromkeys(group.method for group in groups))
    series = []
    for group in groups:
        index = methods.index(group.method)
        ranks = [other.rank for other in groups if other.method == group.method]
        color, ink, marker = _STYLES[index % len(_STYLES)]
        # Past the palette's end the colours come again, with the next line style.
        line = _LINES[(ranks.index(group.rank) + index // len(_STYLES)) % len(_LINES)]
        series.append(_Series(group, color, ink, marker, line))
    return series


def _points(series: Sequence[_Series]) -> tuple[list[_Point], list[str]]:
    """What can be drawn at its last epoch, and the labels of what cannot, for want of its cost or its accuracy."""
    points, missing = [], []
    furthest = max((one.group.epochs[-1] for one in series), default=0)
    for one in series:
        last = one.group.epochs[-1]
        # A method still training beside finished ones is not to be taken for one of them.
        label = one.group.label if last == furthest else f"{one.group.label} (epoch {last})"
        top1 = one.group.values("top1", last)
        known = [value for value in top1 if value is not None]
        cost = number(one.group.shared(), "flops_per_image")
        if cost is None or len(known) < len(top1):
            missing.append(label)
        else:
            points.append(_Point(one, label, cost, statistics.fmean(known), sample_sd(known) or 0.0))
    return points, missing


def _draw_accuracy_flops(figure: Figure | SubFigure, series: Sequence[_Series]) -> None:
    axes = figure.subplots()
    figure.subplots_adjust(left=0.11, right=0.97, bottom=0.12, top=0.91)
    _dress(axes, "Test top-1 against FLOPs")
    points, missing = _points(series)
    scale, unit = _unit(max((point.cost for point in points), default=1e9))
    axes.set_ylabel("test top-1, %", color=_INK)
    axes.set_xlabel(f"{unit}FLOPs per image (whole model, encoding and decoding included)", color=_INK)
    if missing:
        told = "not shown, cost or accuracy unknown: " + ", ".join(missing)
        axes.set_title(told, loc="right", fontsize=8, color=_INK, parse_math=False)
    if not points:
        _say_nothing(axes)
        return
    # From zero: the distance to the left edge is then the cost itself. On the right, room for the last point's label.
    widest = max(measure(axes, point.label, SIZE)[0] for point in points) / axes.bbox.width
    axes.set_xlim(0, max(point.cost for point in points) / scale / (1 - min(widest + 0.04, 0.4)))
    low = min(point.mean - point.sd for point in points)
    high = max(point.mean + point.sd for point in points)
    pad = max(0.15 * (high - low), 0.25)
    axes.set_ylim(low - pad, high + pad)
    sweeps: dict[str, list[_Point]] = {}
    for point in points:
        x, style = point.cost / scale, point.series
        axes.plot(x, point.mean, color=style.color, marker=style.marker, markersize=8, zorder=3)
        if point.sd:
            axes.errorbar(x, point.mean, point.sd, fmt="none", ecolor=style.color, capsize=3, elinewidth=1.2, zorder=3)
        sweeps.setdefault(style.group.method, []).append(point)
    obstacles: list[Box] = []
    for sweep in sweeps.values():
        line = sorted((point.cost / scale, point.mean) for point in sweep)
        axes.plot(*zip(*line, strict=True), color=sweep[0].series.color, linewidth=1, alpha=0.5, zorder=2)
        obstacles += _along(axes, line)
    spots = [(point.cost / scale, point.mean, point.sd, point.label, point.series.ink) for point in points]
    label_points(axes, spots, obstacles)


def _draw_curves(figure: Figure | SubFigure, series: Sequence[_Series]) -> None:
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.subplots_adjust(left=0.11, right=0.97, bottom=0.11, top=0.92, hspace=0.22)
    lower.set_xlabel("epoch", color=_INK)
    reached = [epoch for one in series for epoch in one.group.epochs] or [1]
    edge = 0.02 * (max(reached) - min(reached)) or 1
    lower.set_xlim(min(reached) - edge, max(reached) + edge)
    lower.xaxis.get_major_locator().set_params(integer=True)
    for axes, key, title in ((upper, "top1", "Test top-1, %"), (lower, "train_loss", "Training loss")):
        _dress(axes, title)
        ends = []
        for one in series:
            epochs = one.group.epochs
            mean, low, high = zip(*(_spread_at(one.group, key, epoch) for epoch in epochs), strict=True)
            axes.fill_between(epochs, low, high, color=one.color, alpha=min(0.15, 0.9 / len(series)), linewidth=0)
            axes.plot(epochs, mean, color=one.color, linestyle=one.line, linewidth=1.6, zorder=3)
            finite = [(epoch, value) for epoch, value in zip(epochs, mean, strict=True) if value == value]
            if finite:
                epoch, value = finite[-1]
                axes.plot(epoch, value, color=one.color, marker=one.marker, markersize=5, zorder=4)
                ends.append((epoch, value, one.group.label, one.color, one.ink))
        if ends:
            _close_in(axes, [epoch for epoch, *_ in ends])
            label_ends(figure, axes, ends)
        else:
            _say_nothing(axes)


def _spread_at(group: Group, key: str, epoch: int) -> tuple[float, float, float]:
    """Mean, lowest and highest over seeds; NaN, which interrupts a line, where a seed's value is unknown."""
    values = group.values(key, epoch)
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return (math.nan, math.nan, math.nan)
    return statistics.fmean(known), min(known), max(known)


def _dress(axes: Any, title: str) -> None:
    """The look of all axes, set outright: a dark style in the user's matplotlibrc would hide dark ink."""
    axes.set_facecolor("white")
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#8c959f")


def _say_nothing(axes: Any) -> None:
    axes.set_yticks([])
    axes.text(0.5, 0.5, "nothing to show yet", transform=axes.transAxes, ha="center", va="center", color="#57606a")


def _close_in(axes: Any, ends: Sequence[float]) -> None:
    """Fit the height to what comes after the first quarter of training, where the methods part.

    Long runs begin so far off that on a scale for all of it the differences at the end cannot be seen. Lines that end
    earlier (at the epochs `ends`) stay in sight.
    """
    start = min(1 + max(ends) // 4 if max(ends) >= 8 else 1, *ends)
    drawn = [line.get_xydata() for line in axes.lines]
    drawn += [path.vertices for band in axes.collections for path in band.get_paths()]
    later = [float(y) for vertices in drawn for x, y in vertices if x >= start and y == y]
    pad = 0.05 * (max(later) - min(later)) or 0.5
    axes.set_ylim(min(later) - pad, max(later) + pad)


def _unit(n: float) -> tuple[float, str]:
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # A little under the unit still reads better in it: 0.3 GFLOPs.
        if n >= 0.2 * scale:
            return scale, unit
    return 1.0, ""


def _along(axes: Any, sweep: Sequence[tuple[float, float]]) -> list[Box]:
    """A drawn line as small boxes, in pixels, for labels to keep off."""
    corners = [tuple(corner) for corner in axes.transData.transform(sweep)]
    steps = [step / 40 for step in range(41)]
    spots = [
        (x0 + (x1 - x0) * t, y0 + (y1 - y0) * t) for (x0, y0), (x1, y1) in itertools.pairwise(corners) for t in steps
    ]
    return [(x - 1, y - 1, x + 1, y + 1) for x, y in spots]
