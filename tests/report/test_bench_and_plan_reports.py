"""If these fail, a bench or a plan is shown with a line, a limit or a layer missing or unnamed."""

from pathlib import Path

import pytest

from strassen_tile.records import read_rows
from strassen_tile.report import bench, plan

ROOT = Path(__file__).parents[2]
MEASURED = read_rows(ROOT / "benchmarks/results/cpu-amd-epyc-2-cores.json")
PLANNED = read_rows(ROOT / "results/digits-wide/plan.json")


def test_bench_has_a_panel_a_dtype_and_pass_and_one_legend():
    pytest.importorskip("matplotlib")
    rows = [row for row in MEASURED if (row["dtype"], row["pass"]) != ("bfloat16", "step")]
    made = bench.figure(rows)
    assert [axes.get_title(loc="left") for axes in made.axes] == [
        "float32, forward", "float32, step", "bfloat16, forward"
    ]  # fmt: skip
    series = {f"{row['method']} r={row['rank']}" if row["rank"] else row["method"] for row in rows}
    names = [text.get_text() for text in made.legends[0].get_texts()]
    assert sorted(names) == sorted(series)


def test_bench_draws_speed_ups_at_their_sizes_below_their_limits():
    pytest.importorskip("matplotlib")
    rows = [
        {"dtype": "float32", "pass": "step", "method": "stl", "rank": 16, "n": n, "k": n, "m": 8 * n, "speedup": n / 64,
         "speedup_q20": n / 70, "speedup_q80": n / 60, "limit": 4.0}
        for n in (128, 64)
    ]  # fmt: skip
    (axes,) = bench.figure(rows).axes
    measured, limit, _ = axes.lines
    assert measured.get_label() == "stl r=16"
    assert measured.get_xydata().tolist() == [[128, 1], [256, 2]]
    assert limit.get_xydata().tolist() == [[128, 4], [256, 4]]


def test_published_benchmarks_and_plans_still_make_a_report(tmp_path):
    pytest.importorskip("matplotlib")
    page = bench.write_report(tmp_path / "bench", MEASURED[:40], "t", ["a note"])
    assert page.read_text(encoding="utf-8").count('<th scope="row"') == 40
    page = plan.write_report(tmp_path / "plan", PLANNED, "t", ["a note"])
    assert page.read_text(encoding="utf-8").count('<th scope="row"') == len(plan.grouped(PLANNED)) < len(PLANNED)
    for name, rows in (("bench", MEASURED[:40]), ("plan", PLANNED)):
        assert read_rows(tmp_path / name / "rows.json") == rows
        assert (tmp_path / name / "plot.png").read_bytes().startswith(b"\x89PNG")
