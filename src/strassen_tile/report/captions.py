"""What is to be said of the numbers of a comparison: over what they are, what chance makes of them, and who differs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from strassen_tile.records import Value
from strassen_tile.report.paired import ALPHA, FEWEST
from strassen_tile.report.sooner import TRAINING_OF_FORWARD
from strassen_tile.report.table import number, p_value, signed

_FEW_IMAGES = 1000
_NAMED = 6  # of the methods of a kind; the rest are counted


def table_caption(summary: Sequence[Mapping[str, Value]]) -> str:
    """What the numbers of the table are, of which data and over how many seeds, and what chance makes of them.

    Args:
        summary: records of `runs.summarise`. Of the data it says what their fields `train_images`, `val_images`,
            `test_images`, `classes`, `image_size` and `stored_size` (pixels a side) and `chance` (per cent) say; older
            rows have none of them.
    """
    if not summary:
        return "No rows yet."
    epochs = sorted({int(number(record, "epoch") or 0) for record in summary})
    seeds = sorted({int(number(record, "seeds") or 0) for record in summary})
    epoch = f"epoch {epochs[0]}" if len(epochs) == 1 else f"the last epoch reached ({epochs[0]} to {epochs[-1]})"
    if seeds == [1]:
        said = [f"Test top-1 at {epoch}, of one seed: what another would change is not known."]
    else:
        over = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        said = [f"Test top-1 at {epoch}: mean ± sample standard deviation over {over} seeds."]
    if not all(record["complete"] for record in summary):
        said.append("Training has not finished: only the seeds at a method's last epoch are averaged.")
    if len({record.get("draws") for record in summary}) > 1:  # rows of before do not say
        said.append(
            "Some rows are older and were augmented by other random draws: small differences may come from that."
        )
    if any(number(record, "run_flops_ratio") is not None for record in summary):
        said.append(
            "Schedules are not all equally long: training FLOPs and seconds fewer are of a whole run, against the whole of "
            "dense's."
        )
    said += [*_about_data(summary), *_about_test_set(summary), *_about_rates(summary), *_about_target(summary)]
    return " ".join([*said, *differences(summary)])


def differences(summary: Sequence[Mapping[str, Value]]) -> list[str]:
    """Sentences that say which methods end above or below dense by more than seeds explain, and which are not told apart.

    Args:
        summary: records of `runs.summarise`.

    Returns:
        Nothing where no method can be held against plain dense.
    """
    compared = [record for record in summary if number(record, "difference_seeds") is not None]
    tested = [record for record in compared if number(record, "p_holm") is not None]
    if not compared:
        return []
    said = []
    if tested:
        seeds = sorted({int(number(record, "difference_seeds") or 0) for record in tested})
        over = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        corrected = f", Holm-corrected for {len(tested)} methods" if tested[1:] else ""
        said.append(
            f"Held against dense by two-sided paired t-tests of test top-1 over the same {over} seeds{corrected}, at "
            f"p < {ALPHA:g}."
        )
        ranked = sorted(tested, key=lambda record: -(number(record, "difference") or 0.0))
        clear = [record for record in ranked if (number(record, "p_holm") or 0.0) < ALPHA]
        above = [_with_size(record) for record in clear if (number(record, "difference") or 0.0) > 0]
        below = [_with_size(record) for record in reversed(clear) if (number(record, "difference") or 0.0) < 0]
        alike = [name_of(record) for record in ranked if record not in clear]
        said += [f"Above dense by more than seeds explain: {_listed(above)}."] if above else []
        said += [f"Below dense by more than seeds explain: {_listed(below)}."] if below else []
        said += [f"Not told apart from dense, which does not make them equal: {_listed(alike)}."] if alike else []
    few = [
        record
        for record in compared
        if record["difference"] is not None and (number(record, "difference_seeds") or 0) < FEWEST
    ]
    if len(few) == len(compared):
        said.append(f"Too few seeds to tell differences from dense from chance: a paired test takes {FEWEST}.")
    elif few:
        said.append(f"Too few seeds for a test: {_listed([name_of(record) for record in few])}.")
    if apart := [record for record in compared if number(record, "difference_seeds") == 0]:
        said.append(f"No seed in common with dense: {_listed([name_of(record) for record in apart])}.")
    unknown = [record for record in compared if number(record, "difference") is None and record not in apart]
    if unknown:
        said.append(
            f"Not held against dense, as a seed's result is unknown: {_listed([name_of(record) for record in unknown])}."
        )
    return said


def name_of(record: Mapping[str, Value]) -> str:
    """How sentences name the method of a record: `stl r=24, mix grid`."""
    rank, variant = record["rank"], record["variant"]
    settings = ", ".join([*([] if rank is None else [f"r={rank}"]), *([str(variant)] if variant else [])])
    return f"{record['method']} {settings}".strip()


def common(summary: Sequence[Mapping[str, Value]], key: str) -> float | None:
    """The one value that the records have in field `key`; None if there is none, or more than one."""
    values = {number(record, key) for record in summary} - {None}
    return values.pop() if len(values) == 1 else None


def _with_size(record: Mapping[str, Value]) -> str:
    p = p_value(number(record, "p_holm"))
    return (
        f"{name_of(record)} ({signed(number(record, 'difference'))} points, p {p if p.startswith('<') else f'= {p}'})"
    )


def _listed(names: Sequence[str]) -> str:
    """Names, of many the first few; they may hold commas."""
    shown = "; ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _about_data(summary: Sequence[Mapping[str, Value]]) -> list[str]:
    train, validation, test, classes, size, stored, chance = (
        common(summary, key)
        for key in ("train_images", "val_images", "test_images", "classes", "image_size", "stored_size", "chance")
    )
    said = []
    if train is not None and test is not None and classes is not None:
        split, read = " training", ""
        if validation:
            split = f" training, {_spaced(validation)} validation"
            read = "; the test set is read once, at the end"
            if all(record.get("tested") is False for record in summary):
                read = "; the test set is not read"
        said.append(f"{_spaced(train)}{split} and {_spaced(test)} test images of {_spaced(classes)} classes{read}.")
    if size is not None:
        scaled = (
            "" if stored in (None, size) else f", scaled {'up' if size > (stored or 0) else 'down'} from {stored:g}"
        )
        said.append(f"Images are {size:g} pixels a side{scaled}.")
    if chance is not None:
        said.append(f"Chance, the largest class named always, is {chance:.1f} %.")
    return said


def _about_test_set(summary: Sequence[Mapping[str, Value]]) -> list[str]:
    """What the number of test images leaves open, as standard errors √(p(1 − p)/n) of a share p of n images."""
    images, chance = common(summary, "test_images"), common(summary, "chance")
    known = [top1 for record in summary if (top1 := number(record, "top1")) is not None]
    if not images or not known:
        return []
    error = max(_standard_error(top1, images) for top1 in known)
    said = [f"The choice of test images alone leaves a standard error of up to {error:.2g} points."]
    if images < _FEW_IMAGES:
        said.append(f"One image is {100 / images:.2g} points.")
    if chance is not None:
        margin = 2 * _standard_error(chance, images)
        near = sum(top1 <= chance + margin for top1 in known)
        rule = f"more than two standard errors ({margin:.2g} points) above it"
        if near == len(known):
            said.append(f"No method is clearly above chance: none is {rule}.")
        elif near:
            said.append(f"{near} of {len(known)} are not clearly above chance: not {rule}.")
    return said


def _about_rates(summary: Sequence[Mapping[str, Value]]) -> list[str]:
    """How learning rates were chosen, where they were."""
    grids = {str(record["tuned"]) for record in summary if record.get("tuned") is not None}
    if not grids:
        return []
    tuned = sum(record.get("tuned") is not None for record in summary)
    whose = (
        "Each method's learning rate" if tuned == len(summary) else f"The learning rate of {tuned} of {len(summary)}"
    )
    return [
        f"{whose} is the best on the validation split of {grids.pop() if len(grids) == 1 else 'a grid of its own'}."
    ]


def _about_target(summary: Sequence[Mapping[str, Value]]) -> list[str]:
    """What "dense's end" is, and how training FLOPs are counted."""
    target = common(summary, "target")
    if target is None:
        return []
    fields = {record.get("target_field") for record in summary}
    split = "validation" if fields == {"val_top1"} else "test"
    span = int(common(summary, "target_span") or 1)
    over = f"its last {span} epochs" if span > 1 else "its last epoch"
    said = [
        f"Dense's end is {target:.2f} % {split} top-1, its mean over seeds and {over}; a method, dense too, is there at "
        "the first epoch at which the mean of as many epochs up to it is not below that."
    ]
    if any(number(record, "flops_to_target") is not None for record in summary):
        said.append(
            f"Training FLOPs are {TRAINING_OF_FORWARD} × the forward pass's, everything counted; times fewer and sooner are "
            "against what dense takes to get there itself."
        )
    return said


def _spaced(n: float) -> str:
    return f"{n:,.0f}".replace(",", " ")


def _standard_error(top1: float, images: float) -> float:
    """Of a share in per cent of so many images, in per cent."""
    return math.sqrt(max(top1 * (100 - top1), 0.0) / images)
