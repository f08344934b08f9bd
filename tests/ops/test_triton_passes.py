"""What a CUDA device would run, composed of the kernels: here on CPU tensors, by Triton's interpreter, against float64."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs under TRITON_INTERPRET=1", allow_module_level=True)

from strassen_tile.ops import eager, fused
from strassen_tile.ops import linear as whole
from strassen_tile.ops.cuda import launch, passes
from strassen_tile.ops.fused import Norm, Weights


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
    y, kept = passes.forward_keeping(*tensors, m)
    assert relative(y, whole.composed(*wide, m)) < 2e-6
    assert torch.equal(y, passes.forward(*tensors, m, "none"))
    for activation in ("gelu", "silu"):
        assert relative(passes.forward(*tensors, m, activation), whole.composed(*wide, m, activation)) < 2e-6
    gradients = whole.composed_backward(torch.randn_like(y), *tensors[:4], kept, [True] * 5)
    again = whole.composed_backward(torch.ones_like(y), *tensors[:4], None, [True] * 5)
    kept_gradients = whole.composed_backward(torch.ones_like(y), *tensors[:4], kept, [True] * 5)
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


NORMS = {
    "none": Norm(),
    "layer": Norm("layer", torch.linspace(1, 2, 30), torch.linspace(2, 3, 30), 1e-5),
    "layer without affine": Norm("layer", None, None, 1e-5),
    "rms": Norm("rms", torch.linspace(1, 2, 30), None, 1e-6),
}


def wide_norm(norm: Norm) -> Norm:
    scale, shift = (None if t is None else t.double() for t in norm[1:3])
    return Norm(norm.kind, scale, shift, norm.eps)


def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are launched from now on."""
    taken: list[str] = []
    for name in ("encode", "norm_encode", "decode_act_encode", "decode"):
        original = getattr(launch, name)

        def step(*arguments, _name=name, _original=original, **options):
            taken.append(_name)
            return _original(*arguments, **options)

        monkeypatch.setattr(launch, name, step)
    return taken


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", whole.ACTIVATIONS)
@pytest.mark.parametrize("hidden,biased", [(24, True), (22, False)])
def test_mlp(activation: str, gated: bool, hidden: int, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged rows, ragged hidden features, ranks that differ: three kernels, whether gated or not."""
    x, up, down = torch.randn(2, 7, 30), weights(30, hidden, 7, biased=biased), weights(hidden, 21, 5, biased=biased)
    gate = weights(30, hidden, 9, biased=not biased) if gated else ()
    tensors = wide(up), wide(gate) if gated else (), wide(down)
    expected = fused.composed_mlp(x.double(), *Norm(), *tensors, hidden, 21, activation)
    found = fused.mlp(x, up, down, hidden, 21, gate=gate or None, activation=activation)
    assert relative(found, expected) < 3e-6
    taken = steps_taken(monkeypatch)
    assert relative(passes.mlp(x, *Norm(), up, gate, down, hidden, 21, activation), expected) < 3e-6
    assert taken == ["encode", "decode_act_encode", "decode"]


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_before(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies below the last of seven rows is zero after the norm too, not its shift."""
    norm, x = NORMS[kind], torch.randn(2, 7, 30) + 1
    up, gate, down = weights(30, 24, 7), weights(30, 24, 7), weights(24, 21, 5)
    taken = steps_taken(monkeypatch)
    if kind != "none":
        expected = fused.composed_norm_linear(x.double(), *wide_norm(norm), *wide(up), 24, "silu")
        assert relative(passes.norm_linear(x, *norm, *up, 24, "silu"), expected) < 3e-6
        assert relative(fused.norm_linear(x, norm, up, 24, "silu"), expected) < 3e-6
        assert taken == ["norm_encode", "decode"]
    for gates in ((), gate):
        tensors = wide(up), wide(gates) if gates else (), wide(down)
        expected = fused.composed_mlp(x.double(), *wide_norm(norm), *tensors, 24, 21, "gelu")
        taken.clear()
        assert relative(passes.mlp(x, *norm, up, gates, down, 24, 21, "gelu"), expected) < 3e-6
        assert taken == ["encode" if kind == "none" else "norm_encode", "decode_act_encode", "decode"]


def test_what_does_not_fit_one_grid_goes_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that differ between the layers, and ranks of gate and up too many for one encode together."""
    x, taken = torch.randn(2, 7, 30), steps_taken(monkeypatch)
    for up, gate, down in (
        (weights(30, 24, 7), (), weights(24, 21, 5, (4, 2, 4))),
        (weights(30, 24, 70), weights(30, 24, 70), weights(24, 21, 5)),
        (weights(30, 24, 7, (2, 4, 4)), weights(30, 24, 7), weights(24, 21, 5)),
    ):
        tensors = wide(up), wide(gate) if gate else (), wide(down)
        expected = fused.composed_mlp(x.double(), *Norm(), *tensors, 24, 21, "relu")
        assert relative(passes.mlp(x, *Norm(), up, gate, down, 24, 21, "relu"), expected) < 3e-6
        assert "decode_act_encode" not in taken


def test_a_norm_before_tiles_that_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused norm reads whole rows; tiles of 3×2 are encoded from the norm's own result."""
    x, up, taken = torch.randn(2, 7, 30), weights(30, 24, 7, (3, 2, 2)), steps_taken(monkeypatch)
    expected = fused.composed_norm_linear(x.double(), *wide_norm(NORMS["layer"]), *wide(up), 24, "none")
    assert relative(passes.norm_linear(x, *NORMS["layer"], *up, 24, "none"), expected) < 3e-6
    assert taken == ["encode", "decode"]


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["encoders", "decoders", "both"])
def test_factors_one_a_tile(which: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer and a norm before it run in the kernels of `encode` and `decode`; an MLP is composed."""
    x, taken, layer = torch.randn(2, 7, 30), steps_taken(monkeypatch), list(weights(30, 30, 6))
    for factor in which:
        layer[1 + factor] = torch.randn(8, 6, 4, 4)
    expected = whole.composed(x.double(), *wide(Weights(*layer)), 30, "gelu")
    assert relative(passes.forward(x, *layer, 30, "gelu"), expected) < 2e-6
    assert taken == ["encode", "decode"]
    taken.clear()
    expected = fused.composed_norm_linear(x.double(), *wide_norm(NORMS["layer"]), *wide(Weights(*layer)), 30, "none")
    assert relative(passes.norm_linear(x, *NORMS["layer"], *layer, 30, "none"), expected) < 3e-6
    assert taken == ["encode" if 0 in which else "norm_encode", "decode"]
    taken.clear()
    expected = fused.composed_mlp(x.double(), *Norm(), wide(Weights(*layer)), [], wide(Weights(*layer)), 30, 30, "relu")
    assert relative(passes.mlp(x, *Norm(), layer, [], layer, 30, 30, "relu"), expected) < 3e-6
    assert "decode_act_encode" not in taken


def test_what_the_kernels_do_not_take_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64, a rank beyond registers, and no triton at all."""
    x, wide = torch.randn(2, 9, 14), torch.randn(200, 4, 4)
    assert torch.equal(passes.encode(x, wide), eager.encode(x, wide))
    assert not launch.supports(x, wide.shape)
    e = torch.randn(3, 4, 4)
    assert torch.equal(passes.encode(x.double(), e.double()), eager.encode(x.double(), e.double()))
    monkeypatch.setattr(passes, "launcher", lambda: None)
    assert torch.equal(passes.encode(x, e), eager.encode(x, e))
    z = torch.randn(3, 6, 4)
    assert torch.equal(passes.decode(z, e, 2, 9, 14), eager.decode(z, e, 2, 9, 14))
    assert torch.equal(passes.correlate(x, z, (4, 4), False), eager.correlate(x, z, (4, 4), False))
