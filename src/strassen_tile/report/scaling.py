"""Loss against compute, over runs of several budgets: a power law for each method, and how many FLOPs one saves at equal loss.

Each run counts with its end alone: its schedule was made for its budget. The law is log L = α − β log C, fitted by least
squares over the runs of a method; what seeds leave open is found by fitting again to draws of them (bootstrap).
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from strassen_tile.errors import DataError
from strassen_tile.records import Value
from strassen_tile.report.sooner import TRAINING_OF_FORWARD
from strassen_tile.report.table import number

DRAWS = 1000
_NEAR = 1.05
_LARGEST = 700.0  # of which e to the power is a float


class Point(NamedTuple):
    """The end of a run: training FLOPs of the whole model, and bits a byte of the test text."""

    flops: float
    bits: float


class Law(NamedTuple):
    """log L = alpha − beta log C."""

    alpha: float
    beta: float

    def bits(self, flops: float) -> float:
        """The loss at a budget."""
        return math.exp(self.alpha - self.beta * math.log(flops))

    def flops(self, bits: float) -> float:
        """The budget of a loss; infinite where loss does not fall."""
        power = (self.alpha - math.log(bits)) / self.beta if self.beta > 0 else math.inf
        return math.exp(power) if power < _LARGEST else math.inf


class Saving(NamedTuple):
    """FLOPs of one method as a fraction of another's at equal loss: by the laws, and where the middle 95 % of draws lie."""

    ratio: float
    low: float
    high: float


def ends(rows: Iterable[Mapping[str, Value]]) -> dict[tuple[str, str], list[list[Point]]]:
    """Method and mix → for each budget the ends of its runs, seed by seed; from rows of `pretrain`, of any number of folders.

    What a variant says of rate, width and schedule is left out: of networks of several widths a method is what they have in
    common.
    """
    found: dict[tuple[str, str], dict[float, list[Point]]] = {}
    for row in rows:
        bits, each, tokens = (number(row, key) for key in ("bits", "flops_per_token", "tokens_per_epoch"))
        if bits is None or each is None or tokens is None:
            continue
        flops = TRAINING_OF_FORWARD * each * tokens * (number(row, "epoch") or 0)
        kept = [
            said
            for said in str(row["variant"]).split(", ")
            if said and not said.startswith(("lr ", "width ")) and not said.endswith(" epochs")
        ]
        found.setdefault((str(row["method"]), ", ".join(kept)), {}).setdefault(flops, []).append(Point(flops, bits))
    return {key: [budgets[flops] for flops in sorted(budgets)] for key, budgets in found.items()}


def best_of_each(budgets: Sequence[Sequence[Point]]) -> list[list[Point]]:
    """Where a method stands at *its* best size for each budget: of those within 5 % the best, if no cheaper one is better.

    (Epochs are whole, so that sizes spend a budget but nearly.)
    """
    near: list[list[Sequence[Point]]] = []
    for runs in sorted(budgets, key=lambda runs: runs[0].flops):
        if near and runs[0].flops <= _NEAR * near[-1][0][0].flops:
            near[-1].append(runs)
        else:
            near.append([runs])
    kept: list[list[Point]] = []
    for sizes in near:
        best = min(sizes, key=_mean)
        if not kept or _mean(best) < _mean(kept[-1]):
            kept.append(list(best))
    return kept


def _mean(runs: Sequence[Point]) -> float:
    return statistics.fmean(run.bits for run in runs)


def fit(points: Sequence[Point]) -> Law:
    """The law of the ends of runs.

    Raises:
        DataError: they are of fewer than two budgets.
    """
    at, to = [math.log(point.flops) for point in points], [math.log(point.bits) for point in points]
    if len(set(at)) < 2:
        raise DataError("a law of loss against compute takes runs of two budgets or more")
    slope, intercept = statistics.linear_regression(at, to)
    return Law(intercept, -slope)


def saving(
    first: Sequence[Sequence[Point]],
    second: Sequence[Sequence[Point]],
    bits: float,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Saving:
    """FLOPs of `first` over those of `second` at that loss, by the laws of their runs.

    Args:
        first, second: for each budget the ends of its runs, of which draws are made with replacement.
        bits: the loss, best within what both have come to.
        draws: how many.
        seed: of the draws.

    Raises:
        DataError: either has fewer than two budgets.
    """

    def ratio(some: Sequence[Sequence[Point]], others: Sequence[Sequence[Point]]) -> float:
        laws = [fit([point for runs in budgets for point in runs]) for budgets in (some, others)]
        a, b = (law.flops(bits) for law in laws)
        return a / b if math.isfinite(b) else math.nan

    drawn = random.Random(seed)
    found = sorted(
        value
        for _ in range(draws)
        if not math.isnan(
            value := ratio(*([[drawn.choice(runs) for _ in runs] for runs in budgets] for budgets in (first, second)))
        )
    )
    if not found:
        return Saving(ratio(first, second), math.nan, math.nan)
    low, high = (found[min(len(found) - 1, int(part * len(found)))] for part in (0.025, 0.975))
    return Saving(ratio(first, second), low, high)
