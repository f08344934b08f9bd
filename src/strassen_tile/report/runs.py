"""The rows of `strassen-tile compare`, gathered into runs and summed up.

One row is one epoch of one run: `method`, `rank` (None where there is none), `variant` (in what the run differs from
others of its method and seed, rank included, as text), `seed`, `epoch` (from 1), `top1` in per cent, `loss`, `train_loss`,
`train_seconds` (cumulative), the cost fields below, facts about the data and the environment. Rows of before there was a
`variant` differ by rank alone: they have the variant that such a run has now. Rows may be
incomplete, as they are while training runs: a summary then speaks of the furthest epoch any seed of the group has
reached, averages only the seeds that have reached it, and says how far each one is.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from strassen_tile.errors import DataError
from strassen_tile.records import Row, Value
from strassen_tile.report.table import number, sample_sd

# Set by the model and its conversion alone: the same in every epoch and for every seed.
COST_FIELDS = (
    "params",
    "flops_per_image",
    "share_converted",
    "flop_ratio_products",
    "flop_ratio_all_in",
    "flop_ratio",
)
_MEASURED = ("top1", "loss", "train_loss", "train_seconds")
_KEYS = ("method", "rank", "variant", "seed", "epoch")


def run_of(row: Mapping[str, Value]) -> tuple[Value, Value, Value]:
    """What tells a row's run from others: method, variant and seed."""
    return row.get("method"), variant_of(row), row.get("seed")


def variant_of(row: Mapping[str, Value]) -> Value:
    """The row's variant; of an older row, its rank."""
    rank = row.get("rank")
    return row.get("variant", "" if rank is None else f"r={rank}")


@dataclass
class Group:
    """The runs of one method and variant, which differ by their seed alone.

    Attributes:
        method: its name.
        rank: channels a tile; None for a method without them.
        variant: in what it differs from others of the method, such as "r=24, mixing none"; "" where there is no other.
        seeds: seed to epoch to row.
    """

    method: str
    rank: int | None
    variant: str
    seeds: dict[int, dict[int, Mapping[str, Value]]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """How figures name it: `2:4`, `stl r=24`, `stl r=24, mixing none`."""
        return f"{self.method} {self.variant}".strip()

    @property
    def settings(self) -> str:
        """The variant without the rank, which tables show apart."""
        return self.variant if self.rank is None else self.variant.removeprefix(f"r={self.rank}").lstrip(", ")

    @property
    def epochs(self) -> list[int]:
        """Every epoch that at least one seed has reached, ascending."""
        return sorted({epoch for run in self.seeds.values() for epoch in run})

    def values(self, key: str, epoch: int) -> list[float | None]:
        """Field `key` at `epoch`, for each seed that has a row there."""
        return [number(run[epoch], key) for run in self.seeds.values() if epoch in run]

    def shared(self) -> Row:
        """The fields that have one value in all rows of the group: the cost fields and what else holds still.

        Raises:
            DataError: rows disagree on a cost field, so they are not of the same model.
        """
        rows = [row for run in self.seeds.values() for row in run.values()]
        fields: Row = {}
        for key in dict.fromkeys((*COST_FIELDS, *(key for row in rows for key in row))):
            if key in _MEASURED or key in _KEYS:
                continue
            values = list(dict.fromkeys(row.get(key) for row in rows))
            if len(values) == 1:
                fields[key] = values[0]
            elif key in COST_FIELDS:
                shown = ", ".join(str(value) for value in values)
                raise DataError(
                    f"rows of {self.label} disagree on {key}: {shown}; they come from different models or "
                    "conversions, summarise them apart"
                )
        return fields


def group_rows(rows: Iterable[Mapping[str, Value]]) -> list[Group]:
    """Rows by (method, rank, variant) in order of first appearance, each by seed and epoch.

    Of two rows for the same epoch of the same run the later one counts: a resumed run repeats an epoch.

    Raises:
        DataError: a row lacks `method`, `seed` or `epoch`, or one of them, `rank` or `variant` is of the wrong type.
    """
    groups: dict[tuple[str, int | None, str], Group] = {}
    for index, row in enumerate(rows):
        method, rank, seed, epoch = (row.get(key) for key in ("method", "rank", "seed", "epoch"))
        variant = variant_of(row)
        if not (
            isinstance(method, str)
            and (rank is None or isinstance(rank, int))
            and isinstance(variant, str)
            and isinstance(seed, int)
            and isinstance(epoch, int)
        ):
            raise DataError(
                f"row {index} has method={method!r}, rank={rank!r}, variant={variant!r}, seed={seed!r}, epoch={epoch!r}; "
                "expected a str, an int or None, a str, an int and an int"
            )
        group = groups.setdefault((method, rank, variant), Group(method, rank, variant))
        group.seeds.setdefault(seed, {})[epoch] = row
    return list(groups.values())


def summarise(rows: Iterable[Mapping[str, Value]]) -> list[Row]:
    """One record per (method, rank, variant), in order of first appearance, at the last epoch its seeds have reached.

    Returns:
        Records with `method`, `rank`, `variant` (without the rank; None where that says all), `epoch` (the last),
        `seeds` (how many reached it, the ones averaged),
        `seeds_started`, `complete` (whether every seed has reached the last epoch of all groups), `state` (how far each
        seed is, as text), the means `top1`, `loss`, `train_loss`, `train_seconds`, the sample standard deviations
        `top1_sd` and `train_seconds_sd` (None for one seed), and the fields that all rows of the group share, the cost
        fields among them. A mean is None if it is unknown for one of the seeds: leaving out a diverged run would
        flatter the rest.
    """
    groups = group_rows(rows)
    furthest = max((group.epochs[-1] for group in groups), default=0)
    return [_summary(group, furthest) for group in groups]


def _summary(group: Group, furthest: int) -> Row:
    last = group.epochs[-1]
    reached = {seed: max(run) for seed, run in group.seeds.items()}
    record: Row = {
        "method": group.method,
        "rank": group.rank,
        "variant": group.settings or None,
        "epoch": last,
        "seeds": sum(epoch == last for epoch in reached.values()),
        "seeds_started": len(reached),
        "complete": all(epoch == furthest for epoch in reached.values()),
        "state": ", ".join(f"seed {seed}: {epoch}" for seed, epoch in reached.items()),
    }
    for key in _MEASURED:
        values = group.values(key, last)
        known = [value for value in values if value is not None]
        whole = len(known) == len(values)
        record[key] = statistics.fmean(known) if whole else None
        if key in ("top1", "train_seconds"):
            record[f"{key}_sd"] = sample_sd(known) if whole else None
    return {**record, **group.shared()}


def progress_note(rows: Iterable[Mapping[str, Value]]) -> str:
    """What the number of epochs leaves open: whether top-1 still rose in the last quarter of them, and by how much.

    It counts as rising where the mean over seeds of some method rose by more than the standard error √(p(1 − p)/n) of a
    top-1 p on n test images. "" where runs have not all come equally far, and for rows without `top1` or `test_images`.
    """
    groups = group_rows(rows)
    last = max((group.epochs[-1] for group in groups), default=0)
    if last == 1:
        return "These runs are 1 epoch: what more would bring is not known."
    before = last - max(1, round(last / 4))
    rises, errors = [], []
    for group in groups:
        ends, starts = group.values("top1", last), group.values("top1", before)
        images = number(group.shared(), "test_images")
        known = [value for value in (*ends, *starts) if value is not None]
        if not images or len(known) < 2 * len(group.seeds):
            return ""
        end = statistics.fmean(known[: len(ends)])
        rises.append(end - statistics.fmean(known[len(ends) :]))
        errors.append((end * (100 - end) / images) ** 0.5)
    if not groups:
        return ""
    largest, span = max(rises), "last epoch" if last - before == 1 else f"last {last - before} epochs"
    if any(rise > error for rise, error in zip(rises, errors, strict=True)):
        return (
            f"These runs are {last} epochs: they show speed of learning, not final accuracy. Test top-1 still rose by up to "
            f"{largest:.1f} points in the {span}."
        )
    return (
        f"These runs are {last} epochs. In the {span} no method's test top-1 rose by more than the standard error that its "
        "number of test images leaves."
    )
