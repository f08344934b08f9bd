"""Triton's kernels of the short convolution, by its interpreter on the CPU, against the sum in float64. Memory is poisoned."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs under TRITON_INTERPRET=1", allow_module_level=True)

from strassen_tile.ops.cuda import taps as kernels
from strassen_tile.ops.taps import shifted_sum

# One rounding of the result; bfloat16 truncates under the interpreter instead of rounding.
STORED = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Samples shorter than the taps, blocks that span samples, features and rows beside a block's size, more blocks than programs.
SIZES = [(3, 1, 1), (2, 2, 65), (2, 33, 66), (3, 45, 5)]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Every empty tensor starts as NaN."""
    original = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *size, **how: original(self, *size, **how).fill_(float("nan"))
    )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_convolve_and_correlate(size: tuple[int, int, int], taps: int, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "_PROGRAMS", 2)
    for dtype, allowed in STORED.items():
        if dtype != torch.float32 and size != SIZES[1]:
            continue
        x, grad, weight = torch.randn(size).to(dtype), torch.randn(size).to(dtype), torch.randn(size[-1], taps)
        for before in {0, taps // 2, taps - 1}:
            doubles = [t.double().requires_grad_() for t in (x, weight)]
            expected = shifted_sum(*doubles, before, residual=True)
            of_x, of_weight = torch.autograd.grad(expected, doubles, grad.double())
            assert relative(kernels.convolve(x, weight, before, True), expected.detach()) < allowed
            back = kernels.convolve(grad, weight.flip(-1), taps - 1 - before, True)
            assert relative(back, of_x) < allowed
            assert relative(kernels.convolve(x, weight, before, False), expected.detach() - x.double()) < 2 * allowed
            found = kernels.correlate(grad, x, taps, before)
            assert found.dtype == torch.float32
            assert (found.double() - of_weight).abs().max() < 1e-5 * (grad.double().norm() * x.double().norm())


def test_rows_in_any_order_of_memory() -> None:
    x, weight = torch.randn(6, 2, 9).transpose(0, 1), torch.randn(4, 9).mT
    expected = shifted_sum(x.double(), weight.double(), 3, residual=True)
    assert relative(kernels.convolve(x, weight, 3, True), expected) < 1e-6


def test_what_they_take() -> None:
    assert kernels.supports(torch.zeros(1, 2, 3))
    assert not kernels.supports(torch.zeros(1, 2, 3, dtype=torch.float64))
    assert not kernels.supports(torch.zeros(0, 2, 3))
    assert not kernels.supports(torch.empty(2**16, 2**14, 1, device="meta"))
