"""If these fail, the short convolution over rows is another one than its formula, on some path, or its gradients are."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from strassen_tile.ops import taps
from strassen_tile.ops.cpu import taps as cpu
from strassen_tile.ops.taps import convolve_rows, shifted_sum

SHAPES = [(2, 9, 6), (1, 1, 16), (3, 2, 17), (2, 4, 33), (1, 70, 1), (2, 5, 48), (5, 300, 64)]


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oracle(x, weight, before, residual):
    y = x.double().clone() if residual else torch.zeros_like(x, dtype=torch.float64)
    for n in range(x.shape[1]):
        for tap in range(weight.shape[1]):
            if 0 <= n + tap - before < x.shape[1]:
                y[:, n] += weight[:, tap].double() * x[:, n + tap - before].double()
    return y


@pytest.fixture(params=[True, False], ids=["compiled", "plain"])
def path(request, monkeypatch):
    if request.param and cpu._taps is None:
        pytest.skip("built without a compiler")
    if not request.param:
        monkeypatch.setattr(cpu, "_taps", None)
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("count", "before", "residual"), [(4, 3, True), (4, 2, False), (3, 0, True), (1, 0, False), (7, 6, True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula(path, shape, count, before, residual, dtype):
    x, weight = drawn(*shape, dtype=dtype), drawn(shape[-1], count, seed=1, dtype=torch.float32)
    grad = drawn(*shape, seed=2, dtype=dtype)
    x.requires_grad_(), weight.requires_grad_()
    assert cpu.supports(x) is path
    y = convolve_rows(x, weight, before, residual=residual)
    y.backward(grad)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = shifted_sum(*wide, before, residual=residual)
    expected.backward(grad.double())
    torch.testing.assert_close(expected.detach(), oracle(x.detach(), weight.detach(), before, residual))
    rounding = 8 * torch.finfo(dtype).eps
    for found, exact in ((y, expected), (x.grad, wide[0].grad), (weight.grad, wide[1].grad)):
        error = float((found.detach().double() - exact.detach()).norm())
        assert error <= rounding * float(exact.detach().norm()), (found.shape, error)
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (dtype, dtype, torch.float32)
    plain = x.detach().mT.contiguous().mT  # of another layout
    torch.testing.assert_close(convolve_rows(plain, weight, before, residual=residual), y)


def test_gradients_of_any_order():
    x, weight = drawn(2, 5, 3).requires_grad_(), drawn(3, 4, seed=1).requires_grad_()
    for before, residual in ((3, True), (1, False)):
        call = lambda x, w, b=before, r=residual: convolve_rows(x, w, b, residual=r)  # noqa: E731
        assert torch.autograd.gradcheck(call, (x, weight))
        assert torch.autograd.gradgradcheck(call, (x, weight))


def test_nothing_comes_from_other_samples_or_from_outside(path):
    x = drawn(3, 4, 18, dtype=torch.float32)
    x[1] = torch.nan
    weight = drawn(18, 4, seed=1, dtype=torch.float32)
    y = convolve_rows(x, weight, 3)
    assert y[[0, 2]].isfinite().all() and y[1].isnan().all()
    ones = convolve_rows(torch.ones(1, 4, 18), torch.ones(18, 4), 3, residual=False)
    assert ones[0, :, 0].tolist() == [1, 2, 3, 4]


def test_forward_mode_complex_and_vmap():
    x, weight = drawn(2, 5, 3), drawn(3, 4, seed=1)
    with forward_ad.dual_level():
        tangent = drawn(2, 5, 3, seed=2)
        y = convolve_rows(forward_ad.make_dual(x, tangent), weight, 3)
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, oracle(tangent, weight, 3, True))
    z = torch.complex(x, drawn(2, 5, 3, seed=3))
    found = convolve_rows(z, weight, 3)
    torch.testing.assert_close(found.imag, oracle(z.imag, weight, 3, True))
    batch, weights = drawn(4, 2, 5, 3), drawn(4, 3, 4, seed=1)
    mapped = torch.vmap(lambda x: convolve_rows(x, weight, 2))(batch)
    torch.testing.assert_close(mapped, torch.stack([oracle(one, weight, 2, True) for one in batch]))
    both = torch.vmap(lambda x, w: convolve_rows(x, w, 2))(batch, weights)
    torch.testing.assert_close(both, torch.stack([oracle(*pair, 2, True) for pair in zip(batch, weights, strict=True)]))
    each = torch.vmap(torch.func.grad(lambda w, x: convolve_rows(x, w, 2).square().sum()), in_dims=(None, 0))(
        weight, batch
    )
    one = torch.func.grad(lambda w: shifted_sum(batch[1], w, 2, residual=True).square().sum())(weight)
    torch.testing.assert_close(each[1], one)


def test_compiled_graphs_and_counted_flops():
    x, weight = (
        drawn(2, 9, 16, dtype=torch.float32).requires_grad_(),
        drawn(16, 4, seed=1, dtype=torch.float32).requires_grad_(),
    )
    with FlopCounterMode(display=False) as counter:
        expected = convolve_rows(x, weight, 3)
        assert counter.get_total_flops() == 2 * 2 * 9 * 16 * 4
        grads = torch.autograd.grad(expected.square().sum(), (x, weight))
    assert counter.get_total_flops() == 3 * 2 * 2 * 9 * 16 * 4
    compiled = torch.compile(lambda x, w: convolve_rows(x, w, 3), backend="aot_eager", fullgraph=True)
    found = compiled(x, weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), (x, weight)), grads)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.strassen_tile.taps, (x.detach().to(dtype), weight.detach(), 3, True))
        torch.library.opcheck(
            torch.ops.strassen_tile.taps_correlate, (x.detach().to(dtype), x.detach().to(dtype), 4, 3)
        )
    assert taps._kept(torch.bfloat16) == torch.float32
