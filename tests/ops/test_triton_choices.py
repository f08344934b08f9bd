"""Block sizes: every candidate computes the same, the table is found by the device's name, and tuning picks what is faster."""

import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs under TRITON_INTERPRET=1", allow_module_level=True)

from strassen_tile.errors import ConfigError
from strassen_tile.ops import eager, fused
from strassen_tile.ops.cuda import choices, passes, tune
from strassen_tile.ops.cuda.choices import Choice
from strassen_tile.ops.fused import Norm, Weights


@pytest.fixture(autouse=True)
def _forget():
    choices.forget()
    yield
    choices.forget()


@pytest.mark.parametrize("p", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tile_rows,tiles", sorted({c[:2] for c in choices.candidates(16)}))
def test_every_block_computes_the_same(tile_rows: int, tiles: int, p: int) -> None:
    """Odd numbers of tile rows in two samples, so that a block of four holds rows of both, and hangs over the end."""
    x, e = torch.randn(2, 13 if p == 4 else 3, 75), torch.randn(5, p, 4)
    up, down = (Weights(torch.randn(5, 19, 19), e, e, torch.randn(75)) for _ in range(2))
    norm = Norm("layer", torch.rand(75), torch.rand(75), 1e-5)
    double = [Norm("layer", norm.scale.double(), norm.shift.double(), 1e-5)]
    double += [Weights(*(t.double() for t in layer)) for layer in (up, down)]
    with choices.trying(Choice(tile_rows, tiles, 4)):
        encoded = passes.encode(x, e)
        torch.testing.assert_close(encoded.double(), eager.encode(x.double(), e.double()), rtol=1e-5, atol=1e-5)
        found = passes.correlate(x, encoded, (p, 4), False)
        expected = eager.correlate(x.double(), encoded.double(), (p, 4), False)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)
        y = passes.mlp(x, *norm, up, up, down, 75, 75, "silu").double()
    expected = fused.composed_mlp(x.double(), *double[0], double[1], double[1], double[2], 75, 75, "silu")
    assert float((y - expected).norm() / expected.norm()) < 3e-6


def test_the_table_of_a_device_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    file, name = tmp_path / "choices.json", choices.key("decode", 16, 32, 2)
    choices.write(file, "GPU 1", {name: Choice(2, 128, 8)})
    choices.write(file, "GPU 7", {name: Choice(4, 32, 2)})
    assert set(json.loads(file.read_text())) == {"GPU 1", "GPU 7"}
    monkeypatch.setenv("STRASSEN_TILE_CHOICES", str(file))

    def chosen(step: str = "decode", device: str = "cuda:1", dtype: torch.dtype = torch.bfloat16) -> Choice:
        return choices.chosen(step, 16, 32, dtype, torch.device(device))

    assert chosen() == (2, 128, 8)
    assert chosen(device="cuda:7") == (4, 32, 2)
    assert chosen(device="cuda") == chosen(step="encode") == chosen(device="cpu") == choices.guess("encode", 16, 32, 2)
    assert chosen(dtype=torch.float32) == choices.guess("decode", 16, 32, 4)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"GPU": {"decode": [1, 64]}}', '{"GPU": {"decode": [1, 48, 4]}}', '{"GPU": 3}']
)
def test_a_file_that_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "choices.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"choices\.json"):
        choices.read(file)
    with pytest.raises(ConfigError, match="no table"):
        choices.read(tmp_path / "absent.json")


def test_tuning_takes_the_fastest_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that favours large blocks; one candidate is made wrong, one does not compile, and one is hardly faster."""
    guess, fast, wrong, failing = (
        choices.guess("encode", 16, 16, 4),
        Choice(2, 64, 4),
        Choice(4, 64, 4),
        Choice(1, 256, 4),
    )
    milliseconds = {guess: 4.0, fast: 2.0, wrong: 1.0, failing: 0.5, Choice(2, 32, 4): 3.0}

    def clock(run) -> float:
        run()
        return milliseconds[choices.chosen("encode", 16, 16, torch.float32, torch.device("cpu"))]

    original = tune.launch.compile_time

    def compile_time(*arguments):
        made = original(*arguments)
        if (made["BI"], made["BJ"]) == wrong[:2]:
            made["P"] = 2  # reads other rows
        if (made["BI"], made["BJ"]) == failing[:2]:
            raise RuntimeError("out of resource")
        return made

    monkeypatch.setattr(tune.launch, "compile_time", compile_time)
    sizes = {"n": 12, "k": 64, "dtype": torch.float32, "device": "cpu", "clock": clock}
    found = list(tune.tune((5,), **sizes, among=list(milliseconds)))
    assert {result.key for result in found} == {choices.key(step, 16, 16, 4) for step in choices.KERNELS}
    assert {result[1:] for result in found} == {(fast, 2.0, 4.0)}
    milliseconds[fast] = 3.99
    found = list(tune.tune((5,), **sizes, among=[guess, fast]))
    assert {result[1:] for result in found} == {(guess, 4.0, 4.0)}
