"""`make gpu-check` goes through all its steps on a CPU: what is to run once, on a borrowed GPU, must not fail on a typo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"


BARE = """import sys


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError("not installed here", name=name)


sys.meta_path.insert(0, Finder())
"""
MISSING = {
    "rich",
    "matplotlib",
    "transformers",
    "safetensors",
    "sklearn",
    "PIL",
    "accelerate",
    "datasets",
    "scipy",
    "pandas",
}


@pytest.mark.slow
def test_dry_run_with_torch_and_triton_alone(tmp_path) -> None:
    """A borrowed machine has the common packages at best."""
    (tmp_path / "sitecustomize.py").write_text(BARE.format(missing=MISSING))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, SCRIPT, "--dry-run", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads((tmp_path / "checks.json").read_text())
    assert all(row["ok"] for row in checks)
    kinds = {row["check"].split()[0] for row in checks}
    assert kinds >= {"encode", "decode", "correlate", "mlp", "linear", "gradient"}
    assert sum("went through" in row["check"] for row in checks) == 2
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row.get("block") for row in rows} == {None, "mlp", "llama-block", "t2t_vit_14"}
    assert {row["pass"] for row in rows} == {"forward", "step"}
    parts = json.loads((tmp_path / "parts.json").read_text())
    assert {row["part"] for row in parts} == {"tuned", "split", "fp8"}
    split = next(row for row in parts if row["part"] == "split")
    assert {"encode_s", "products_s", "decode_s", "whole_s", "dense_s"} <= set(split)
    assert len(json.loads((tmp_path / "choices.json").read_text())) == 1
    page = (tmp_path / "report.html").read_text()
    assert all(part in page for part in ("checks passed", "llama-block", "Where the time goes", "fp8", "Block sizes"))
    assert not (tmp_path / "plot.png").exists(), "matplotlib was to be missing"


@pytest.mark.slow
def test_a_check_that_fails_or_never_ends_is_said(tmp_path) -> None:
    """An error that is no number is not below what is allowed; of a process that dies, its part of the checks is missing."""
    program = "import sys; sys.path.insert(0, {!r}); sys.argv = {!r}; import gpu_check as g; {}; g.main()"
    arguments = ["gpu_check.py", "--dry-run", "--checks-only", "--out", str(tmp_path)]
    for change, message in (
        (
            "g.checked = lambda run, of: [{'check': 'x', 'error': float('nan'), 'allowed': 1, 'ok': float('nan') < 1}]",
            "0 of 1",
        ),
        ("g.__file__ = '/nowhere.py'", "did not go through"),
    ):
        command = [sys.executable, "-c", program.format(str(SCRIPT.parent), arguments, change)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 1, done.stdout + done.stderr
        assert message in done.stdout


@pytest.mark.slow
def test_it_stops_when_the_time_is_up_and_keeps_what_there_is(tmp_path) -> None:
    command = [sys.executable, SCRIPT, "--dry-run", "--seconds", "1", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "time is up" in done.stdout
    assert (tmp_path / "plot.png").exists()
    assert len(json.loads((tmp_path / "rows.json").read_text())) < 10
