"""Gradients of every argument, first and second order, against finite differences and against the definition."""

import pytest
import torch
from operands import SHAPES, operands
from torch.autograd import gradcheck, gradgradcheck

import strassen_tile as stl
from strassen_tile.ops import gradients, schemas

NAMES = ("x", "encoded_weight", "encoder", "decoder", "bias")
SMALL = ["ragged", "below a tile", "rows apart", "two leading"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("per_tile", [False, True], ids=["per layer", "per tile"])
@pytest.mark.parametrize("shape", SMALL)
def test_gradcheck(shape: str, per_tile: bool, dtype: torch.dtype) -> None:
    o = operands(shape, dtype, per_tile, grad=True)
    assert gradcheck(lambda *t: stl.stl_linear(*t, out_features=o.out_features), o.tensors, fast_mode=True)


@pytest.mark.parametrize("per_tile", [False, True], ids=["per layer", "per tile"])
@pytest.mark.parametrize("shape", SMALL[:2])
def test_gradgradcheck(shape: str, per_tile: bool) -> None:
    o = operands(shape, per_tile=per_tile, grad=True)
    assert gradgradcheck(lambda *t: stl.stl_linear(*t, out_features=o.out_features), o.tensors, fast_mode=True)


@pytest.mark.parametrize("per_tile", [False, True], ids=["per layer", "per tile"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_definition(shape: str, per_tile: bool) -> None:
    o = operands(shape, per_tile=per_tile, grad=True)
    y = stl.stl_linear(*o.tensors, out_features=o.out_features)
    cotangent = torch.randn_like(y)
    found = torch.autograd.grad(y, o.tensors, cotangent)
    reference = stl.stl_linear(*o.tensors, out_features=o.out_features, backend="reference")
    wanted = torch.autograd.grad(reference, o.tensors, cotangent, materialize_grads=True)
    for name, got, expected in zip(NAMES, found, wanted, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"grad of {name}: {m}"
        )


@pytest.mark.parametrize("argument", range(4), ids=NAMES[:4])
def test_only_what_is_asked_is_computed(argument: int) -> None:
    """A frozen encoder must not cost its gradient: no `correlate` unless a factor needs one."""
    o = operands("whole")
    o.tensors[argument].requires_grad_(True)
    calls = []
    original = schemas.correlate

    def counted(*args):
        calls.append(args)
        return original(*args)

    schemas.correlate = counted
    try:
        stl.stl_linear(*o.tensors).sum().backward()
    finally:
        schemas.correlate = original
    assert len(calls) == (1 if NAMES[argument] in ("encoder", "decoder") else 0)
    assert [t.grad is not None for t in o.tensors] == [i == argument for i in range(5)]


def test_the_raw_operators_are_differentiable() -> None:
    """torch.ops.strassen_tile.encode called directly must not return a tensor that silently has no gradient."""
    x, encoder = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(3, 3, 2, dtype=torch.float64)
    decoder = torch.randn(3, 3, 4, dtype=torch.float64)
    encoded = torch.randn(3, 4, 4, dtype=torch.float64)
    for t in (x, encoder, decoder, encoded):
        t.requires_grad_(True)
    assert gradcheck(schemas.encode, (x, encoder))
    assert gradcheck(lambda e, d: schemas.decode(e, d, 2, 5, 13), (encoded, decoder))
    assert gradcheck(lambda x, e: schemas.correlate(x, e, [3, 2], False), (x, encoded))
    assert gradcheck(lambda x, e: schemas.correlate(x, e, [3, 2], True), (x, encoded))


def test_encode_and_decode_are_adjoint() -> None:
    """⟨encode(x, E), z⟩ = ⟨x, decode(z, E)⟩, on which every backward here rests."""
    x, encoder = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(3, 3, 2, dtype=torch.float64)
    z = torch.randn(3, 4, 4, dtype=torch.float64)
    left = (gradients.encode(x, encoder) * z).sum()
    right = (x * gradients.decode(z, encoder, 2, 5, 7)).sum()
    torch.testing.assert_close(left, right)


def test_gradients_of_an_exact_product_are_those_of_matmul() -> None:
    x = torch.randn(3, 9, 13, dtype=torch.float64, requires_grad=True)
    w = torch.randn(13, 11, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(3, 9, 11, dtype=torch.float64)
    found = torch.autograd.grad(stl.stl_matmul(x, w, stl.bases.strassen(2)), (x, w), cotangent)
    wanted = torch.autograd.grad(x @ w, (x, w), cotangent)
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
