"""What the compiler makes of the kernels for a GPU that is not there: no spills, no stack, 16-byte stores, tensor cores."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_kernels.py")


@functools.cache
def compiled(capability: int, wanted: str) -> dict[str, dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, str(capability), wanted], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row.pop("name"): row for row in rows}


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_spills(capability: int) -> None:
    found = compiled(capability, "")
    assert len(found) > 40
    for name, row in found.items():
        assert "error" not in row, (name, row)
        assert row["local"] == 0, (name, row)
        assert row["stack"] == 0, (name, row)
        if "fp32" not in name:
            assert row["tensor_core"] > 0, (name, row)
            assert row["registers"] <= 128, (name, row)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_fast_path_stores_16_bytes(capability: int) -> None:
    checked = 0
    for name, row in compiled(capability, "").items():
        if not name.startswith("correlate"):
            assert row["wide_stores"] > 0, (name, row)
            checked += 1
    assert checked > 50
