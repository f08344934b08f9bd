"""If these fail, the report says that a method got to dense's end sooner, or at less cost, than its rows show."""

import math

import pytest
from training_rows import fair, sample

from strassen_tile.report.compare import columns, summarise, table_caption
from strassen_tile.report.groups import group_rows
from strassen_tile.report.sooner import averaged, target_of, training_flops
from strassen_tile.report.table import filled

START = [10.0] * 5  # so that there are twelve epochs, from which on three are averaged
# Means of three epochs, of the last five: 50, 70, 80, 88, 90.
DENSE = [*START, 30.0, 50.0, 70.0, 90.0, 80.0, 94.0, 96.0]


def by_name(rows):
    return {f"{one['method']} {one['variant'] or ''}".strip(): one for one in summarise(rows)}


def test_epochs_flops_and_seconds_to_dense_s_end():
    """Dense ends with (80 + 94 + 96) / 3 = 90, at epoch 12; STL is there at epoch 9, (86 + 92 + 93) / 3 = 90.33."""
    fast = [*START, 60.0, 86.0, 92.0, 93.0, 70.0, 94.0, 99.0]
    slow = [*START, 60.0, 60.0, 92.0, 60.0, 92.0, 60.0, 99.0]
    rows = [
        *fair("dense", DENSE, test=90.0),
        *fair("stl", fast, rank=24, variant="r=24", flops=40, train_seconds=3.0, test=91.0),
        *fair("2:4", slow, flops=50, test=88.0),
    ]
    found = by_name(rows)
    assert found["dense"]["target"] == pytest.approx(90)
    assert (found["dense"]["target_field"], found["dense"]["target_span"]) == ("val_top1", 3)
    # Training FLOPs: 3 × 100 × 10 images × 12 epochs; STL 3 × 40 × 10 × 9.
    assert [found["dense"][f"{key}_to_target"] for key in ("epochs", "flops", "seconds")] == [12, 36_000, 24]
    assert (found["dense"]["flops_ratio_to_target"], found["dense"]["seconds_ratio_to_target"]) == (1, 1)
    stl = found["stl"]
    assert [stl[f"{key}_to_target"] for key in ("epochs", "flops", "seconds")] == [9, 10_800, 3]
    assert stl["flops_ratio_to_target"] == pytest.approx(0.3)
    assert stl["seconds_ratio_to_target"] == pytest.approx(1 / 8)
    assert (found["2:4"]["reached"], found["2:4"]["epochs_to_target"]) == (False, None)
    shown, lines = filled(columns(), summarise(rows))
    cells = [dict(zip((column.title for column in shown), line, strict=True)) for line in lines]
    titles = ("Epochs to dense's end", "Training FLOPs to it", "times fewer", "Seconds to it", "times sooner")
    assert [cells[1][title] for title in titles] == ["9", "10.8 k", "3.33×", "3", "8.00×"]
    assert [cells[2][title] for title in titles] == ["not reached", "–", "–", "–", "–"]
    caption = table_caption(summarise(rows))
    assert "Dense's end is 90.00 % validation top-1, its mean over seeds and its last 3 epochs" in caption
    assert "Training FLOPs are 3 × the forward pass's" in caption


def test_the_mean_over_seeds_is_what_reaches_it():
    """Alone seed 0 is there at epoch 8 and seed 1 at epoch 12; together, at epoch 9: (88 + 91 + 91) / 3."""
    dense = fair("dense", [90.0] * 12, test=90.0) + fair("dense", [90.0] * 12, seed=1, test=90.0)
    first = [*START, *[99.0] * 7]
    second = [*START, 60.0, 77.0, 83.0, 83.0, 90.0, 90.0, 97.0]
    rows = [*dense, *fair("stl", first, test=99.0), *fair("stl", second, seed=1, test=97.0, train_seconds=10.0)]
    found = by_name(rows)["stl"]
    assert found["epochs_to_target"] == 9
    assert found["seconds_to_target"] == pytest.approx((18 + 10) / 2)


def test_one_lucky_epoch_does_not_count_and_dense_is_judged_alike():
    lucky = [*START, 95.0, 50.0, 60.0, 70.0, 80.0, 85.0, 89.0]
    flat = [*START, *[90.0] * 7]
    found = by_name([*fair("dense", flat, test=90.0), *fair("stl", lucky, test=89.0)])
    assert found["stl"]["reached"] is False
    assert found["dense"]["epochs_to_target"] == 8  # not 12, where it ends, nor 6


@pytest.mark.parametrize("fault", ["missing epoch", "missing seed", "NaN", "null"])
def test_an_epoch_that_is_not_known_for_all_seeds_is_not_one_that_reaches(fault):
    """Without the fault in epoch 4 it is there in epoch 6; with it, none of the means of epochs 4 to 6 is known."""
    dense = [row for seed in (0, 1) for row in fair("dense", [90.0] * 12, seed=seed, test=90.0)]
    course = [60.0, 60.0, 60.0, *[99.0] * 9]
    whole = [row for seed in (0, 1) for row in fair("stl", course, seed=seed, test=99.0)]
    assert by_name([*dense, *whole])["stl"]["epochs_to_target"] == 6
    hit = [row for row in whole if row["epoch"] == 4 and (row["seed"] == 1 or fault == "missing epoch")]
    if fault.startswith("missing"):
        broken = [row for row in whole if row not in hit]
    else:
        broken = [{**row, "val_top1": math.nan if fault == "NaN" else None} if row in hit else row for row in whole]
    assert by_name([*dense, *broken])["stl"]["epochs_to_target"] == 7


def test_while_training_runs_nothing_is_not_reached():
    dense = fair("dense", DENSE, test=90.0)
    found = by_name([*dense, *fair("stl", [10.0, 20.0, 30.0])])
    assert (found["stl"]["reached"], found["dense"]["reached"]) == (None, True)
    unread = by_name([*fair("dense", DENSE), *fair("stl", DENSE)])  # the test set is still to be read
    assert {record["target"] for record in unread.values()} == {None}
    # One seed of dense has not started: nobody's end is known.
    assert target_of(group_rows([*dense, *fair("dense", DENSE[:2], seed=1)])) is None


def test_without_plain_dense_there_is_no_target():
    mixed = fair("dense", DENSE, variant="mix grid", test=90.0)
    assert by_name(mixed)["dense mix grid"]["target"] is None
    assert by_name([*fair("dense", DENSE, test=90.0), *mixed])["dense mix grid"]["epochs_to_target"] == 12


def test_rows_without_a_validation_split_are_judged_on_the_test_set():
    rows = sample(epochs=12)
    (dense, *_), groups = summarise(rows), group_rows(rows)
    assert (dense["target_field"], dense["epochs_to_target"]) == ("top1", 12)
    last = [row["top1"] for row in rows if row["method"] == "dense" and row["epoch"] > 9]
    assert dense["target"] == pytest.approx(sum(last) / 6)
    assert dense["flops_to_target"] is None  # they do not say how many images they were trained on
    assert averaged(groups[0], "top1", 13, 3) is None
    # The mix of new rows and old: what is on another split is not compared.
    new = by_name([*fair("dense", DENSE, test=90.0), *[row for row in rows if row["method"] == "2:4"]])
    assert (new["2:4"]["reached"], new["2:4"]["target"]) == (None, pytest.approx(90))


def test_short_runs_are_averaged_over_a_quarter_at_most():
    for epochs, span in ((1, 1), (7, 1), (8, 2), (12, 3), (60, 3)):
        found = by_name([*fair("dense", [50.0] * epochs, test=50.0), *fair("stl", [60.0] * epochs, test=60.0)])
        assert (found["dense"]["target"], found["dense"]["target_span"], found["stl"]["epochs_to_target"]) == (
            50, span, span
        )  # fmt: skip


def test_training_flops_are_three_forward_passes():
    assert training_flops(50e6, 1000, 4) == 3 * 50e6 * 1000 * 4
    assert training_flops(None, 1000, 4) is None and training_flops(50e6, None, 4) is None


def test_what_a_whole_run_takes_is_held_against_the_whole_of_dense() -> None:
    """Where one of them trains for less: 2 epochs of half the FLOPs against 4 are a quarter."""

    def rows(method: str, epochs: int, flops: int, seconds: float) -> list[dict]:
        told = {"method": method, "rank": None, "variant": "", "seed": 0, "train_images": 10, "flops_per_image": flops}
        ends = [{}] * (epochs - 1) + [{"top1": 50.0}]
        return [
            {**told, "epoch": epoch, "val_top1": 50.0, "train_seconds": seconds * epoch, **end}
            for epoch, end in enumerate(ends, 1)
        ]

    dense, short = rows("dense", 4, 100, 2.0), rows("2:4", 2, 50, 3.0)
    of = {record["method"]: record for record in summarise([*dense, *short])}
    assert [of["2:4"][key] for key in ("schedule", "run_flops_ratio", "run_seconds_ratio")] == [2, 0.25, 0.75]
    assert [of["dense"][key] for key in ("schedule", "run_flops_ratio", "run_seconds_ratio")] == [4, 1, 1]
    assert "Schedules are not all equally long" in table_caption(list(of.values()))
    # Nothing of it where all are equally long, nor of a run that has not ended.
    for others in (rows("2:4", 4, 50, 3.0), short[:1]):
        assert all(record["run_flops_ratio"] is None for record in summarise([*dense, *others]))
