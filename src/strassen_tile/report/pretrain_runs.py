"""Rows of `strassen-tile pretrain` summed up: a record for each method and variant, and what it took to come to dense's end.

Rows are those of `report.groups`, with `bits` and `loss` (nats a token) of the test text in a run's last row, `val_bits` and
`val_loss` in all, `flops_per_token` of a forward pass, and `tokens_per_epoch`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from strassen_tile.records import Row, Value
from strassen_tile.report.groups import Group, averaged, furthest_of, group_rows, without_rate
from strassen_tile.report.paired import compare, holm
from strassen_tile.report.sooner import TRAINING_OF_FORWARD
from strassen_tile.report.table import number


def summarise(rows: Sequence[Mapping[str, Value]]) -> list[Row]:
    """One record per method and variant, at the last epoch its seeds have reached; means, and sd under the name with `_sd`."""
    groups = group_rows(rows)
    furthest = furthest_of(groups)
    records: list[Row] = []
    for group in groups:
        last = group.epochs[-1]
        keys = ("bits", "val_bits", "loss", "val_loss", "train_loss", "train_seconds")
        record: Row = {
            **group.where(),
            "variant": group.shown or None,
            "complete": _over(group, furthest),
            **averaged({key: group.values(key, last) for key in keys}),
        }
        shared = {key: value for key, value in group.shared().items() if key not in record}
        records.append(
            {**record, **shared, "train_flops": train_flops(group, last), **_against(group, groups, furthest)}
        )
    tested = [(record, p) for record in records if isinstance(p := record["p"], float)]
    for (record, _), p_holm in zip(tested, holm([p for _, p in tested]), strict=True):
        record["p_holm"] = p_holm
    return records


def train_flops(group: Group, epoch: float) -> float | None:
    """FLOPs that a run of the group has been trained with after so many epochs."""
    shared = group.shared()
    each, tokens = number(shared, "flops_per_token"), number(shared, "tokens_per_epoch")
    return None if each is None or tokens is None else TRAINING_OF_FORWARD * each * tokens * epoch


def dense_of(group: Group, groups: Sequence[Group]) -> Group | None:
    """What a group is held against: dense with the same mix ahead of its layers and nothing else; else plain dense.

    Schedules may differ, as they do where FLOPs are the same: of several, that of the same epochs counts, or the longest; of
    several rates one that was chosen, and of those, or of others, the one with the lowest validation loss.
    """
    if group.method == "dense" and not _said(group):
        return None
    mix = [said for said in _said(group) if said.startswith("mix ")]
    own_kind = (group.method, without_rate(group.shown))  # dense at another rate is no measure of itself
    others = [one for one in groups if one.method == "dense" and ("dense", without_rate(one.shown)) != own_kind]
    same, plain = ([one for one in others if _said(one) == wanted] for wanted in (mix, []))
    own = group.epochs[-1]

    def order(one: Group) -> tuple[bool, int, bool, float]:
        last, tuned = one.epochs[-1], any(row.get("tuned") for run in one.seeds.values() for row in run.values())
        reached = one.mean("val_bits", last)
        return last == own, last, tuned, -math.inf if reached is None else -reached

    return max(same or plain, key=order, default=None)


def _said(group: Group) -> list[str]:
    """What a variant says but for its schedule and its rate."""
    return [said for said in without_rate(group.shown).split(", ") if said and not said.endswith(" epochs")]


def _over(group: Group, furthest: int) -> bool:
    last = group.epochs[-1]
    rows = [run.get(last, {}) for run in group.seeds.values()]
    if not all(rows):
        return False
    return all(
        row.get("diverged")
        or (last == (number(row, "epochs") or furthest) and (row.get("tested") is False or row.get("bits") is not None))
        for row in rows
    )


def _against(group: Group, groups: Sequence[Group], furthest: int) -> Row:
    """Test bits less those of the dense it is held against, and what it took to come to where that ends."""
    found: Row = dict.fromkeys(("difference", "difference_sd", "p", "p_holm", "flops_share", "seconds_share"))
    dense = dense_of(group, groups)
    if dense is None or not (_over(group, furthest) and _over(dense, furthest)):
        return found
    apart = compare(group, dense, "bits")
    found |= {"difference": apart.mean, "difference_sd": apart.sd, "p": apart.p}
    end, last = dense.mean("val_bits", dense.epochs[-1]), dense.epochs[-1]
    at = None if end is None else reached(group, end)
    if at is None:
        return found
    spent, whole = train_flops(group, at), train_flops(dense, last)
    found["flops_share"] = spent / whole if spent is not None and whole else None
    seconds, all_seconds = _seconds(group, at), dense.mean("train_seconds", last)
    found["seconds_share"] = seconds / all_seconds if seconds is not None and all_seconds else None
    return found


def reached(group: Group, level: float) -> float | None:
    """The epoch, read off a line between two, at which the mean validation bits of a group first come down to `level`."""
    before: tuple[int, float] | None = None
    for epoch in group.epochs:
        now = group.mean("val_bits", epoch)
        if now is None:
            before = None
            continue
        if now <= level:
            if before is None or before[1] <= now:
                return float(epoch)
            return before[0] + (epoch - before[0]) * (before[1] - level) / (before[1] - now)
        before = (epoch, now)
    return None


def _seconds(group: Group, epoch: float) -> float | None:
    below, above = int(epoch), -int(-epoch // 1)
    first = group.mean("train_seconds", below) if below else 0.0
    then = group.mean("train_seconds", above)
    return None if first is None or then is None else first + (then - first) * (epoch - below)
