"""`strassen-tile bench` on sizes that take no time. Nothing here asserts a speed."""

import json

import pytest
import torch
from flat_machine import FLAT

from strassen_tile import cost
from strassen_tile.baselines import products
from strassen_tile.baselines.products import dense
from strassen_tile.cli import main
from strassen_tile.cost import rates
from strassen_tile.errors import ConfigError
from strassen_tile.experiments import speed, verification
from strassen_tile.experiments.pairs import interleave
from strassen_tile.ops.cpu import panels
from strassen_tile.report import bench as bench_report

CONTRACT = {
    "device", "dtype", "n", "k", "m", "tile", "rank", "pass", "method", "median_s", "q20_s", "q80_s", "speedup", "limit",
    "error", "commit", "machine", "compiled",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def test_bench_leaves_rows_page_and_plot(tmp_path) -> None:
    out = tmp_path / "out"
    arguments = ["--shapes", "64x96x80,33x50x41", "--ranks", "7,16", "--dtype", "bfloat16", "--seconds", "0.01"]
    assert main(["bench", "--out", str(out), *arguments]) == 0
    rows = json.loads((out / "rows.json").read_text())
    assert len(rows) == 2 * 2 * (2 * 2 + 1)  # shapes, passes, ranks and methods, dense
    dense = [row for row in rows if row["method"] == "dense"]
    assert len(dense) == 2 * 2
    for row in dense:
        assert (row["rank"], row["limit"], row["speedup"], row["median_s"]) == (None, 1.0, 1.0, row["dense_s"])
        assert row["pairs"] >= 4 * 5  # of all that it was paired with
    for row in rows:
        assert set(row) >= CONTRACT
        assert 0 < row["q20_s"] <= row["median_s"] <= row["q80_s"]
        assert row["limit"] == 64 / (row["rank"] or 64)
        assert row["error"] > 0
        assert row["pairs"] >= 5
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "<table" in (out / "report.html").read_text()


def test_a_wrong_implementation_is_not_timed(monkeypatch) -> None:
    original = products.stl_linear
    monkeypatch.setattr(products, "stl_linear", lambda *a, **k: original(*a, **k).roll(1, dims=-1))
    with pytest.raises(speed.VerificationError, match="not timed"):
        next(speed.bench([(32, 32, 32)], [8], methods=("stl",), seconds=0.0))


def test_an_error_in_the_last_row_is_seen(monkeypatch) -> None:
    original = products.stl_linear

    def spoiled(*arguments, **options):
        y = original(*arguments, **options).clone()
        y[-1] += 1
        return y

    monkeypatch.setattr(products, "stl_linear", spoiled)
    with pytest.raises(speed.VerificationError):
        next(speed.bench([(701, 32, 32)], [8], methods=("stl",), seconds=0.0))


def test_a_wrong_gradient_is_seen(monkeypatch) -> None:
    original = products.stl_linear
    monkeypatch.setattr(
        products, "stl_linear", lambda x, w, e, d, **k: original(x, w.detach() + 2 * (w - w.detach()), e, d, **k)
    )
    with pytest.raises(speed.VerificationError, match="gradient"):
        next(speed.bench([(32, 32, 32)], [8], methods=("stl",), passes=("step",), seconds=0.0))


def test_gradients_of_what_is_too_large_are_seen_at_both_ends(monkeypatch) -> None:
    """Beyond 4096³ the reference would take minutes; the first and the last rows are enough to see a wrong panel."""
    monkeypatch.setattr(verification, "FULLY_VERIFIED", 1)
    options = {"methods": ("stl",), "passes": ("step",), "seconds": 0.0}
    assert len(list(speed.bench([(301, 64, 32)], [24], **options))) == 2
    original = products.stl_linear

    def last_rows_dropped(x, w, *factors, **sizes):
        return original(torch.cat([x[:-4], x[-4:].detach()]), w, *factors, **sizes)

    monkeypatch.setattr(products, "stl_linear", last_rows_dropped)
    with pytest.raises(speed.VerificationError, match="gradient 0"):
        next(speed.bench([(301, 64, 32)], [24], **options))


def test_runs_alternate() -> None:
    order: list[str] = []
    pairs = interleave(lambda: order.append("a"), lambda: order.append("b"), 0.0, "cpu")
    assert len(pairs) == 5
    assert order == ["a", "b"] * 7  # two pairs of warm-up


@pytest.mark.parametrize("text", ["", "4x4", "axbxc", "4x0x4", "vit-x", "4x4x4,"])
def test_shapes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="NxKxM"):
        speed.shapes_of(text)


def test_prediction_on_a_machine_of_constant_rate_is_the_flop_count() -> None:
    n, k, m, r = 512, 256, 1024, 24
    dense, products, encode, decode = 2 * n * k * m, 2 * n * k * m * r // 64, 2 * n * k * r, 2 * n * m * r
    assert FLAT.linear(n, k, m, 4, r) == pytest.approx((dense / 1e11, (encode + products + decode) / 1e11))
    # A step: X twice, dY; Y, dX; dE and dD are transforms of square layers' size 2NKr, seven in all.
    dense, products, transform = 2 * n * k * k, 2 * n * k * k * r // 64, 2 * n * k * r
    assert FLAT.linear(n, k, k, 4, r, "step") == pytest.approx(
        (3 * dense / 1e11, (3 * products + 7 * transform) / 1e11)
    )


@pytest.mark.parametrize("rank", [64, 96])
def test_from_rank_pqs_on_nothing_is_gained(rank: int) -> None:
    """A limit of 1 and less, and a prediction slower than dense, of what saves nothing."""
    for name in ("forward", "step"):
        assert FLAT.speedup(4096, 4096, 4096, 4, rank, name) < 64 / rank
    with pytest.warns(UserWarning, match="saves nothing"):
        rows = list(speed.bench([(64, 64, 64)], [rank], methods=("stl",), passes=("forward", "step"), seconds=0.0))
    assert [(row["method"], row["rank"]) for row in rows] == [("stl", rank), ("dense", None)] * 2
    assert [row["limit"] for row in rows] == [64 / rank, 1.0] * 2
    assert all(row["error"] < 1e-6 for row in rows)


def test_what_the_roster_gives_is_timed() -> None:
    """The control for row mixing has no line of its own in bench, and needs none."""
    rows = list(speed.bench([(33, 52, 41)], [8, 9], methods=("dense", "dense+mix", "low-rank"), seconds=0.0))
    assert [(row["method"], row["rank"]) for row in rows] == [
        ("low-rank", 8), ("low-rank", 9), ("dense+mix", None), ("dense", None)
    ]  # fmt: skip
    assert [row["limit"] for row in rows] == [64 / 8, 64 / 9, 1.0, 1.0]
    assert [row["predicted_s"] for row in rows] == [None] * 4


def test_a_row_says_medians_and_quantiles_of_its_pairs() -> None:
    row = speed._row(dense(), [(10.0, 3.0), (10.0, 1.0), (20.0, 2.0), (10.0, 5.0), (10.0, 4.0)], 0.5, (2.0, 1.0))
    assert (row["q20_s"], row["median_s"], row["q80_s"], row["dense_s"]) == pytest.approx((1.8, 3.0, 4.2, 10.0))
    ratios = (row["speedup_q20"], row["speedup"], row["speedup_q80"])  # of 2, 2.5, 10/3, 10, 10: ratios of neighbours
    assert ratios == pytest.approx((2.4, 10 / 3, 10.0))
    assert (row["pairs"], row["error"], row["predicted_dense_s"], row["predicted_s"]) == (5, 0.5, 2.0, 1.0)


def test_machine_is_measured_once(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr("strassen_tile.cost.rates.measure", lambda *a: calls.append(a) or FLAT)
    assert cost.machine("cpu", torch.float16) == cost.machine("cpu", torch.float16) == FLAT
    assert len(calls) == 1


def test_what_has_no_step() -> None:
    """A step that differentiates x alone, beside a dense one that differentiates W too, flatters 2:4 by a third."""
    shapes = [(64, 64, 64)]
    (said,) = speed.left_out(shapes, [8], ("forward", "step"), ("stl", "2:4"))
    assert "no gradient of the sparse weight" in said
    assert not speed.left_out(shapes, [8], ("forward",), ("2:4",)) + speed.left_out(shapes, [8], ("step",), ("stl",))
    for name, why in (("2:4", "no gradient of the sparse weight"), ("pca", "finished weight")):
        with pytest.raises(ConfigError, match=why):
            speed.bench(shapes, [8], methods=(name,), passes=("step",))
    assert [speed.row_count(shapes, [8, 9], (name,), ("stl", "2:4")) for name in ("forward", "step")] == [4, 3]


def test_what_amm_compares_is_timed() -> None:
    """At the FLOPs of each rank's products, and what those do not pay for is said."""
    shapes, ranks, methods = [(32, 64, 48), (32, 48, 64), (32, 64, 48)], [32, 24], ("pca", "int8", "hadamard")
    rows = list(speed.bench(shapes, ranks, methods=methods, passes=("forward", "step"), seconds=0.0))
    each = [("pca", 32), ("hadamard", 32), ("pca", 24), ("hadamard", 24), ("int8", None), ("dense", None)]
    assert [(row["method"], row["rank"]) for row in rows if row["k"] == 64] == each
    assert speed.row_count(shapes, ranks, ("forward", "step"), methods) == len(rows)
    assert {row["pass"] for row in rows} == {"forward"}
    small = speed.left_out([(16, 16, 16)], [8, 24], ("forward",), ("hadamard", "stl"))  # of 24 it is timed
    assert small == ["hadamard is not timed at 16x16x16, r = 8: the FLOPs pay for nothing, or the sides do not fit."]


def test_two_of_four_is_not_timed_where_it_means_nothing() -> None:
    with pytest.raises(ConfigError, match=r"2:4.*NVIDIA GPU.*leave them out with --methods"):
        speed.bench([(64, 64, 64)], [8], methods=("stl", "2:4"))


def test_bad_arguments_are_said_before_the_first_row() -> None:
    for wrong in ({"ranks": [8, 10**9]}, {"tile": 10**6}, {"shapes": [(10**8, 10**8, 64)]}, {"passes": ()}):
        with pytest.raises(ConfigError):
            speed.bench(**{"shapes": [(64, 64, 64)], "ranks": [8], **wrong})


def test_decisions_count_the_side_of_one() -> None:
    rows = [
        {"predicted_dense_s": 2.0, "predicted_s": 1.0, "speedup": 1.1},
        {"predicted_dense_s": 2.0, "predicted_s": 1.0, "speedup": 0.9},
        {"predicted_dense_s": 1.0, "predicted_s": 2.0, "speedup": 0.5},
        {"predicted_dense_s": None, "predicted_s": None, "speedup": 0.5},
    ]
    assert bench_report.decisions(rows) == (2, 3)


def test_a_panel_left_out_of_a_gradient_is_seen(monkeypatch) -> None:
    monkeypatch.setattr(panels, "TRAINING_BYTES", 1 << 16)
    original = panels.WeightSum.add

    def first_only(self, a, b) -> None:
        if self._first:
            original(self, a, b)

    monkeypatch.setattr(panels.WeightSum, "add", first_only)
    with pytest.raises(speed.VerificationError, match="gradient 1"):
        next(speed.bench([(1024, 64, 64)], [24], methods=("stl",), passes=("step",), seconds=0.0))


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["bench", "--shapes", "64x64x64", "--methods", "junk"], "unknown methods junk"),
        (["bench", "--shapes", "64x64x64", "--ranks", "0"], "ranks must be positive"),
        (["bench", "--shapes", "64x64x64", "--seconds", "nan"], "seconds not negative"),
        (["bench", "--shapes", "64x64x64", "--threads", "0"], "--threads must be positive"),
        (["bench", "--shapes", "4x4x4"], "too small"),
        (["bench", "--shapes", "²x4x4"], "NxKxM"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, said, tmp_path, capsys) -> None:
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_a_folder_that_cannot_be_is_said_in_one_line(tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    assert main(["bench", "--shapes", "64x64x64", "--out", str(tmp_path / "file" / "out")]) == 1
    assert "file" in capsys.readouterr().err


def test_a_cache_of_nonsense_is_measured_again(monkeypatch) -> None:
    monkeypatch.setattr("strassen_tile.cost.rates.measure", lambda *a: FLAT)
    path = rates._cache_path("cpu", torch.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    older = {"coding" if name == "transform" else name: value for name, value in vars(FLAT).items()}
    older["call"] = 1.0  # if it were read, one would see it
    for record in ([], {}, {**vars(FLAT), "gemm": []}, {**vars(FLAT), "copy": 0.0}, older):
        path.write_text(json.dumps(record))
        assert cost.machine("cpu", torch.float32) == FLAT
        assert json.loads(path.read_text())["transform"] == FLAT.transform
    path.unlink()
