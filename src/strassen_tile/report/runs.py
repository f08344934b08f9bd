"""The runs of `strassen-tile compare` summed up: a record for each method and variant, and what the epochs leave open.

What rows hold is in `report.groups`. Rows may be incomplete, as they are while training runs: a summary then speaks of the
furthest epoch any seed of the group has reached, averages only the seeds that have reached it, and says how far each one
is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from strassen_tile.records import Row, Value
from strassen_tile.report import paired, sooner
from strassen_tile.report.groups import (
    COST_FIELDS,
    MEASURED,
    Group,
    averaged,
    furthest_of,
    group_rows,
    run_of,
    variant_of,
)
from strassen_tile.report.table import number

__all__ = ["COST_FIELDS", "Group", "group_rows", "progress_note", "run_of", "summarise", "variant_of"]


def summarise(rows: Iterable[Mapping[str, Value]]) -> list[Row]:
    """One record per (method, rank, variant), in order of first appearance, at the last epoch its seeds have reached.

    Returns:
        Records with `method`, `rank`, `variant` (without the rank; None where that says all), `epoch` (the last),
        `seeds` (how many reached it, the ones averaged),
        `seeds_started`, `complete` (whether training has ended, of every seed), `state` (how far each
        seed is, as text), the means `top1`, `loss`, `val_top1`, `val_loss`, `train_loss`, `train_seconds`, their sample
        standard deviations (None for one seed) under the name with `_sd`, the fields that all rows of the group share, the
        cost fields among them, and what `sooner.fields_of` and `paired.fields_of` say of the group and dense. A mean is
        None if it is unknown for one of the seeds: leaving out a diverged run would flatter the rest.

    Raises:
        DataError: rows that are not of a comparison, or disagree on a cost field.
        ModuleNotFoundError: methods are to be tested against dense over three seeds or more, and scipy is not installed.
    """
    groups = group_rows(rows)
    furthest = furthest_of(groups)
    target = sooner.target_of(groups)
    return [
        {
            **_summary(group, furthest),
            **sooner.fields_of(group, target, furthest),
            **sooner.whole_of(group, groups),
            **against,
        }
        for group, against in zip(groups, paired.fields_of(groups), strict=True)
    ]


def _summary(group: Group, furthest: int) -> Row:
    return {
        **group.where(),
        "variant": group.settings or None,
        "seeds_started": len(group.seeds),
        "complete": group.over(furthest),
        **averaged({key: group.values(key, group.epochs[-1]) for key in MEASURED}),
        **group.shared(),
    }


def progress_note(rows: Iterable[Mapping[str, Value]]) -> str:
    """What the number of epochs leaves open: whether top-1 still rose in the last quarter of them, and by how much.

    Of top-1 on the validation split, or in rows without one on the test set. It counts as rising where the mean over seeds
    of some method rose by more than the standard error √(p(1 − p)/n) of a top-1 p on n images. "" where runs have not all
    come equally far, and for rows without top-1 or the number of images, `val_images` or `test_images`.
    """
    groups = group_rows(rows)
    last = furthest_of(groups)
    if last == 1:
        return "These runs are 1 epoch: what more would bring is not known."
    before = last - max(1, round(last / 4))
    split = "validation" if all(group.course == "val_top1" for group in groups) else "test"
    key, images_key = ("val_top1", "val_images") if split == "validation" else ("top1", "test_images")
    rises, errors = [], []
    for group in groups:
        end, start = group.mean(key, last), group.mean(key, before)
        images = number(group.shared(), images_key)
        if not images or end is None or start is None:
            return ""
        rises.append(end - start)
        errors.append((end * (100 - end) / images) ** 0.5)
    if not groups:
        return ""
    largest, span = max(rises), "last epoch" if last - before == 1 else f"last {last - before} epochs"
    if any(rise > error for rise, error in zip(rises, errors, strict=True)):
        return (
            f"These runs are {last} epochs: they show speed of learning, not final accuracy. {split.capitalize()} top-1 "
            f"still rose by up to {largest:.1f} points in the {span}."
        )
    return (
        f"These runs are {last} epochs. In the {span} no method's {split} top-1 rose by more than the standard error that "
        f"its number of {split} images leaves."
    )
