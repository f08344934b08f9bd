"""Labels beside points and at the ends of lines, placed so that none covers another or a point.

Works on matplotlib axes whose limits are set and whose figure has an Agg canvas (a label's size is measured, not
guessed). Offsets are kept in points, so a figure saved at another resolution keeps its arrangement.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

# Left, bottom, right, top, in pixels.
Box: TypeAlias = tuple[float, float, float, float]

SIZE = 9.0  # Points.
# Right of the point first, where a reader looks for its name; then left, above, below, and between.
_ANGLES = (0, 180, 90, 270, 45, 135, 315, 225, 22, 158, 338, 202, 68, 112, 248, 292)
_GAPS = (7.0, 11.0, 18.0, 26.0, 36.0, 48.0, 62.0, 80.0, 100.0, 125.0)  # Points between a point's centre and its label.
_TIED = 11.0  # From further off than this a line ties the label to its point.
_MARKER = 6.0  # Points a marker reaches from its centre.


def label_points(axes: Any, points: Sequence[tuple[float, float, float, str, str]], obstacles: Sequence[Box]) -> None:
    """Label each (x, y, half height of its error bar, text, colour), keeping off points, bars and `obstacles`.

    Each label takes the nearest place that is free; a place further off is tied to its point by a thin line.
    """
    scale = axes.figure.dpi / 72
    reach = _MARKER * scale
    taken = list(obstacles)
    marks: list[tuple[float, float, list[Box]]] = []
    for x, y, half, _, _ in points:
        px, py = (float(value) for value in axes.transData.transform((x, y)))
        bottom, top = (float(axes.transData.transform((x, y + sign * half))[1]) for sign in (-1, 1))
        own = [(px - reach, py - reach, px + reach, py + reach), (px - reach / 2, bottom, px + reach / 2, top)]
        marks.append((px, py, own))
        taken += own
    frame = axes.bbox.extents
    for (px, py, own), (x, y, _, text, color) in zip(marks, points, strict=True):
        others = [box for box in taken if box not in own]
        width, height = measure(axes, text, SIZE)
        best = (math.inf, 0.0, 0.0, 0.0, list[Box]())
        for gap, angle in itertools.product(_GAPS, _ANGLES):
            dx = math.cos(math.radians(angle)) * (width / 2 + gap * scale)
            dy = math.sin(math.radians(angle)) * (height / 2 + gap * scale)
            label = (px + dx - width / 2, py + dy - height / 2, px + dx + width / 2, py + dy + height / 2)
            leader = _leader(px, py, label) if gap > _TIED else []
            cost = sum(_overlap(label, box) for box in taken) + 10 * _outside(label, frame)
            cost += 10 * sum(_overlap(box, other) for box in leader for other in others)
            if cost < best[0]:
                best = (cost, dx, dy, gap, [label, *leader])
            if cost == 0:
                break
        _, dx, dy, gap, boxes = best
        taken += boxes
        axes.annotate(
            text,
            (x, y),
            xytext=(dx / scale, dy / scale),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=SIZE,
            color=color,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": _MARKER}
            if gap > _TIED
            else None,
            zorder=5,
        )


def label_ends(figure: Any, axes: Any, ends: Sequence[tuple[float, float, str, str, str]]) -> None:
    """Label lines at their ends (x, y, text, line colour, text colour) in a margin that is made on the right.

    There is at least one end. Labels keep the order of the ends and are pushed apart until none overlap; a thin line
    leads to each.
    """
    scale = axes.figure.dpi / 72
    size = min(SIZE, axes.bbox.height / scale / (1.3 * len(ends)))
    width = max(measure(axes, text, size)[0] for _, _, text, _, _ in ends)
    lead = 22 * scale
    right = 1 - (width + lead + 6 * scale) / figure.bbox.width
    figure.subplots_adjust(right=min(figure.subplotpars.right, max(right, 0.4)))
    bottom, top = axes.get_ylim()
    ordered = sorted(ends, key=lambda end: end[1])
    wanted = [(y - bottom) / (top - bottom) * axes.bbox.height for _, y, _, _, _ in ordered]
    for (x, y, text, color, ink), place in zip(
        ordered, spread(wanted, 1.25 * size * scale, axes.bbox.height), strict=True
    ):
        axes.annotate(
            text,
            (x, y),
            xytext=(1 + lead / axes.bbox.width, place / axes.bbox.height),
            textcoords="axes fraction",
            ha="left",
            va="center",
            fontsize=size,
            color=ink,
            parse_math=False,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.7,
                "alpha": 0.8,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )


def spread(wanted: Sequence[float], gap: float, height: float) -> list[float]:
    """Places as near to `wanted` (ascending) as can be, at least `gap` apart, within half a gap of [0, height].

    Places less than a gap apart are pooled and laid out around their mean wish, which minimises the sum of squared
    distances (isotonic regression on the places less their gaps).
    """
    pools: list[tuple[float, int]] = []  # Mean of (wish − index · gap), and how many it stands for.
    for index, place in enumerate(wanted):
        mean, size = place - index * gap, 1
        while pools and pools[-1][0] > mean:
            before, other = pools.pop()
            mean, size = (mean * size + before * other) / (size + other), size + other
        pools.append((mean, size))
    highest = height - (len(wanted) - 1) * gap
    means = [min(max(mean, 0.0), max(highest, 0.0)) for mean, size in pools for _ in range(size)]
    return [mean + index * gap for index, mean in enumerate(means)]


def measure(axes: Any, text: str, size: float) -> tuple[float, float]:
    """Width and height of `text` in pixels."""
    probe = axes.text(0, 0, text, fontsize=size, parse_math=False)
    extent = probe.get_window_extent(axes.figure.canvas.get_renderer())
    probe.remove()
    return float(extent.width), float(extent.height)


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Box, frame: Sequence[float]) -> float:
    """How far `box` reaches out of `frame`, in pixels."""
    return (
        max(0.0, frame[0] - box[0])
        + max(0.0, frame[1] - box[1])
        + max(0.0, box[2] - frame[2])
        + max(0.0, box[3] - frame[3])
    )


def _leader(px: float, py: float, label: Box) -> list[Box]:
    """The line from a point to its label as small boxes, so that it crosses nothing of another's."""
    x, y = (label[0] + label[2]) / 2, (label[1] + label[3]) / 2
    steps = [(px + (x - px) * step / 24, py + (y - py) * step / 24) for step in range(1, 24)]
    return [
        (cx - 1, cy - 1, cx + 1, cy + 1)
        for cx, cy in steps
        if not (label[0] < cx < label[2] and label[1] < cy < label[3])
    ]
