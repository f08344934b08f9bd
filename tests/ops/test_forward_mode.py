"""Tangents: as the reference backend's, whatever runs the pass, and refused where there are none."""

import pytest
import torch
from operands import operands
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

import strassen_tile as stl
from strassen_tile.errors import BackendError
from strassen_tile.ops import schemas

NAMES = ("x", "encoded_weight", "encoder", "decoder", "bias")


def tangent(function, *pairs):
    """By dual numbers, without torch.func, and with nothing that requires a gradient."""
    with forward_ad.dual_level(), torch.no_grad():
        return forward_ad.unpack_dual(function(*(forward_ad.make_dual(*pair) for pair in pairs))).tangent


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_tile", [False, True], ids=["per layer", "per tile"])
def test_tangents_of_every_argument(dtype: torch.dtype, per_tile: bool) -> None:
    o, directions = operands("ragged", dtype, per_tile), operands("ragged", dtype, per_tile).tensors

    def run(*tensors, backend="auto"):
        return stl.stl_linear(*tensors, out_features=6, activation="gelu", backend=backend)

    doubles = [[t.double() for t in tensors] for tensors in (o.tensors, directions)]
    expected = jvp(lambda *t: run(*t, backend="reference"), *map(tuple, doubles))[1]
    loose = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    for found in (tangent(run, *zip(o.tensors, directions, strict=True)), jvp(run, o.tensors, directions)[1]):
        assert found.dtype == dtype
        assert float((found.double() - expected).norm() / expected.norm()) < loose


@pytest.mark.parametrize("argument", range(5), ids=NAMES)
def test_forward_over_reverse_and_vmap(argument: int) -> None:
    o = operands("ragged")

    def run(one):
        return stl.stl_linear(*(one if i == argument else t for i, t in enumerate(o.tensors)), out_features=6)

    def loss(one):
        return run(one).square().sum()

    at = o.tensors[argument]
    torch.testing.assert_close(jacfwd(run)(at), jacrev(run)(at))
    direction = torch.randn_like(at)
    torch.testing.assert_close(
        jvp(grad(loss), (at,), (direction,))[1], grad(lambda t: (grad(loss)(t) * direction).sum())(at)
    )
    several = torch.stack([direction, 2 * direction], dim=1)
    both = vmap(lambda d: jvp(run, (at,), (d,))[1], in_dims=1)(several)
    torch.testing.assert_close(both[1], 2 * jvp(run, (at,), (direction,))[1])


def test_a_tangent_that_arrives_in_the_backward_pass() -> None:
    o = operands("ragged", torch.float32, grad=True)
    y = stl.stl_linear(*o.tensors, out_features=6)
    cotangent, direction = torch.randn_like(y), torch.randn_like(y)
    expected = torch.autograd.grad(y, o.tensors, direction, retain_graph=True)
    with forward_ad.dual_level():
        found = torch.autograd.grad(y, o.tensors, forward_ad.make_dual(cotangent, direction))
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(forward_ad.unpack_dual(got).tangent, wanted)


@pytest.mark.parametrize(
    "make",
    [
        lambda: stl.STLLinear(8, 8),
        lambda: stl.STLLinear(8, 8, norm=nn.LayerNorm(8)),
        lambda: stl.STLMLP(8, 16, gated=True, norm=nn.RMSNorm(8)),
    ],
    ids=["linear", "norm and linear", "mlp"],
)
def test_layers_and_their_parameters(make) -> None:
    layer = make().double().requires_grad_(False)
    x, step = torch.randn(2, 5, 8, dtype=torch.float64), 1e-6
    tensors = {"x": x, **dict(layer.named_parameters())}
    for name, at in tensors.items():
        direction = torch.randn_like(at)

        def run(one, name=name):
            given = {**tensors, name: one}
            return functional_call(layer, {k: v for k, v in given.items() if k != "x"}, (given["x"],))

        found = tangent(run, (at, direction))
        difference = (run(at + step * direction) - run(at - step * direction)) / (2 * step)
        torch.testing.assert_close(found, difference, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_matmul_and_the_raw_operators() -> None:
    x, w = torch.randn(2, 5, 8), torch.randn(8, 6)
    torch.testing.assert_close(
        tangent(lambda w: stl.stl_matmul(x, w, stl.bases.strassen(2)), (w, w)), x @ w, rtol=1e-4, atol=1e-4
    )
    factor = torch.randn(7, 4, 4)
    torch.testing.assert_close(tangent(lambda x: schemas.encode(x, factor), (x, x)), schemas.encode(x, factor))


def test_fp8_has_none_and_says_so() -> None:
    layer, x = stl.STLLinearFP8(stl.STLLinear(8, 8)), torch.randn(1, 4, 8)
    with pytest.raises(BackendError, match="no tangents"):
        tangent(layer, (x, x))
    with forward_ad.dual_level(), torch.no_grad():
        assert layer(x).shape == x.shape, "nothing is refused where there is no tangent"


@pytest.mark.parametrize("argument", range(5), ids=NAMES)
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_over_nothing(argument: int, dim: int) -> None:
    o = operands("ragged")
    none = torch.stack([o.tensors[argument]], dim=dim).narrow(dim, 0, 0)

    def run(one):
        return stl.stl_linear(*(one if i == argument else t for i, t in enumerate(o.tensors)), out_features=6)

    assert vmap(run, in_dims=dim)(none).shape == (0, 2, 5, 6)
    assert vmap(grad(lambda one: run(one).sum()), in_dims=dim)(none).shape == (0, *o.tensors[argument].shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_exported_layer_can_be_trained(dtype: torch.dtype) -> None:
    layer, x = stl.STLLinear(8, 8, dtype=dtype), torch.randn(2, 5, 8, dtype=dtype)
    program = torch.export.export(layer, (x,)).module()
    program(x).square().sum().backward()
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(program.get_parameter(name).grad, parameter.grad)
