"""Steps in a row, `norm_linear` and `mlp`, against the definition of each step, in value and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import strassen_tile as stl
from strassen_tile.ops import schemas
from strassen_tile.ops.fused import Norm, Weights, mlp, norm_linear

TILE, ROWS, FEATURES, HIDDEN, OUT = (3, 2, 4), 5, 7, 6, 9


def layer(features: int, out: int, rank: int) -> Weights:
    p, q, s = TILE
    shapes = ((rank, -(-features // q), -(-out // s)), (rank, p, q), (rank, p, s), (out,))
    return Weights(*(torch.randn(shape, dtype=torch.float64) for shape in shapes))


def arguments(kind: str, gated: bool) -> tuple[torch.Tensor, Norm, Weights, Weights | None, Weights]:
    x = torch.randn(2, ROWS, FEATURES, dtype=torch.float64)
    scale, shift = torch.randn(2, FEATURES, dtype=torch.float64)
    norm = {"none": Norm(), "layer": Norm("layer", scale, shift, 1e-5), "rms": Norm("rms", scale, None, 1e-6)}[kind]
    up, gate = layer(FEATURES, HIDDEN, 5), layer(FEATURES, HIDDEN, 4) if gated else None
    down = Weights(*layer(8, OUT, 6)[:3], None)  # q = 2: four tiles of it cover what two of s = 4 do
    return x, norm, up, gate, Weights(torch.randn(6, 3, 3, dtype=torch.float64), *down[1:])


def definition(x, norm, up, gate, down, activate):
    def linear(x, layer, out):
        return stl.stl_linear(x, *layer, out_features=out, backend="reference")

    x = norm(x)
    hidden = linear(x, up, HIDDEN)
    hidden = activate(hidden) if gate is None else activate(linear(x, gate, HIDDEN)) * hidden
    return linear(hidden, down, OUT)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["none", "layer", "rms"])
def test_value_and_gradients(kind: str, gated: bool) -> None:
    x, norm, up, gate, down = arguments(kind, gated)
    tensors = [t for t in (x, *norm[1:3], *up, *(gate or ()), *down) if t is not None]
    expected = definition(x, norm, up, gate, down, F.silu)
    found = mlp(x, up, down, HIDDEN, OUT, gate=gate, norm=norm, activation="silu")
    torch.testing.assert_close(found, expected)
    wanted = F.silu(stl.stl_linear(norm(x), *up, out_features=HIDDEN, backend="reference"))
    torch.testing.assert_close(norm_linear(x, norm, up, HIDDEN, "silu"), wanted)
    for t in tensors:
        t.requires_grad_()
    expected = torch.autograd.grad(definition(x, norm, up, gate, down, F.silu).square().sum(), tensors)
    # Through the function and through the operator, as a traced graph would call it.
    calls = (
        lambda: mlp(x, up, down, HIDDEN, OUT, gate=gate, norm=norm, activation="silu"),
        lambda: schemas.mlp(x, *norm, up, gate or [], down, HIDDEN, OUT, "silu"),
    )
    for call in calls:
        for one, other in zip(torch.autograd.grad(call().square().sum(), tensors), expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("other", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("learning", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_opcheck(learning: bool, other: bool) -> None:
    """Each norm gated or not; what the other case is not, the slow one is."""
    for kind, gated in (("none", not other), ("layer", other), ("rms", not other)):
        x, norm, up, gate, down = arguments(kind, gated)
        for t in (x, *norm[1:3], *up, *down):
            if t is not None:
                t.requires_grad_(learning)
        results = opcheck(schemas.mlp, (x, *norm, list(up), list(gate or ()), list(down), HIDDEN, OUT, "gelu"))
        assert set(results.values()) == {"SUCCESS"}
        results = opcheck(schemas.norm_linear, (x, *norm, *up, HIDDEN, "gelu"))
        assert set(results.values()) == {"SUCCESS"}


def test_flops_are_those_of_the_layers() -> None:
    x, norm, up, gate, down = arguments("layer", True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mlp(x, up, down, HIDDEN, OUT, gate=gate, norm=norm, activation="silu")
    sizes = ((FEATURES, HIDDEN, 5), (FEATURES, HIDDEN, 4), (HIDDEN, OUT, 6))
    assert counter.get_total_flops() == sum(
        stl.cost.linear(ROWS, k, m, TILE, rank, batch=2).flops for k, m, rank in sizes
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        norm_linear(x, norm, up, HIDDEN)
    assert counter.get_total_flops() == stl.cost.linear(ROWS, FEATURES, HIDDEN, TILE, 5, batch=2).flops


def test_under_torch_func() -> None:
    x, norm, up, gate, down = arguments("rms", True)

    def loss(x):
        return mlp(x, up, down, HIDDEN, OUT, gate=gate, norm=norm, activation="gelu").square().sum()

    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(leaf), leaf)[0])
    each = torch.func.vmap(torch.func.grad(lambda one: loss(one.unsqueeze(0))))(x)
    torch.testing.assert_close(each, torch.func.grad(loss)(x))
