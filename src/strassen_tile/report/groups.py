"""The rows of `strassen-tile compare`, gathered into runs.

One row is one epoch of one run. It holds:

- what tells runs apart: `method`, `rank` (None where there is none), `variant` (in what the run differs from others of its
  method and seed, rank included, as text; rows of before there was one differ by rank alone, and have the variant that
  such a run has now), `seed`, and `epoch`, from 1;
- what was measured: `train_loss`, `train_seconds` (of training alone, cumulative), in every epoch `val_top1` (per cent) and
  `val_loss` on the validation split, and `top1` and `loss` on the test set, in the last epoch's row only, for the test set
  is read once. Rows of before there was a validation split, and of recipes without one, have `top1` and `loss` in every
  epoch and no `val_` fields;
- facts of the run: `lr` (the peak), `optimizer`, `weight_decay`, and `tuned`, the learning rates from which `lr` was chosen
  on the validation split, as text, where it was; the cost fields below; facts about the data (`train_images`,
  `val_images`, `test_images` …); and the environment.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
MEASURED = ("top1", "loss", "val_top1", "val_loss", "train_loss", "train_seconds")
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
        shown: the variant as it is shown: without its learning rate, which tables have apart, where no other group
            differs by that alone.
    """

    method: str
    rank: int | None
    variant: str
    seeds: dict[int, dict[int, Mapping[str, Value]]] = field(default_factory=dict)
    shown: str = ""

    def __post_init__(self) -> None:
        self.shown = self.shown or self.variant

    @property
    def label(self) -> str:
        """How figures name it: `2:4`, `stl r=24`, `stl r=24, mixing none`."""
        return f"{self.method} {self.shown}".strip()

    @property
    def settings(self) -> str:
        """The variant without the rank, which tables show apart."""
        return self.shown if self.rank is None else self.shown.removeprefix(f"r={self.rank}").lstrip(", ")

    @property
    def epochs(self) -> list[int]:
        """Every epoch that at least one seed has reached, ascending."""
        return sorted({epoch for run in self.seeds.values() for epoch in run})

    def over(self, furthest: int) -> bool:
        """Whether training has ended, of all its seeds and at the same epoch.

        Args:
            furthest: the last epoch of all groups, for older rows, which do not say how many are to come: those that stop
                earlier count as behind. Runs with a validation split are over when the test set has been read, where it is
                to be, and any when they diverged.
        """
        last = self.epochs[-1]
        rows = [run.get(last, {}) for run in self.seeds.values()]
        return all(rows) and all(row.get("diverged") or self._ended(row, last, furthest) for row in rows)

    def _ended(self, row: Mapping[str, Value], last: int, furthest: int) -> bool:
        if self.course == "val_top1" and row.get("tested") is not False:
            return number(row, "top1") is not None
        return last == (number(row, "epochs") or furthest)

    def at(self, key: str, epoch: int) -> dict[int, float | None]:
        """Seed to field `key` at `epoch`, of the seeds that have a row there; what is not finite counts as unknown."""
        found = {seed: number(run[epoch], key) for seed, run in self.seeds.items() if epoch in run}
        return {seed: value if value is not None and math.isfinite(value) else None for seed, value in found.items()}

    def values(self, key: str, epoch: int) -> list[float | None]:
        """Field `key` at `epoch`, for each seed that has a row there; what is not finite counts as unknown."""
        return list(self.at(key, epoch).values())

    def mean(self, key: str, epoch: int) -> float | None:
        """The mean of field `key` at `epoch` over all seeds; None if one of them has no row there, or no value."""
        known = [value for value in self.values(key, epoch) if value is not None]
        return statistics.fmean(known) if known and len(known) == len(self.seeds) else None

    def where(self) -> Row:
        """What runs these are and how far: method, rank, last epoch, how many seeds reached it, the state of each as text."""
        last, reached = self.epochs[-1], {seed: max(run) for seed, run in self.seeds.items()}
        return {
            "method": self.method,
            "rank": self.rank,
            "epoch": last,
            "seeds": sum(epoch == last for epoch in reached.values()),
            "state": ", ".join(f"seed {seed}: {epoch}" for seed, epoch in reached.items()),
        }

    @property
    def course(self) -> str:
        """The field that says how good the run is after each epoch: `val_top1`, or `top1` where there is none."""
        validated = any(row.get("val_top1") is not None for run in self.seeds.values() for row in run.values())
        return "val_top1" if validated else "top1"

    def shared(self) -> Row:
        """The fields that have one value in all rows of the group: the cost fields and what else holds still.

        Raises:
            DataError: rows disagree on a cost field, so they are not of the same model.
        """
        rows = [row for run in self.seeds.values() for row in run.values()]
        fields: Row = {}
        for key in dict.fromkeys((*COST_FIELDS, *(key for row in rows for key in row))):
            if key in MEASURED or key in _KEYS:
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


def averaged(values: Mapping[str, Sequence[float | None]]) -> Row:
    """Mean and, under the name with `_sd`, sample standard deviation of each; None where one of its values is unknown."""
    found: Row = {}
    for key, several in values.items():
        known = [value for value in several if value is not None]
        whole = bool(known) and len(known) == len(several)
        found |= {key: statistics.fmean(known) if whole else None, f"{key}_sd": sample_sd(known) if whole else None}
    return found


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
    found = list(groups.values())
    alike = Counter((group.method, without_rate(group.variant)) for group in found)
    for group in found:
        if alike[group.method, (plain := without_rate(group.variant))] == 1:
            group.shown = plain
    return found


def without_rate(variant: str) -> str:
    """A variant without its learning rate, which comes last in it: "r=24, lr 0.002" is "r=24"."""
    said = variant.split(", ")
    return ", ".join(said[:-1] if said[-1].startswith("lr ") else said)


def plain_dense(groups: Sequence[Group]) -> Group | None:
    """The runs that others are held against: the method `dense` in nothing different from the recipe; None if not there.

    Of several that differ by their rate: the last whose rate was chosen, if there is one.
    """
    plain = [group for group in groups if group.method == "dense" and not without_rate(group.variant)]
    chosen = [group for group in plain if any(row.get("tuned") for run in group.seeds.values() for row in run.values())]
    return chosen[-1] if chosen else next((group for group in plain if not group.shown), None)


def furthest_of(groups: Sequence[Group]) -> int:
    """The last epoch that any run of any group has reached; 0 without groups."""
    return max((group.epochs[-1] for group in groups), default=0)
