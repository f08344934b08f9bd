"""STLMLP against the dense MLP it stands for, and against its own layers run one by one."""

import re

import pytest
import torch
from torch import nn

import strassen_tile as stl
import strassen_tile.nn.mlp as mlp_module
from strassen_tile.errors import ConfigError, ShapeError

EXACT = stl.STLConfig(rank=49, basis="strassen")
DENSE = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda y: nn.functional.gelu(y, approximate="tanh"),
    "silu": nn.functional.silu,
    "none": lambda y: y,
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", DENSE)
def test_an_exact_basis_gives_the_dense_mlp(activation: str, gated: bool, bias: bool) -> None:
    """Sizes that are no whole tiles; gate and up are told apart, and the gate is the one that is activated."""
    up, down = (nn.Linear(*size, bias=bias).double() for size in ((14, 22), (22, 10)))
    gate = nn.Linear(14, 22, bias=not bias).double()
    mlp = stl.STLMLP.from_linears(up, down, EXACT, gate=gate if gated else None, activation=activation)
    x = torch.randn(3, 7, 14, dtype=torch.float64)
    hidden = DENSE[activation](gate(x)) * up(x) if gated else DENSE[activation](up(x))
    torch.testing.assert_close(mlp(x), down(hidden))
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), down(hidden))
        assert mlp(x).dtype == torch.float64


@pytest.fixture
def fusions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one each time an MLP runs as one operator."""
    done, original = [], mlp_module._fused
    monkeypatch.setattr(mlp_module, "_fused", lambda *a: done.append(1) or original(*a))
    return done


@pytest.mark.parametrize("gated", [False, True])
def test_one_operator_is_the_layers_one_by_one(gated: bool, fusions: list[int]) -> None:
    mlp = stl.STLMLP(16, 24, 12, gated=gated, activation="silu", config=stl.STLConfig(rank=16))
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        together = mlp(x)
    assert fusions
    torch.testing.assert_close(together, mlp(x))
    assert len(fusions) == 1, "with a gradient to come the layers run one by one"
    dtype, fusions[:] = torch.bfloat16, []
    with torch.autocast("cpu", dtype=dtype):
        with torch.no_grad():
            together = mlp(x)
        assert fusions
        assert together.dtype == dtype
        torch.testing.assert_close(together, mlp(x), rtol=0.05, atol=0.05)


def test_the_layers_of_an_mlp_go_by_the_names_of_their_roles(fusions: list[int]) -> None:
    """The very layers, in the order given; gate and up are told apart by their roles, not by their order."""
    roles = stl.Roles(up="fc1", down="fc2", gate="0", activation="relu")
    config = stl.STLConfig(rank=16)
    layers = {name: stl.STLLinear(*size, config=config) for name, size in {"fc2": (24, 12), "0": (16, 24)}.items()}
    layers["fc1"] = stl.STLLinear(16, 24, config=config)
    mlp, x = stl.STLMLP.from_layers(layers, roles, norm=nn.LayerNorm(16)), torch.randn(2, 9, 16)
    assert all(getattr(mlp, name) is layer for name, layer in layers.items())
    assert [name for name, _ in mlp.named_children()] == ["norm", "fc2", "0", "fc1"]
    given = mlp.norm(x)
    expected = layers["fc2"](torch.relu(layers["0"](given)) * layers["fc1"](given))
    torch.testing.assert_close(mlp(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x), expected)
    assert len(fusions) >= 1


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("learning", [True, False])
def test_a_norm_of_the_input(kind: type[nn.Module], learning: bool) -> None:
    """As part of the layer it does what it does before it, and its parameters get the same gradients."""
    x, norm = torch.randn(3, 7, 14), kind(14)
    nn.init.normal_(norm.weight)
    with torch.random.fork_rng():
        plain = [stl.STLLinear(14, 22), stl.STLMLP(14, 22, gated=True)]
    normed = [stl.STLLinear(14, 22, norm=norm), stl.STLMLP(14, 22, gated=True, norm=norm)]
    for layer, other in zip(plain, normed, strict=True):
        other.load_state_dict({**layer.state_dict(), **{f"norm.{k}": v for k, v in norm.state_dict().items()}})
        with torch.set_grad_enabled(learning):
            found, expected = other(x), layer(norm(x))
            torch.testing.assert_close(found, expected)
            torch._dynamo.reset()
            torch.testing.assert_close(torch.compile(other, fullgraph=True, backend="aot_eager")(x), expected)
            if learning:
                got, wanted = (
                    torch.autograd.grad(y.square().sum(), list(norm.parameters())) for y in (found, expected)
                )
                for one, two in zip(got, wanted, strict=True):
                    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("later", [False, True])
def test_a_norm_of_another_class_runs_its_own_forward(later: bool) -> None:
    """A class derived from LayerNorm may do more than it, and one put there later is what it is."""

    class Twice(nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    x, norm = torch.randn(2, 7, 14), Twice(14)
    for module in (stl.STLLinear(14, 22, norm=norm), stl.STLMLP(14, 22, norm=norm)):
        if later:
            module.norm = nn.Tanh()
        given = module.norm(x)
        with torch.no_grad():
            found, module.norm = module(x), None
            torch.testing.assert_close(found, module(given))


def test_layers_side_by_side_share_one_encoder() -> None:
    parts = [nn.Linear(14, m).double() for m in (8, 9, 3)]
    layer, x = stl.STLLinear.from_linears(parts, EXACT), torch.randn(2, 7, 14, dtype=torch.float64)
    for found, part in zip(layer(x).split([8, 9, 3], dim=-1), parts, strict=True):
        torch.testing.assert_close(found, part(x))
    assert layer.encoder.shape == (49, 4, 4)


def test_it_is_a_module_like_others(tmp_path) -> None:
    mlp = stl.STLMLP(16, 24, gated=True, config=stl.STLConfig(rank=8))
    other = stl.STLMLP(16, 24, gated=True, config=stl.STLConfig(rank=8))
    other.load_state_dict(mlp.state_dict())
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        assert torch.equal(mlp(x), other(x))
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(mlp, fullgraph=True)(x), mlp(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mlp(x).dtype == torch.bfloat16
    assert {name.split(".")[0] for name, _ in mlp.named_parameters()} == {"gate", "up", "down"}


def test_layers_that_do_not_follow_each_other_are_not_run_as_one() -> None:
    """What the layers refuse one by one is refused without a gradient too."""
    narrow, apart, mixed = (stl.STLMLP(8, 7, 8, gated=True) for _ in range(3))
    narrow.down = stl.STLLinear(8, 8)  # as many tiles as 7 features fill
    apart.up, apart.gate = (stl.STLLinear(8, 7, config=stl.STLConfig(mixing="none")) for _ in range(2))
    mixed.down.double()
    for mlp, x, message in (
        (narrow, torch.randn(2, 4, 8), "must have 8 features"),
        (apart, torch.randn(4, 8), "2-D input"),
        (mixed, torch.randn(2, 4, 8), "float64"),
    ):
        for learning in (True, False):
            with torch.set_grad_enabled(learning), pytest.raises(ShapeError, match=message):
                mlp(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_eps_of_an_rms_norm_that_names_none(dtype: torch.dtype) -> None:
    """PyTorch's is that of the dtype it computes in, float32 for half precision: inputs this small tell them apart."""
    norm, x = nn.RMSNorm(16, dtype=dtype), (torch.randn(2, 8, 16) * 1e-3).to(dtype)
    for module in (
        stl.STLLinear(16, 8, norm=norm, dtype=dtype),
        stl.STLMLP(16, 8, norm=norm, dtype=dtype),
    ):
        with torch.no_grad():
            one = module(x)
        apart = module(x).detach()
        assert float((one - apart).double().norm() / apart.double().norm()) < 0.02


@pytest.mark.parametrize(
    ("roles", "names", "message"),
    [
        (stl.Roles(activation="swish"), {}, "gelu_tanh"),
        (stl.Roles(down="up"), {"down": None}, "each once"),
        (stl.Roles(), {"other": (8, 8)}, "each once; got up, down, other"),
        (stl.Roles(gate="gate"), {}, "each once"),
        (stl.Roles(up="mlp.up"), {"up": None, "mlp.up": (8, 12)}, "cannot be called 'mlp.up'"),
        (stl.Roles(up="forward"), {"up": None, "forward": (8, 12)}, "cannot be called 'forward'"),
        (stl.Roles(up="norm"), {"up": None, "norm": (8, 12)}, "cannot be called 'norm'"),
        (stl.Roles(gate="gate"), {"gate": (8, 11)}, "gate and up must be alike; got 8→11 and 8→12"),
        (stl.Roles(), {"down": (13, 8)}, "up makes 12 features, but down takes 13"),
    ],
)
def test_roles_and_layers_that_do_not_go_together(roles, names, message) -> None:
    sizes = {"up": (8, 12), "down": (12, 8), **names}
    with pytest.raises((ConfigError, ShapeError), match=re.escape(message)):
        stl.STLMLP.from_layers({name: stl.STLLinear(*size) for name, size in sizes.items() if size}, roles)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="up must be an STLLinear; got Linear: convert it first"):
        stl.STLMLP.from_layers({"up": nn.Linear(8, 8), "down": stl.STLLinear(8, 8)}, stl.Roles())
    with pytest.raises(ConfigError, match="gelu_tanh"):
        stl.STLMLP(8, 8, activation="swish")
    with pytest.raises(ShapeError, match="down takes 9"):
        stl.STLMLP.from_linears(nn.Linear(4, 8), nn.Linear(9, 4))
    with pytest.raises(ShapeError, match="alike"):
        stl.STLMLP.from_linears(nn.Linear(4, 8), nn.Linear(8, 4), gate=nn.Linear(4, 9))
    for parts in ([], [nn.Linear(4, 8), nn.Linear(5, 8)], [nn.Linear(4, 8), nn.Linear(4, 8, bias=False)]):
        with pytest.raises(ShapeError, match="one input"):
            stl.STLLinear.from_linears(parts)
    for norm in (nn.LayerNorm(7), nn.BatchNorm1d(8), nn.LayerNorm((4, 8))):
        for make in (lambda n: stl.STLMLP(8, 8, norm=n), lambda n: stl.STLLinear(8, 8, norm=n)):
            with pytest.raises(ConfigError, match="over 8 features"):
                make(norm)
    with pytest.raises(ShapeError, match="2-D input"), torch.no_grad():
        stl.STLMLP(8, 8)(torch.randn(4, 8))
    for layer in (stl.STLMLP(8, 8), stl.STLLinear(8, 8)):  # 7 features fill as many tiles as 8
        for learning in (False, True):
            with pytest.raises(ShapeError, match="must have 8 features"), torch.set_grad_enabled(learning):
                layer(torch.randn(1, 4, 7))
