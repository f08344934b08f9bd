"""How much sooner a method gets to what dense ends with: in epochs, in training FLOPs and in seconds.

Top-1 is `val_top1`, or `top1` in rows of runs without a validation split; it is averaged over a method's seeds, and over
`SPAN` epochs, the one in question and those before it. The target is that average at dense's last epoch, and a method has
reached it at the first epoch at which its own average is not below it. The same rule is applied to dense itself, which
so gets there by its last epoch at the latest.

Why an average: among many single epochs near the target chance puts one above it early, and a dense run whose last epoch
happened to be good would count as slow. To ask for several epochs in a row, or for all to the end, errs the other way, and
most for dense, which hovers about its own end: it would come out slower than it is, and others the sooner. The average
makes a steep rise look up to two epochs later than it is. No allowance is made for being nearly there.

Training FLOPs are all-in: 3 × FLOPs of one image's forward pass × training images × epochs, as the backward pass takes
twice the forward pass's (Kaplan et al., arXiv 2001.08361, section 2.1). What the optimizer adds is not counted, nor
reading the validation split.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from strassen_tile.records import Row
from strassen_tile.report.groups import Group, furthest_of, plain_dense
from strassen_tile.report.table import number

SPAN = 3
"""Over how many epochs top-1 is averaged: fewer where that were more than a quarter of dense's."""
TRAINING_OF_FORWARD = 3


class Target(NamedTuple):
    """What dense ends with.

    Attributes:
        field: of the rows: `val_top1`, or `top1` where there is no validation split.
        span: over how many epochs it is averaged.
        value: per cent.
        epochs: in which dense gets there itself.
        flops: all-in, which that takes dense; None if unknown.
        seconds: of training, which that takes dense; None if unknown.
    """

    field: str
    span: int
    value: float
    epochs: int
    flops: float | None
    seconds: float | None


def target_of(groups: Sequence[Group]) -> Target | None:
    """What plain dense ends with; None if it is not there, has not ended, or ends unknown for one of its seeds."""
    dense = plain_dense(groups)
    if dense is None or not dense.over(furthest_of(groups)):
        return None
    field, last = dense.course, dense.epochs[-1]
    span = max(1, min(SPAN, last // 4))
    value = averaged(dense, field, last, span)
    if value is None:
        return None
    epochs = epoch_reached(dense, field, value, span) or last
    return Target(field, span, value, epochs, flops_of(dense, epochs), dense.mean("train_seconds", epochs))


def averaged(group: Group, field: str, epoch: int, span: int) -> float | None:
    """Field `field`, averaged over all seeds of `group` and over the `span` epochs up to `epoch`; None if one is unknown."""
    means = [group.mean(field, at) for at in range(epoch - span + 1, epoch + 1)]
    known = [mean for mean in means if mean is not None]
    return statistics.fmean(known) if len(known) == span else None


def epoch_reached(group: Group, field: str, value: float, span: int) -> int | None:
    """The first epoch, from 1, at which `group`'s average of `field` is not below `value`; None if there is none yet.

    An epoch at which a seed has no row or no value has no average, nor have the `span` - 1 that follow it.
    """
    for epoch in range(span, group.epochs[-1] + 1):
        mean = averaged(group, field, epoch, span)
        if mean is not None and mean >= value:
            return epoch
    return None


def training_flops(flops_per_image: float | None, train_images: float | None, epochs: int) -> float | None:
    """FLOPs of so many epochs, all-in: three times those of the forward passes; None if one of them is unknown."""
    if flops_per_image is None or train_images is None:
        return None
    return TRAINING_OF_FORWARD * flops_per_image * train_images * epochs


def flops_of(group: Group, epochs: int) -> float | None:
    """`training_flops` of a group's runs; None where its rows do not say them, or do not agree on the images."""
    shared = group.shared()
    return training_flops(number(shared, "flops_per_image"), number(shared, "train_images"), epochs)


def fields_of(group: Group, target: Target | None, furthest: int) -> Row:
    """What a summary says of how soon `group` reached `target`.

    Args:
        group: the method's runs.
        target: None where there is none: no field is known then.
        furthest: the last epoch of all groups.

    Returns:
        `target` (per cent), `target_field` and `target_span`; `reached` (None while it may yet be); `epochs_to_target`,
        `flops_to_target` and `seconds_to_target` (means over seeds), None where it is not reached; and the last two as
        fractions of what dense takes to get there itself, `flops_ratio_to_target` and `seconds_ratio_to_target`.
    """
    names = ("reached", "epochs_to_target", "flops_to_target", "seconds_to_target")
    fields: Row = dict.fromkeys(
        ("target", "target_field", "target_span", *names, "flops_ratio_to_target", "seconds_ratio_to_target")
    )
    if target is None:
        return fields
    fields |= {"target": target.value, "target_field": target.field, "target_span": target.span}
    epochs = epoch_reached(group, target.field, target.value, target.span)
    if epochs is None:
        # Of rows without the field, or without a value in the end, nothing is known.
        known = averaged(group, target.field, group.epochs[-1], target.span) is not None
        return {**fields, "reached": False if known and group.over(furthest) else None}
    flops, seconds = flops_of(group, epochs), group.mean("train_seconds", epochs)
    return {
        **fields,
        "reached": True,
        "epochs_to_target": epochs,
        "flops_to_target": flops,
        "seconds_to_target": seconds,
        "flops_ratio_to_target": _ratio(flops, target.flops),
        "seconds_ratio_to_target": _ratio(seconds, target.seconds),
    }


def whole_of(group: Group, groups: Sequence[Group]) -> Row:
    """What the whole of a method's training takes, as fractions of dense's, where schedules are not all equally long.

    Args:
        group: the method's runs.
        groups: of all methods.

    Returns:
        `schedule` (epochs), `run_flops_ratio` and `run_seconds_ratio`; None where all schedules are equally long, dense is
        not there, or one of the two has not ended.
    """
    fields: Row = dict.fromkeys(("schedule", "run_flops_ratio", "run_seconds_ratio"))
    dense, furthest = plain_dense(groups), furthest_of(groups)
    ended = {one.epochs[-1] for one in groups if one.over(furthest)}
    if dense is None or len(ended) < 2 or not (dense.over(furthest) and group.over(furthest)):
        return fields
    own, last = group.epochs[-1], dense.epochs[-1]
    return {
        "schedule": own,
        "run_flops_ratio": _ratio(flops_of(group, own), flops_of(dense, last)),
        "run_seconds_ratio": _ratio(group.mean("train_seconds", own), dense.mean("train_seconds", last)),
    }


def _ratio(own: float | None, dense: float | None) -> float | None:
    return None if own is None or not dense else own / dense
