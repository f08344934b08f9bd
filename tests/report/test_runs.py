"""Rows into runs: what tells them apart, with and without a variant, and what the number of epochs leaves open."""

import pytest
from training_rows import fair

from strassen_tile.errors import DataError
from strassen_tile.report.captions import table_caption
from strassen_tile.report.groups import plain_dense
from strassen_tile.report.runs import group_rows, progress_note, run_of, summarise


def rows(method: str, top1: list[float], *, seed: int = 0, **fields: object) -> list[dict]:
    made = {"method": method, "rank": None, "seed": seed, "test_images": 10_000, **fields}
    return [{**made, "epoch": epoch, "top1": value} for epoch, value in enumerate(top1, 1)]


def test_variants_of_one_rank_are_summed_up_apart() -> None:
    found = [
        *rows("stl", [50.0, 60.0], rank=24, variant="r=24", params=1),
        *rows("stl", [50.0, 70.0], rank=24, variant="r=24, mixing none", params=2),
        *rows("stl", [50.0, 80.0], rank=24, variant="r=24, mixing none", params=2, seed=1),
        *rows("dense", [40.0, 45.0], variant="", params=3),
    ]
    groups = group_rows(found)
    assert [group.label for group in groups] == ["stl r=24", "stl r=24, mixing none", "dense"]
    assert [(one["variant"], one["rank"], one["top1"], one["seeds"]) for one in summarise(found)] == [
        (None, 24, 60, 1),
        ("mixing none", 24, 75, 2),
        (None, None, 45, 1),
    ]


def test_rows_without_a_variant_are_runs_of_their_rank() -> None:
    """As they were written before there was one; a comparison that goes on adds rows that have it."""
    found = [*rows("stl", [50.0], rank=24), *rows("stl", [55.0], rank=16), *rows("dense", [40.0])]
    newer = [*rows("stl", [51.0], rank=24, seed=1, variant="r=24"), *rows("dense", [41.0], seed=1, variant="")]
    groups = group_rows([*found, *newer])
    assert [(group.label, list(group.seeds)) for group in groups] == [
        ("stl r=24", [0, 1]),
        ("stl r=16", [0]),
        ("dense", [0, 1]),
    ]
    assert run_of(found[0]) == ("stl", "r=24", 0) and run_of(found[2]) == ("dense", "", 0)


def test_a_variant_that_is_no_text_is_refused() -> None:
    with pytest.raises(DataError, match="variant=3"):
        group_rows(rows("stl", [1.0], variant=3))


def test_whether_top1_still_rises_is_told_by_the_noise_of_the_test_set() -> None:
    """Of 10 000 images at 90 %: 0.3 points."""
    flat, rising = [10.0, 80.0, 88.0, 88.9, 88.9, 89.0, 89.95, 90.0], [10.0, 80.0, 88.0, 88.9, 88.9, 89.0, 89.95, 90.5]
    said = progress_note(rows("dense", flat))
    assert said.startswith("These runs are 8 epochs: they show speed of learning, not final accuracy.")
    assert "still rose by up to 1.0 points in the last 2 epochs" in said
    still = [10.0, 80.0, 88.0, 88.9, 88.9, 89.8, 89.9, 90.0]
    assert "no method's test top-1 rose by more" in progress_note(rows("dense", still))
    assert "speed of learning" in progress_note([*rows("dense", still), *rows("stl", rising)])
    few = [{**row, "test_images": 100} for row in rows("dense", flat)]
    assert "no method's" in progress_note(few)


def test_of_runs_that_are_not_all_there_nothing_is_said() -> None:
    whole = rows("dense", [10.0, 20.0, 30.0, 40.0])
    assert progress_note([*whole, *rows("stl", [10.0, 20.0])]) == ""
    assert progress_note([*whole, *rows("dense", [10.0, 20.0, 30.0], seed=1)]) == ""
    assert progress_note([{**row, "test_images": None} for row in whole]) == ""
    assert progress_note([]) == ""
    assert "1 epoch" in progress_note(rows("dense", [10.0]))


def test_of_new_rows_the_validation_split_tells_whether_top1_still_rises() -> None:
    """They have the test set's top-1 once, and 0.3 points is the standard error of 10 000 images at 90 %."""
    flat, rising = [10.0, 80.0, 88.0, 88.9, 88.9, 89.8, 89.9, 90.0], [10.0, 80.0, 88.0, 88.9, 88.9, 89.0, 89.95, 90.0]
    said = progress_note(fair("dense", rising, test=90.0, test_images=10))
    assert "Validation top-1 still rose by up to 1.0 points in the last 2 epochs" in said
    said = progress_note(fair("dense", flat, test=90.0, test_images=10))
    assert "no method's validation top-1 rose by more" in said and "number of validation images" in said
    assert "still rose" in progress_note(fair("dense", flat, test=90.0, val_images=10**6))
    assert progress_note(fair("dense", flat, test=90.0, val_images=None)) == ""
    whole = fair("dense", flat, test=90.0)
    assert progress_note([*whole, *fair("stl", flat[:4])]) == ""
    assert (
        progress_note([{**row, "val_top1": float("nan") if row["epoch"] == 6 else row["val_top1"]} for row in whole])
        == ""
    )


def test_a_summary_keeps_the_splits_apart() -> None:
    courses = [80.0, 90.0], [82.0, 94.0]
    (one,) = summarise(row for seed, (course, top1) in enumerate(zip(courses, (70.0, 74.0), strict=True))
                       for row in fair("dense", course, seed=seed, test=top1))  # fmt: skip
    assert (one["top1"], one["val_top1"], one["loss"], one["val_loss"]) == (72, 92, 0.25, 0.5)
    assert one["top1_sd"] == one["val_top1_sd"] == pytest.approx(8**0.5)
    assert (one["lr"], one["optimizer"], one["weight_decay"]) == (1e-3, "adamw", 0.05)
    running = summarise(fair("dense", [80.0, 90.0]))[0]
    assert (running["top1"], running["val_top1"]) == (None, 90)


def test_a_rate_is_part_of_what_is_shown_only_where_it_tells_runs_apart() -> None:
    def row(method: str, variant: str, lr: float, rank: int | None = None) -> dict:
        return {"method": method, "rank": rank, "variant": variant, "seed": 0, "epoch": 1, "lr": lr, "top1": 50.0}

    rows = [
        row("dense", "lr 0.0005", 5e-4),
        row("stl", "r=24, mix grid, lr 0.002", 2e-3, 24),
        row("stl", "r=16, lr 0.002", 2e-3, 16),
        row("stl", "r=16, lr 0.004", 4e-3, 16),
    ]
    groups = group_rows(rows)
    assert [group.label for group in groups] == [
        "dense", "stl r=24, mix grid", "stl r=16, lr 0.002", "stl r=16, lr 0.004"
    ]  # fmt: skip
    assert [group.settings for group in groups] == ["", "mix grid", "lr 0.002", "lr 0.004"]
    assert plain_dense(groups) is groups[0]
    both = group_rows([*rows, row("dense", "", 1e-3)])
    assert [group.label for group in both if group.method == "dense"] == ["dense lr 0.0005", "dense"]
    assert plain_dense(both) is both[-1]


def test_rows_that_say_how_long_a_run_is_are_over_then() -> None:
    """Without a validation split, on a schedule of its own; and where a rate is chosen, and no test image is read."""
    long = rows("dense", [40.0, 45.0, 50.0], variant="", epochs=3)
    short = rows("stl", [40.0, 45.0], variant="2 epochs", epochs=2)
    stopped = rows("2:4", [40.0, 45.0], variant="", epochs=3)
    assert [group.over(3) for group in group_rows([*long, *short, *stopped])] == [True, True, False]
    told = {"method": "dense", "rank": None, "variant": "lr 0.001", "seed": 0, "epochs": 2, "tested": False}
    choosing = [{**told, "epoch": epoch, "val_top1": 50.0} for epoch in (1, 2)]
    assert group_rows(choosing)[0].over(2) and not group_rows(choosing[:1])[0].over(2)
    for page, says in ((choosing, "the test set is not read"), ([{**choosing[0], "tested": None}], "read once")):
        data = {"train_images": 9, "val_images": 5, "test_images": 7, "classes": 2}
        assert says in table_caption(summarise([{**row, **data} for row in page]))


def test_dense_of_a_chosen_rate_goes_before_dense_from_before_there_was_a_grid() -> None:
    old = rows("dense", [40.0], variant="", lr=1e-3)
    new = rows("dense", [45.0], variant="lr 0.0005", lr=5e-4, tuned="0.0005, 0.001")
    groups = group_rows([*old, *new])
    assert plain_dense(groups) is groups[1]
