"""`make gpu-check` goes through all its steps on a CPU: what is to run once, on a borrowed GPU, must not fail on a typo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"


def test_dry_run(tmp_path) -> None:
    command = [sys.executable, SCRIPT, "--dry-run", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads((tmp_path / "checks.json").read_text())
    assert all(row["ok"] for row in checks)
    kinds = {row["check"].split()[0] for row in checks}
    assert kinds >= {"encode", "decode", "correlate", "mlp", "linear"}
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row.get("block") for row in rows} == {None, "mlp", "llama-mlp", "t2t_vit_14"}
    assert {row["pass"] for row in rows} == {"forward", "step"}
    assert (tmp_path / "report.html").exists()


def test_it_stops_when_the_time_is_up_and_keeps_what_there_is(tmp_path) -> None:
    command = [sys.executable, SCRIPT, "--dry-run", "--seconds", "20", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "time is up" in done.stdout
    assert len(json.loads((tmp_path / "rows.json").read_text())) < 10
