"""Passes in panels against the same pass composed of plain PyTorch in float64: forward and every gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import strassen_tile as stl
from strassen_tile.ops import eager, schemas
from strassen_tile.ops import linear as whole
from strassen_tile.ops.cpu import panels, tiles

pytestmark = pytest.mark.skipif(not tiles.compiled(), reason="built without a C compiler")

GRADIENTS = ("x", "encoded_weight", "encoder", "decoder", "bias")
# Storage rounds once in X̂, once in Ŷ and once in the result, each to half an ulp at most.
ROUNDED = {torch.float32: 2e-6, torch.bfloat16: 3 * 2.0**-9}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def layer(n: int, k: int, m: int, r: int, side: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    shapes = ((2, n, k), (r, -(-k // side), -(-m // side)), (r, side, side), (r, side, side), (m,))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def wide(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.double() for t in tensors]


@given(
    n=st.integers(1, 40),
    k=st.integers(1, 150),
    m=st.integers(1, 150),
    r=st.integers(1, 30),
    side=st.sampled_from([1, 2, 4, 8]),
)
def test_both_passes_at_any_size(n: int, k: int, m: int, r: int, side: int) -> None:
    """A gradient whose terms cancel is allowed, beside its relative error, two roundings of the sum of absolute values."""
    tensors, grad = layer(n, k, m, r, side), torch.randn(2, n, m)
    y, kept = panels.forward_keeping(*tensors, m)
    doubles, scale = wide(tensors), [t.abs() for t in wide(tensors)]
    for found in (y, panels.forward(*tensors, m, "none")):
        assert relative(found, whole.composed(*doubles, m)) < 3e-6
    wants = [True] * 5
    gradients = whole.composed_backward(grad.double(), *doubles[:4], None, wants)
    bounds = whole.composed_backward(grad.double().abs(), *scale[:4], None, wants)
    for given_kept in (kept, None):
        found = panels.backward(grad, *tensors[:4], given_kept, wants)
        for name, got, wanted, bound in zip(GRADIENTS, found, gradients, bounds, strict=True):
            assert got.shape == wanted.shape, name
            allowed = 3e-6 * float(wanted.norm()) + 2**-23 * float(bound.norm())
            assert float((got.double() - wanted).norm()) < allowed, name


@pytest.mark.parametrize("bytes_", [1, 3000, 20000, 1 << 20])
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_panels_do_not_show(bytes_: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of one tile row, of several with a shorter last one, across samples, and one panel: the same results."""
    tensors = layer(43, 40, 36, 7, 4, dtype)
    grad = torch.randn(2, 43, 36).to(dtype)
    monkeypatch.setattr(panels, "INFERENCE_BYTES", bytes_)
    monkeypatch.setattr(panels, "TRAINING_BYTES", bytes_)
    y, kept = panels.forward_keeping(*tensors, 36)
    expected = whole.composed(*wide(tensors), 36)
    assert relative(y, expected) < ROUNDED[dtype]
    assert relative(panels.forward(*tensors, 36, "none"), expected) < ROUNDED[dtype]
    wanted = whole.composed_backward(grad.double(), *wide(tensors[:4]), None, [True] * 5)
    for given_kept in (kept, None):
        found = panels.backward(grad, *tensors[:4], given_kept, [True] * 5)
        for name, got, gradient in zip(GRADIENTS, found, wanted, strict=True):
            assert relative(got, gradient) < ROUNDED[dtype], name


@pytest.mark.parametrize("asked", [1 << i for i in range(5)] + [0, 3, 5, 6, 9, 10, 12, 31], ids="{:05b}".format)
@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_any_set_of_gradients(asked: int, keep: bool) -> None:
    """What one gradient leaves in the workspace, another must not read; what nobody wants is empty."""
    wants = [bool(asked >> i & 1) for i in range(5)]
    tensors, grad = layer(19, 23, 30, 6, 4), torch.randn(2, 19, 30)
    kept = panels.forward_keeping(*tensors, 30)[1] if keep else None
    found = panels.backward(grad, *tensors[:4], kept, wants)
    expected = whole.composed_backward(grad.double(), *wide(tensors[:4]), None, wants)
    for name, wanted, got, gradient in zip(GRADIENTS, wants, found, expected, strict=True):
        assert got.shape == gradient.shape, name
        assert (got.numel() > 0) == wanted, name
        if wanted:
            assert relative(got, gradient) < 1e-5, name


@pytest.mark.parametrize("bytes_", [1, 5000, 1 << 26])
@pytest.mark.parametrize("activation", whole.ACTIVATIONS)
def test_activations_reach_every_row_once(activation: str, bytes_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels that end inside a sample and samples that end inside a panel; an activation applied twice would show."""
    monkeypatch.setattr(panels, "INFERENCE_BYTES", bytes_)
    tensors = layer(23, 40, 36, 7, 4)
    tensors[0] = torch.randn(5, 23, 40)
    expected = whole.composed(*wide(tensors), 36, activation)
    assert relative(panels.forward(*tensors, 36, activation), expected) < 3e-6


def test_many_small_terms_are_not_lost_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 panels that each add 1 to dŴ: a bfloat16 sum stops at 256."""
    monkeypatch.setattr(panels, "TRAINING_BYTES", 1)
    one = torch.ones(1, 1, 1, dtype=torch.bfloat16)
    x = grad = torch.ones(1, 512, 1, dtype=torch.bfloat16)
    dw = panels.backward(grad, x, one, one, one, None, [False, True, False, False, False])[1]
    assert dw.item() == 512


@pytest.mark.parametrize("most", [panels.INFERENCE_BYTES, panels.TRAINING_BYTES])
@given(total=st.integers(1, 10**9), row=st.integers(1, 10**8))
def test_panels_fit_the_workspace(most: int, total: int, row: int) -> None:
    height = panels.panel_rows(total, row, most)
    assert 1 <= height <= total
    assert height == 1 or height * row <= most


def test_a_forward_pass_needs_the_workspace_and_its_output() -> None:
    """At most 64 MiB beyond y are allocated, at an N whose X̂ and Ŷ would take 400 MiB."""
    x = torch.randn(1, 1 << 16, 256)
    w, e, d = torch.randn(24, 64, 64), torch.randn(24, 4, 4), torch.randn(24, 4, 4)
    vars(panels._held).clear()
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        y = stl.stl_linear(x, w, e, d)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    own = y.numel() * y.element_size()
    assert own <= allocated <= own + (64 << 20)


def test_every_element_is_written() -> None:
    """Memory starts as whatever it held; were a part left out, it would show as the poison it came from."""
    tensors, grad = layer(1000, 260, 523, 5, 4), torch.randn(2, 1000, 523)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        y, kept = schemas.linear_forward(*tensors, 523)
        gradients = schemas.linear_backward(grad, *tensors[:4], kept, [True] * 5)
    finally:
        torch.use_deterministic_algorithms(False)
    for made in (y, kept, *gradients):
        assert bool(torch.isfinite(made).all())


def test_strides_and_expanded_gradients() -> None:
    """A transposed x, a sliced one, a transposed weight, and the 0-stride gradient that `sum` sends."""
    tensors = layer(24, 30, 21, 5, 4)
    x = torch.randn(30, 2, 24).permute(1, 2, 0)
    weight = torch.randn(5, 6, 8).mT
    for first, w in ((x, tensors[1]), (torch.randn(2, 48, 60)[:, ::2, 3:33], weight)):
        leaves = [t.detach().requires_grad_() for t in (first, w, *tensors[2:])]
        found = torch.autograd.grad(stl.stl_linear(*leaves, out_features=21).sum(), leaves)
        doubles = [t.detach().double().requires_grad_() for t in leaves]
        reference = stl.stl_linear(*doubles, out_features=21, backend="reference")
        for name, got, expected in zip(GRADIENTS, found, torch.autograd.grad(reference.sum(), doubles), strict=True):
            assert relative(got, expected) < 1e-5, name


def test_recompute_has_the_same_gradients() -> None:
    """What recompute=True makes anew must give the gradients that the kept Ŷ gives."""
    tensors = [torch.randn(s) for s in ((2, 9, 14), (5, 4, 3), (5, 4, 4), (5, 4, 4), (10,))]
    results = []
    for recompute in (False, True):
        leaves = [t.double().requires_grad_() for t in tensors]
        y = stl.stl_linear(*leaves, out_features=10, recompute=recompute)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append((*first, *second))
    for kept, anew in zip(*results, strict=True):
        torch.testing.assert_close(anew, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_kept(dtype: torch.dtype) -> None:
    """Ŷ where the decoder learns and `recompute` is off; nothing but arguments otherwise."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    for recompute, learns, numbers in ((False, True, 5 * 6 * 3), (True, True, 0), (False, False, 0)):
        tensors = [t.to(dtype).requires_grad_() for t in layer(9, 14, 10, 5, 4)]
        tensors[3].requires_grad_(learns)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            stl.stl_linear(*tensors, out_features=10, recompute=recompute)
        own = {t.data_ptr() for t in tensors}
        assert sum(t.numel() for t in kept if t.data_ptr() not in own) == numbers


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_default_dtypes_do_not_matter(
    default: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels write float32 sums; room made for them in torch's default dtype was half as large, or read as double."""
    monkeypatch.setattr(panels, "TRAINING_BYTES", 20000)
    tensors, grad = layer(43, 40, 36, 7, 4, dtype), torch.randn(2, 43, 36).to(dtype)
    wanted = whole.composed_backward(grad.double(), *wide(tensors[:4]), None, [True] * 5)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            found = panels.backward(grad, *tensors[:4], None, [True] * 5)
            c = tiles.correlate(tensors[0], schemas.encode(tensors[0], tensors[2]), (4, 4), False)
    finally:
        torch.set_default_dtype(before)
    for name, got, gradient in zip(GRADIENTS, found, wanted, strict=True):
        assert got.dtype == dtype
        assert relative(got, gradient) < ROUNDED[dtype], name
    x = tensors[0].double()
    assert relative(c, eager.correlate(x, schemas.encode(x, tensors[2].double()), (4, 4), False)) < 2 * ROUNDED[dtype]
