"""If these fail, what is said of loss against compute is not what the runs came to."""

import math
import random

import pytest

from strassen_tile.errors import DataError
from strassen_tile.report.scaling import Law, Point, best_of_each, ends, fit, saving

BUDGETS = (1e12, 4e12, 2e13)


def runs(scale=1.0, noise=0.0, seeds=3, seed=0):
    drawn = random.Random(seed)
    law = Law(math.log(40), 0.1)
    return [[Point(c, law.bits(c / scale) * math.exp(drawn.gauss(0, noise))) for _ in range(seeds)] for c in BUDGETS]


def test_a_law_is_found_again():
    law = fit([point for budget in runs() for point in budget])
    assert law == pytest.approx((math.log(40), 0.1))
    assert law.flops(law.bits(3e12)) == pytest.approx(3e12)
    assert Law(1.0, 0.0).flops(2.0) == math.inf
    with pytest.raises(DataError, match="two budgets"):
        fit(runs()[0])


def test_savings_are_at_equal_loss_with_what_seeds_leave_open():
    bits = Law(math.log(40), 0.1).bits(5e12)
    exact = saving(runs(0.5), runs(), bits)
    assert exact == pytest.approx((0.5, 0.5, 0.5))
    noisy = saving(runs(0.5, 0.005, seed=1), runs(1.0, 0.005, seed=2), bits)
    assert noisy.low < noisy.ratio < noisy.high
    assert noisy.low < 0.5 < noisy.high
    assert noisy.high - noisy.low < 0.5
    assert saving(runs(0.5, 0.005, seed=1), runs(1.0, 0.005, seed=2), bits) == noisy
    narrow = saving(runs(0.5, 0.001, seed=1), runs(1.0, 0.001, seed=2), bits)
    assert narrow.high - narrow.low < noisy.high - noisy.low


def test_ends_are_of_methods_whatever_their_rate_and_size():
    def row(variant, epoch, bits, flops=100, seed=0):
        row = {"method": "dense", "variant": variant, "seed": seed, "epoch": epoch, "flops_per_token": flops}
        return {**row, "tokens_per_epoch": 10, **({} if bits is None else {"bits": bits})}

    rows = [
        row("mix causal, lr 0.01", 1, None), row("mix causal, lr 0.01", 2, 3.0), row("mix causal, lr 0.01", 2, 3.1, seed=1),
        row("mix causal, width 64, lr 0.02", 4, 2.9, flops=30), row("", 2, 3.5), row("mix causal, 8 epochs", 8, 2.0),
    ]  # fmt: skip
    found = ends(rows)
    assert list(found) == [("dense", "mix causal"), ("dense", "")]
    assert found["dense", "mix causal"] == [[(3600, 2.9)], [(6000, 3.0), (6000, 3.1)], [(24000, 2.0)]]
    assert best_of_each(found["dense", "mix causal"]) == [[(3600, 2.9)], [(24000, 2.0)]]


def test_sizes_of_nearly_one_budget_are_one() -> None:
    """The best of them counts, though a cheaper one is worse, and the next budget only if it is better."""
    wide, narrow, dear, worse = (
        [Point(100, 2.0)],
        [Point(102, 1.5), Point(102, 1.7)],
        [Point(1000, 1.4)],
        [Point(3000, 1.9)],
    )
    assert best_of_each([dear, worse, narrow, wide]) == [narrow, dear]
    assert best_of_each([wide, [Point(106, 1.8)]]) == [wide, [Point(106, 1.8)]]


def test_a_loss_that_hardly_falls_takes_endless_flops() -> None:
    assert fit([Point(1e13, 2.0), Point(1e14, 1.999999)]).flops(1.5) == math.inf
