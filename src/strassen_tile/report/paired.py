"""Whether two methods differ by more than seeds explain: paired t-tests over the seeds they share.

Pairing is fair because a seed settles the order of the data and the augmentation of every method's run alike. scipy is
imported when the first test is made: with fewer than `FEWEST` seeds there is none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from strassen_tile.records import Row
from strassen_tile.report.groups import Group, furthest_of, plain_dense
from strassen_tile.report.table import report_extra, sample_sd

FEWEST = 3
"""Seeds below which no test is made: of two differences a t-test says nearly nothing."""
ALPHA = 0.05
FIELD = "top1"


class Difference(NamedTuple):
    """First minus second, over the seeds that both have.

    Attributes:
        seeds: how many they share.
        mean: of the differences; None if they share no seed, or if a value is unknown for one they share: to leave out a
            diverged run would flatter the rest.
        sd: their sample standard deviation; None for one seed, and where there is no mean.
        p: of the two-sided paired t-test that the mean is zero; None for fewer than `FEWEST` seeds, and where there is no
            mean.
    """

    seeds: int
    mean: float | None
    sd: float | None
    p: float | None


def difference(first: Mapping[int, float | None], second: Mapping[int, float | None]) -> Difference:
    """Of two methods' values, each by seed.

    Where all differences are equal there is no scale to test on: p is 1 if they are zero, and 0, the limit, if not.

    Raises:
        ModuleNotFoundError: three seeds or more, and scipy is not installed.
    """
    shared = [seed for seed in first if seed in second]
    known = [
        (a, b)
        for seed in shared
        if (a := first[seed]) is not None and (b := second[seed]) is not None and math.isfinite(a) and math.isfinite(b)
    ]
    if not shared or len(known) < len(shared):
        return Difference(len(shared), None, None, None)
    apart = [a - b for a, b in known]
    mean, sd = statistics.fmean(apart), sample_sd(apart)
    if sd is None or len(apart) < FEWEST:
        return Difference(len(apart), mean, sd, None)
    # Equal differences come out a rounding apart: 0.3 - 0.1 is not 0.2.
    rounding = 1e-12 * max(abs(value) for pair in known for value in pair)
    if sd <= rounding:
        return Difference(len(apart), mean, 0.0, 1.0 if abs(mean) <= rounding else 0.0)
    with report_extra("vision", "paired tests"):
        from scipy import stats
    return Difference(len(apart), mean, sd, float(stats.ttest_rel(*zip(*known, strict=True)).pvalue))


def compare(first: Group, second: Group, field: str = FIELD) -> Difference:
    """Of any two groups of runs, in `field` at the last epoch of each."""
    return difference(first.at(field, first.epochs[-1]), second.at(field, second.epochs[-1]))


def holm(values: Sequence[float]) -> list[float]:
    """P values corrected for their number, in the order given (Holm, Scand. J. Statist. 6, 1979, pages 65 to 70)."""
    corrected, largest = [0.0] * len(values), 0.0
    for place, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - place) * values[index]))
        corrected[index] = largest
    return corrected


def fields_of(groups: Sequence[Group]) -> list[Row]:
    """What a summary says of each group against plain dense.

    Returns:
        For each group `difference` (test top-1 at the end, this minus dense, points), `difference_sd`, `difference_seeds`,
        `p`, and `p_holm`, corrected for the number of groups that are tested. All None for dense itself, where there is no
        plain dense, and while training of either has not ended. A result unknown for a shared seed leaves
        `difference_seeds` alone known.

    Raises:
        ModuleNotFoundError: three seeds or more, and scipy is not installed.
    """
    dense, furthest = plain_dense(groups), furthest_of(groups)
    records: list[Row] = []
    for group in groups:
        found = None
        if dense is not None and group is not dense and group.over(furthest) and dense.over(furthest):
            found = compare(group, dense)
        records.append(
            dict.fromkeys(("difference", "difference_sd", "difference_seeds", "p", "p_holm"))
            if found is None
            else {
                "difference": found.mean,
                "difference_sd": found.sd,
                "difference_seeds": found.seeds,
                "p": found.p,
                "p_holm": None,
            }
        )
    tested = [(record, p) for record in records if isinstance(p := record["p"], float)]
    for (record, _), p_holm in zip(tested, holm([p for _, p in tested]), strict=True):
        record["p_holm"] = p_holm
    return records
