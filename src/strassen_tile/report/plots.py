"""What reports of training draw: results against a cost, and the course of training.

Up to `FEW` groups of runs each have a name in the legend. More are told apart by a code: a colour for each method and its
settings, a marker and a stroke for the mix of tokens (`mix …` in their variant), and the legend is its key.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from strassen_tile.records import Value
from strassen_tile.report.figures import COLORS, LINES, MARKERS, MORE_COLORS, say_if_empty
from strassen_tile.report.groups import Group, furthest_of
from strassen_tile.report.sooner import flops_of
from strassen_tile.report.table import number

FEW = 12


class Curve(NamedTuple):
    """One group of runs, its record of `runs.summarise`, and how it is drawn (matplotlib's keywords)."""

    group: Group
    record: Mapping[str, Value]
    style: dict[str, Any]


def curves_of(groups: Sequence[Group], summary: Sequence[Mapping[str, Value]]) -> list[Curve]:
    """Groups with their records and looks: of few groups, a colour for each method (of one alone, each group) and a marker
    for each group; of many, see above.
    """
    methods = list(dict.fromkeys(group.method for group in groups))
    bases, mixes = _bases(groups), _mixes(groups)
    curves = []
    for index, (group, record) in enumerate(zip(groups, summary, strict=True)):
        of_method = [other for other in groups if other.method == group.method]
        style = {
            "color": COLORS[(methods.index(group.method) if methods[1:] else index) % len(COLORS)],
            "linestyle": LINES[of_method.index(group) % len(LINES)],
            "marker": MARKERS[index % len(MARKERS)],
        }
        if len(groups) > FEW:
            base, mix = split_mix(group)
            place, round_ = bases.index(base) % len(MORE_COLORS), bases.index(base) // len(MORE_COLORS)
            style = {
                "color": MORE_COLORS[place],
                "linestyle": LINES[mixes.index(mix) % len(LINES)],
                "marker": MARKERS[(mixes.index(mix) + len(mixes) * round_) % len(MARKERS)],
            }
        curves.append(Curve(group, record, style))
    return curves


def key_of(curves: Sequence[Curve]) -> dict[str, dict[str, Any]] | None:
    """The key of the code for `figures.add_legend`; None where each group has a name of its own in the legend."""
    groups = [curve.group for curve in curves]
    mixes = _mixes(groups)
    if len(groups) <= FEW or len(mixes) < 2:
        return None
    key: dict[str, dict[str, Any]] = {}
    for curve in curves:
        base, _ = split_mix(curve.group)
        key.setdefault(base, {**curve.style, "linestyle": "solid"})
    for index, mix in enumerate(mixes):
        look = {"color": "0.35", "linestyle": LINES[index % len(LINES)], "marker": MARKERS[index % len(MARKERS)]}
        key[f"with {mix}" if mix else "without a mix"] = look
    return key


def split_mix(group: Group) -> tuple[str, str]:
    """A group's name without its mix of tokens, and the mix: "stl r=24" and "mix grid"; "" where there is none."""
    parts = group.shown.split(", ")
    mix = ", ".join(part for part in parts if part.startswith("mix "))
    return f"{group.method} {', '.join(part for part in parts if not part.startswith('mix '))}".strip(), mix


def products_only(record: Mapping[str, Value]) -> float | None:
    """FLOPs of one image through the whole model, without encoding and decoding; None if unknown.

    The whole model's less what the converted layers take beyond their products: with dense's FLOPs d = flops_per_image /
    flop_ratio, that is d · share_converted · (flop_ratio_all_in − flop_ratio_products).
    """
    names = ("flops_per_image", "flop_ratio", "share_converted", "flop_ratio_all_in", "flop_ratio_products")
    whole, ratio, share, all_in, products = (number(record, name) for name in names)
    if whole is None or not ratio or share is None or all_in is None or products is None:
        return None
    return whole - whole / ratio * share * (all_in - products)


def draw_results(
    axes: Any, curves: Sequence[Curve], *, cost: str, result: str, named: bool = True, beside: bool = False
) -> None:
    """Field `result` at the last epoch against field `cost`, with bars of a standard deviation; labelled for a legend.

    Args:
        axes: to draw on.
        curves: from `curves_of`.
        cost: field of the records, on the axis from zero.
        result: field of the records.
        named: in the legend; if not, the labels are hidden from it by a leading "_".
        beside: mark the cost of the products alone too, hollow, with a thin line to the point; `cost` is then the FLOPs.
    """
    from matplotlib.ticker import EngFormatter

    furthest = furthest_of([curve.group for curve in curves])
    coded, size = key_of(curves) is not None, 8 if len(curves) <= FEW else 6
    for group, record, style in curves:
        # A run still in training is not to be taken for a finished one.
        behind = record["epoch"] != furthest and not group.over(furthest)
        label = f"{group.label} (epoch {record['epoch']})" if behind else group.label
        hidden = not named or (coded and not behind)
        x, y, sd = (number(record, key) for key in (cost, result, f"{result}_sd"))
        if x is None or y is None:
            if named:
                axes.plot([], [], label=f"{label} (no point: cost or result unknown)", **style)
            continue
        axes.plot(x, y, markersize=size, label=f"_{label}" if hidden else label, **style)
        if sd:
            axes.errorbar(x, y, sd, fmt="none", ecolor=style["color"], capsize=3, linewidth=1)
        if beside and (alone := products_only(record)) is not None and alone < 0.995 * x:
            look = {**style, "linestyle": "solid", "markevery": [0], "markerfacecolor": "none"}
            axes.plot(
                [alone, x], [y, y], markersize=size - 1, linewidth=0.8, label=f"_{group.label}: products only", **look
            )
    axes.margins(y=0.15)
    # From zero: the distance to the left edge is then the cost itself.
    axes.set_xlim(0, 1.06 * max((number(curve.record, cost) or 0 for curve in curves), default=0) or 1)
    axes.xaxis.set_major_formatter(EngFormatter())
    say_if_empty(axes)


def draw_course(axes: Any, curves: Sequence[Curve], field: str, *, by_flops: bool = False) -> None:
    """Field `field` by epoch or by training FLOPs: the mean over seeds, and a band from the lowest to the highest of them.

    Args:
        axes: to draw on.
        curves: from `curves_of`.
        field: of the rows.
        by_flops: against cumulative training FLOPs, all-in; every group must know its own.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    last = max((curve.group.epochs[-1] for curve in curves), default=1)
    # Long runs begin so far off that on a scale for all of it the differences at the end cannot be seen: the height
    # fits what comes after the first quarter, and the ends of runs that stopped before.
    start = min([1 + last // 4 if last >= 8 else 1, *(curve.group.epochs[-1] for curve in curves)])
    seen = []
    for group, record, style in curves:
        epochs = group.epochs
        each = (flops_of(group, 1) or 0.0) if by_flops else 1.0
        x = [each * epoch for epoch in epochs]
        mean, low, high = zip(*(_spread(group.values(field, epoch)) for epoch in epochs), strict=True)
        if len(curves) <= FEW:  # of more, the bands would hide each other
            axes.fill_between(x, low, high, color=style["color"], alpha=min(0.15, 0.9 / len(curves)), linewidth=0)
        there = number(record, "epochs_to_target")
        at = {*([epochs.index(int(there))] if there in epochs else []), len(epochs) - 1}
        axes.plot(x, mean, markersize=5, markevery=sorted(at), linewidth=1.5 if len(curves) <= FEW else 1, **style)
        ends = (low, high) if len(curves) <= FEW else (mean,)
        seen += [value for values in ends for epoch, value in zip(epochs, values, strict=True) if epoch >= start]
    finite = [value for value in seen if math.isfinite(value)]
    if finite:
        margin = 0.05 * (max(finite) - min(finite)) or 0.5
        axes.set_ylim(min(finite) - margin, max(finite) + margin)
    if by_flops:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    say_if_empty(axes)


def mark_level(axes: Any, level: float | None, label: str) -> None:
    """A dotted line at `level` if that is within the limits of the axes."""
    low, high = axes.get_ylim()
    if level is not None and low <= level <= high:
        axes.axhline(level, color="0.4", linestyle=":", linewidth=1.2, label=label)


def mark_end(axes: Any, dense: Group, level: float | None, *, by_flops: bool) -> None:
    """Thin dotted lines at the end of `dense`'s curve: `level`, what it ends with, and at which cost."""
    last = dense.epochs[-1]
    x, y = flops_of(dense, last) if by_flops else last, level
    look = {"color": "0.4", "linestyle": (0, (1, 2)), "linewidth": 1.0}
    if y is not None:
        axes.axhline(y, label="dense's end", **look)
    if x is not None:
        axes.axvline(x, label="_dense's end", **look)


def _bases(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(split_mix(group)[0] for group in groups))


def _mixes(groups: Sequence[Group]) -> list[str]:
    """The mixes there are, none first: the plainest stroke is that of no mix."""
    return sorted(dict.fromkeys(split_mix(group)[1] for group in groups), key=lambda mix: mix != "")


def _spread(values: Sequence[float | None]) -> tuple[float, float, float]:
    """Mean, lowest and highest; NaN, which interrupts a line, where one is unknown."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return math.nan, math.nan, math.nan
    return statistics.fmean(known), min(known), max(known)
