"""If these fail, the report claims a difference that seeds explain, or hides one that they do not."""

import math
import sys

import pytest
from training_rows import fair

from strassen_tile.report import paired
from strassen_tile.report.captions import differences
from strassen_tile.report.compare import difference_columns, summarise, table_caption
from strassen_tile.report.groups import group_rows
from strassen_tile.report.paired import Difference, compare, difference, holm
from strassen_tile.report.table import filled


def runs(method, results, **fields):
    """Rows of runs with these last results, by seed from 0 on; None leaves a seed out."""
    return [
        row
        for seed, result in enumerate(results)
        if result is not None
        for row in fair(method, [50.0, result], seed=seed, test=result, **fields)
    ]


DENSE = [90.0, 91.0, 89.0]


def test_against_a_t_test_by_hand():
    """Differences 1, 2, 3: mean 2, sd 1, t = 2√3, two degrees of freedom: p = 1 − t/√(t² + 2) = 1 − √(12/14)."""
    found = difference({0: 91.0, 1: 93.0, 2: 92.0}, dict(enumerate(DENSE)))
    assert found[:3] == (3, 2.0, 1.0)
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-9)
    # The sign of it turns with the order, and p does not.
    turned = difference(dict(enumerate(DENSE)), {0: 91.0, 1: 93.0, 2: 92.0})
    assert (turned.mean, turned.p) == (-2.0, pytest.approx(found.p))


def test_seeds_are_paired_by_number_and_only_those_that_both_have():
    first = {3: 1.0, 2: 13.0, 1: 12.0, 0: 11.0}
    assert difference(first, {0: 10.0, 1: 10.0, 2: 10.0, 7: 0.0})[:3] == (3, 2.0, 1.0)
    assert difference({0: 1.0}, {1: 1.0}) == Difference(0, None, None, None)
    assert difference({0: 3.0}, {0: 1.0}) == Difference(1, 2.0, None, None)
    assert difference({0: 3.0, 1: 1.0}, {0: 1.0, 1: 1.0}) == Difference(2, 1.0, pytest.approx(math.sqrt(2)), None)


@pytest.mark.parametrize("unknown", [None, math.nan, math.inf])
def test_a_diverged_seed_is_not_left_out(unknown):
    first = {0: 91.0, 1: 92.0, 2: 93.0, 3: unknown}
    assert difference(first, dict.fromkeys(range(4), 90.0)) == Difference(4, None, None, None)
    assert difference(dict.fromkeys(range(4), 90.0), first) == Difference(4, None, None, None)


def test_equal_differences_have_no_scale():
    """0.3 − 0.1 and 0.2 − 0.0 differ by rounding alone, which is no spread to test on."""
    base = dict.fromkeys(range(3), 0.0)
    assert difference({0: 0.3, 1: 0.2, 2: 0.5}, {0: 0.1, 1: 0.0, 2: 0.3})[1:] == (pytest.approx(0.2), 0.0, 0.0)
    assert difference(base, base) == Difference(3, 0.0, 0.0, 1.0)


def test_holm_by_hand():
    """In order 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04, and none below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_any_two_groups_can_be_compared():
    first, second = group_rows([*runs("stl", [91.0, 93.0, 92.0]), *runs("2:4", DENSE)])
    assert compare(first, second).mean == 2.0
    assert compare(first, second, "val_top1").mean == 2.0
    assert compare(first, first).p == 1.0


# Against dense: STL 1, 1.02 and 0.98 above; 2:4 as much below; low rank level, with a large spread.
MANY = [
    *runs("dense", DENSE),
    *runs("stl", [91.0, 92.02, 89.98], rank=24, variant="r=24, mix grid"),
    *runs("2:4", [89.0, 89.98, 88.02]),
    *runs("low-rank", [90.0, 92.0, 88.5]),
]


def test_sentences_say_who_differs_and_who_does_not():
    summary = summarise(MANY)
    t = 1 / (0.02 / math.sqrt(3))
    p = 1 - t / math.sqrt(t * t + 2)  # of two degrees of freedom: 0.00013
    assert [record["p"] for record in summary[1:3]] == [pytest.approx(p, rel=1e-6)] * 2
    assert summary[1]["p_holm"] == pytest.approx(3 * p, rel=1e-6)
    text = " ".join(differences(summary))
    assert "over the same 3 seeds, Holm-corrected for 3 methods, at p < 0.05." in text
    assert "Above dense by more than seeds explain: stl r=24, mix grid (+1.00 points, p = 0.0004)." in text
    assert "Below dense by more than seeds explain: 2:4 (−1.00 points, p = 0.0004)." in text
    assert "Not told apart from dense, which does not make them equal: low-rank." in text
    assert text in table_caption(summary)


def test_the_correction_is_for_all_methods_tested():
    """Differences 1, 1.5, 1.2: t = 8.49, p = 0.0136; for four such methods Holm's first step makes it 0.054."""
    better = [90.0 + 1.0, 91.0 + 1.5, 89.0 + 1.2]
    alone = summarise([*runs("dense", DENSE), *runs("a", better)])
    assert "Above dense by more than seeds explain: a" in " ".join(differences(alone))
    assert alone[1]["p"] == alone[1]["p_holm"] == pytest.approx(0.0136, abs=5e-5)
    crowd = summarise([*runs("dense", DENSE), *(row for name in "abcd" for row in runs(name, better))])
    text = " ".join(differences(crowd))
    assert "Above" not in text and "equal: a; b; c; d." in text


def test_many_names_are_counted():
    rows = [*runs("dense", DENSE), *(row for index in range(30) for row in runs(f"m{index}", [90.0, 92.0, 88.5]))]
    text = " ".join(differences(summarise(rows)))
    assert "m5 and 24 more." in text and "m6" not in text


def test_what_cannot_be_tested_is_said():
    two = summarise([*runs("dense", DENSE[:2]), *runs("stl", [95.0, 96.0])])
    assert differences(two) == ["Too few seeds to tell differences from dense from chance: a paired test takes 3."]
    assert (two[1]["difference"], two[1]["p"]) == (5.0, None)
    rows = [
        *runs("dense", DENSE),
        *runs("few", [95.0, 96.0]),
        *runs("apart", [None, None, None, 95.0]),
        *({**row, "top1": row.get("top1") and math.nan} for row in runs("broken", DENSE)),
        *runs("stl", [91.0, 93.0, 92.0]),
    ]
    text = " ".join(differences(summarise(rows)))
    assert "Too few seeds for a test: few." in text
    assert "No seed in common with dense: apart." in text
    assert "as a seed's result is unknown: broken." in text
    assert differences([row for row in summarise(rows) if row["method"] == "dense"]) == []
    assert differences(summarise(rows[2 * len(DENSE) :])) == []  # no dense to hold against


def test_a_run_still_going_is_not_tested():
    rows = [*runs("dense", DENSE), *(row for row in runs("stl", [95.0, 96.0, 97.0]) if row["epoch"] == 1)]
    assert [record["difference_seeds"] for record in summarise(rows)] == [None, None]
    # Older rows: what stops before the others is behind, and what it has there is not held against their end.
    old = [{key: value for key, value in row.items() if not key.startswith("val_")} for row in MANY]
    old = [{**row, "top1": row.get("top1", 50.0)} for row in old if row["method"] != "2:4" or row["epoch"] == 1]
    assert [record["difference_seeds"] for record in summarise(old)] == [None, 3, None, 3]


def test_the_table_of_differences():
    shown, lines = filled(difference_columns(), summarise(MANY)[1:])
    assert [column.title for column in shown][3:] == [
        "Seeds shared",
        "Top-1 less dense's, points",
        "p",
        "p, Holm-corrected",
    ]
    assert [line[3:] for line in lines[:2]] == [
        ["3", "+1.00 ± 0.02", "0.00013", "0.0004"],
        ["3", "−1.00 ± 0.02", "0.00013", "0.0004"],
    ]


def test_without_scipy_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ModuleNotFoundError, match=r'scipy is not installed; paired tests need it.*tile\[vision\]"'):
        difference({0: 1.0, 1: 2.0, 2: 4.0}, {0: 0.0, 1: 0.0, 2: 0.0})
    assert difference({0: 1.0, 1: 2.0}, {0: 0.0, 1: 0.0}).p is None  # which needs none
    assert paired.FEWEST == 3
