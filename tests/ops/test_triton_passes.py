"""What a CUDA device would run, composed of the kernels: here on CPU tensors, by Triton's interpreter, against float64."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs under TRITON_INTERPRET=1", allow_module_level=True)

from strassen_tile.ops import composed, cuda, generic, mlp
from strassen_tile.ops.mlp import Weights
from strassen_tile.ops.triton import launch


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("n,k,m", [(5, 30, 21), (8, 64, 64), (1, 4, 4)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(n: int, k: int, m: int, biased: bool) -> None:
    shapes = ((2, n, k), (7, -(-k // 4), -(-m // 4)), (7, 4, 4), (7, 4, 4), (m,))
    tensors = [torch.randn(shape) for shape in shapes]
    tensors[4] = tensors[4] if biased else None
    wide = [None if t is None else t.double() for t in tensors]
    y, kept = cuda.linear_forward(*tensors, m)
    assert relative(y, composed.linear(*wide, m)) < 2e-6
    assert torch.equal(y, cuda.linear(*tensors, m, "none"))
    for activation in ("gelu", "silu"):
        assert relative(cuda.linear(*tensors, m, activation), composed.linear(*wide, m, activation)) < 2e-6
    gradients = composed.linear_backward(torch.randn_like(y), *tensors[:4], kept, [True] * 5)
    again = composed.linear_backward(torch.ones_like(y), *tensors[:4], None, [True] * 5)
    kept_gradients = composed.linear_backward(torch.ones_like(y), *tensors[:4], kept, [True] * 5)
    for one, other in zip(again, kept_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert [g.shape for g in gradients[:4]] == [t.shape for t in tensors[:4]]


def weights(k: int, m: int, r: int, tile: tuple[int, int, int] = (4, 4, 4), biased: bool = True) -> Weights:
    p, q, s = tile
    shapes = ((r, -(-k // q), -(-m // s)), (r, p, q), (r, p, s), (m,))
    tensors = [torch.randn(shape) for shape in shapes]
    return Weights(*tensors[:3], tensors[3] + 2 if biased else None)


def wide(layer: Weights) -> Weights:
    return Weights(*(None if t is None else t.double() for t in layer))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", composed.ACTIVATIONS)
@pytest.mark.parametrize("hidden,biased", [(24, True), (22, False)])
def test_mlp(activation: str, gated: bool, hidden: int, biased: bool) -> None:
    """Ragged rows, ragged hidden features (gated ones then pass by pass), ranks that differ."""
    x = torch.randn(2, 7, 30)
    up, down = weights(30, hidden * (2 if gated else 1), 7, biased=biased), weights(hidden, 21, 5, biased=biased)
    expected = mlp.two_passes(x.double(), *wide(up), *wide(down), hidden, 21, activation, gated)
    for found in (
        cuda.mlp(x, *up, *down, hidden, 21, activation, gated),
        mlp.mlp(x, up, down, hidden, 21, activation=activation, gated=gated),
    ):
        assert relative(found, expected) < 3e-6


def test_mlp_of_different_tiles_goes_pass_by_pass() -> None:
    x, up, down = torch.randn(2, 7, 30), weights(30, 24, 7), weights(24, 21, 5, (4, 2, 4))
    expected = mlp.two_passes(x.double(), *wide(up), *wide(down), 24, 21, "relu", False)
    assert relative(cuda.mlp(x, *up, *down, 24, 21, "relu", False), expected) < 3e-6


def test_what_the_kernels_do_not_take_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64, a rank beyond registers, an encoder a column tile, and no triton at all."""
    x = torch.randn(2, 9, 14)
    for wide in (torch.randn(200, 4, 4), torch.randn(4, 3, 4, 4)):
        assert torch.equal(cuda.encode(x, wide), generic.encode(x, wide))
        assert not launch.supports(x, wide.shape)
    e = torch.randn(3, 4, 4)
    assert torch.equal(cuda.encode(x.double(), e.double()), generic.encode(x.double(), e.double()))
    monkeypatch.setattr(cuda, "launcher", lambda: None)
    assert torch.equal(cuda.encode(x, e), generic.encode(x, e))
    z = torch.randn(3, 6, 4)
    assert torch.equal(cuda.decode(z, e, 2, 9, 14), generic.decode(z, e, 2, 9, 14))
    assert torch.equal(cuda.correlate(x, z, (4, 4), False), generic.correlate(x, z, (4, 4), False))
