"""convert(min_speedup=…) on made-up machines: nothing here is timed."""

import dataclasses
import sys

import pytest
import torch
from torch import nn

import strassen_tile as st
from strassen_tile import cost
from strassen_tile.errors import ConversionError

CONVERT = sys.modules["strassen_tile.convert.stl"]


def machine(copy: float) -> cost.Machine:
    flat = ((128, 1e11), (2048, 1e11))
    return cost.Machine("cpu", "float32", 2, gemm=flat, batched=flat, transform=1e11, copy=copy, fresh=1e12, call=0.0)


@pytest.fixture(autouse=True)
def _no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which rows may mix is not asked here, and takes long at these sizes."""
    monkeypatch.setattr(sys.modules["strassen_tile.convert.select"], "find_leaks", lambda *_, **__: {})


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 16), nn.GELU(), nn.Linear(16, 512), nn.Identity(), nn.ReLU()
    )


def test_layers_that_would_not_pay_are_left_with_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of 16 features reads and writes more than it saves; the wide one gains."""
    monkeypatch.setattr(CONVERT, "machine", lambda device, dtype: machine(copy=3e10))
    conversion = st.convert(model(), st.STLConfig(rank=24), example_inputs=torch.randn(2, 256, 512), min_speedup=1.2)
    assert list(conversion.converted) == ["0"]
    for name in ("2", "4"):
        assert "predicted" in conversion.skipped[name] and "below 1.2" in conversion.skipped[name]


def test_without_memory_limits_what_pays_is_a_matter_of_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer's products save the same, but with 16 features on one side, coding costs more than they do."""
    monkeypatch.setattr(CONVERT, "machine", lambda device, dtype: machine(copy=1e30))
    for threshold, names in ((1.2, ["0"]), (0.1, ["0", "2", "4"])):
        conversion = st.convert(
            model(),
            st.STLConfig(rank=24),
            example_inputs=torch.randn(2, 256, 512),
            min_speedup=threshold,
            force_mixing=["*"],
        )
        assert list(conversion.converted) == names


def test_every_call_of_a_layer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One long call gains; twenty short ones lose more: an STL layer takes several steps where dense takes one."""

    class Often(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(512, 512)

        def forward(self, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
            long = self.layer(x).relu()
            return long + sum(self.layer(x[:, :1]).relu() for _ in range(len(times)))

    monkeypatch.setattr(CONVERT, "machine", lambda *_: dataclasses.replace(machine(copy=1e30), call=1e-4))
    config = st.STLConfig(mixing="none", rank=4)
    for times, converted in ((0, ["layer"]), (20, [])):
        examples = (torch.randn(2, 256, 512), torch.zeros(times))
        done = st.convert(Often(), config, example_inputs=examples, min_speedup=1.2, dry_run=True)
        assert list(done.converted) == converted


def test_rows_must_be_known() -> None:
    with pytest.raises(ConversionError, match="example_inputs"):
        st.convert(model(), min_speedup=1.1)
