"""If these fail, the report on language models says other things than its rows."""

import math

import pytest

from strassen_tile.report.groups import group_rows
from strassen_tile.report.pretrain import caption, columns, figure, write_report
from strassen_tile.report.pretrain_runs import dense_of, reached, summarise, train_flops
from strassen_tile.report.table import filled


def rows(method="dense", variant="", seed=0, curve=(5.0, 4.0, 3.0), test=2.9, flops=100, lr=1e-3, **more):
    """A run of three epochs of ten tokens, a second each."""
    found = []
    for epoch, bits in enumerate(curve, 1):
        row = {
            "method": method, "rank": None, "variant": variant, "seed": seed, "epoch": epoch, "epochs": len(curve), "lr": lr,
            "val_bits": bits, "val_loss": bits * math.log(2), "train_loss": bits, "train_seconds": float(epoch),
            "params": 1000, "flops_per_token": flops, "tokens_per_epoch": 10, "flop_ratio": flops / 100,
            "flop_ratio_all_in": flops / 100, "flop_ratio_products": flops / 100, "share_converted": 0.8, **more,
        }  # fmt: skip
        if epoch == len(curve) and test is not None:
            row |= {"bits": test, "loss": test * math.log(2)}
        found.append(row)
    return found


def test_flops_and_seconds_to_the_end_of_dense():
    data = [*rows(), *rows("stl", curve=(4.5, 2.5, 2.0), test=1.9, flops=50)]
    dense, stl = summarise(data)
    assert dense["train_flops"] == 3 * 100 * 30
    assert dense["flops_share"] is None and dense["difference"] is None
    at = 1 + 1.5 / 2  # from 4.5 down to 2.5, where 3.0 is
    assert stl["flops_share"] == pytest.approx(at * 50 / 300)
    assert stl["seconds_share"] == pytest.approx(at / 3)
    assert stl["difference"] == pytest.approx(-1.0)
    (group,) = [group for group in group_rows(data) if group.method == "stl"]
    assert train_flops(group, 2) == 3 * 50 * 20
    assert reached(group, 4.5) == 1.0
    assert reached(group, 1.0) is None


def test_each_is_held_against_dense_with_its_mix():
    data = [
        *rows(), *rows(variant="mix causal", test=2.5), *rows("stl", "r=6, mixing none"),
        *rows("stl", "r=6, mixing none, mix causal", test=2.4), *rows("2:4", "mix causal, lr 0.01", test=2.6, lr=1e-2),
        *rows("stl", "r=6, mix tile"),
    ]  # fmt: skip
    groups = group_rows(data)
    found = [dense_of(group, groups) for group in groups]
    assert [None if one is None else one.shown for one in found] == [None, "", "", "mix causal", "mix causal", ""]
    assert [round(record["difference"], 6) if record["difference"] is not None else None for record in summarise(data)] == [
        None, -0.4, 0.0, -0.1, 0.1, 0.0
    ]  # fmt: skip


@pytest.mark.parametrize("chosen", ["0.003", "0.01", None])
def test_dense_at_several_rates(chosen):
    """The column was gone when dense stood there twice. A rate that was chosen counts, else that of the lowest loss."""
    data = [*rows("stl", "r=6", curve=(4.0, 3.0, 2.5))]
    for lr, curve in (("0.003", (5.0, 4.0, 3.0)), ("0.01", (5.0, 4.0, 2.9))):
        tuned = {"tuned": "0.003, 0.01"} if lr == chosen else {}
        data += rows(variant=f"lr {lr}", lr=float(lr), curve=curve, **tuned)
    groups = group_rows(data)
    assert dense_of(groups[0], groups).shown == f"lr {chosen or '0.01'}"
    assert dense_of(groups[1], groups) is None
    mixed = group_rows(
        [*rows(variant="mix causal"), *rows(variant="mix causal, lr 0.01", lr=1e-2, curve=(5.0, 4.0, 2.9))]
    )
    assert [dense_of(group, mixed) for group in mixed] == [None, None]


def test_tests_are_paired_and_corrected():
    data = [row for seed in range(3) for row in rows(seed=seed, test=3.0 + seed)]
    data += [row for seed in range(3) for row in rows("stl", seed=seed, test=2.9 + seed + 0.001 * seed)]
    data += [row for seed in range(3) for row in rows("2:4", seed=seed, test=3.0 + seed + 0.1 * (-1) ** seed)]
    dense, stl, sparse = summarise(data)
    assert dense["bits"] == 4.0 and dense["bits_sd"] == 1.0
    assert stl["p"] < 1e-3 and stl["p_holm"] == pytest.approx(2 * stl["p"])
    assert sparse["p"] > 0.3 and sparse["p_holm"] == sparse["p"]


def test_what_is_not_over_is_not_compared():
    data = [*rows(), *rows("stl", curve=(4.0, 3.5), test=None, epochs=3)]
    dense, stl = summarise(data)
    assert dense["complete"] and not stl["complete"]
    assert stl["difference"] is None and stl["bits"] is None
    assert "has not finished" in caption([dense, stl])
    seeds = [*rows(), *rows(seed=1, curve=(4.0,), test=None, epochs=3)]
    (record,) = summarise(seeds)
    assert (record["seeds"], record["state"]) == (1, "seed 0: 3, seed 1: 1")


def test_a_rate_at_the_end_of_the_grid_is_said():
    edge = summarise(rows(tuned="0.001, 0.01"))
    assert "might be better: dense." in caption(edge)
    assert "might be better" not in caption(summarise(rows(tuned="0.0001, 0.001, 0.01")))
    assert "one seed" in caption(edge)
    assert caption([]) == "No rows yet."


def test_columns_and_page(tmp_path):
    data = [*rows(), *rows("stl", "r=6, mixing none", test=2.5, flops=50)]
    shown, lines = filled(columns(), summarise(data))
    cells = dict(zip([column.title for column in shown], lines[1], strict=True))
    assert cells["Bits a byte"] == "2.500"
    assert cells["Less dense's"] == "−0.400"
    assert cells["FLOPs fewer, model"] == "2.00×"
    assert cells["Training FLOPs"] == "4.50 k"
    page = write_report(tmp_path, data, "Title", ["A note."], tried=rows(lr=1e-2, test=None, tested=False))
    text = page.read_text()
    assert "A note." in text and "2.500" in text
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_figure_has_every_run_and_every_rate():
    data = [*rows(), *rows("stl", "r=6", flops=50)]
    made = figure(data, tried=rows(lr=1e-2, test=None, tested=False, curve=(5.0, 4.5, 4.4), variant="lr 0.01"))
    by_flops, by_seconds, by_size, by_rate = made.axes
    assert [list(line.get_xdata()) for line in by_flops.lines] == [[3000, 6000, 9000], [1500, 3000, 4500]]
    assert [list(line.get_ydata()) for line in by_seconds.lines] == [[5.0, 4.0, 3.0]] * 2
    assert [line.get_ydata()[0] for line in by_size.lines] == [2.9, 2.9]
    assert {tuple(line.get_xdata()) for line in by_rate.lines} == {(1e-3, 1e-2), (1e-3,)}
    figure([])  # of nothing there is a figure, too
