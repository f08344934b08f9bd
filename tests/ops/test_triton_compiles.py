"""What the compiler makes of the kernels for a GPU that is not there: no spills, no stack, 16-byte stores, tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_kernels.py")


def compiled(capability: int, wanted: str) -> dict[str, dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, str(capability), wanted], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row.pop("name"): row for row in rows}


def check(capability: int, wanted: str, least: int) -> None:
    found = compiled(capability, wanted)
    assert len(found) >= least
    for name, row in found.items():
        assert "error" not in row, (name, row)
        assert row["local"] == 0, (name, row)
        assert row["stack"] == 0, (name, row)
        if "fp32" not in name and not name.startswith("taps"):
            assert row["tensor_core"] > 0, (name, row)
            assert row["registers"] <= 128, (name, row)
        if "correlate" not in name and not name.startswith("encode per tile 8x8"):  # two tiles side by side: 4 bytes
            assert row["wide_stores"] > 0, (name, row)


def test_kernels_of_the_usual_rank_compile_without_spills() -> None:
    check(90, "4x4 r=24 bf16", least=8)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_spills(capability: int) -> None:
    check(capability, "", least=60)
