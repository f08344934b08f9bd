"""STLLinearFP8 and quantize_fp8: a few per cent from the layer they take over from, and back again."""

import copy

import pytest
import torch
from torch import nn

import strassen_tile as stl
import strassen_tile.nn.mlp as mlp_module
from strassen_tile.errors import BackendError, ConfigError, ConversionError, ShapeError


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mixing", ["sequence", "none"])
@pytest.mark.parametrize("norm", [None, nn.LayerNorm(72)], ids=["plain", "normed"])
def test_close_to_the_layer(mixing: str, norm: nn.Module | None, backend: str) -> None:
    layer = stl.STLLinear(72, 40, config=stl.STLConfig(mixing=mixing), norm=norm)
    quantized, x = stl.STLLinearFP8(layer), torch.randn(2, 9, 72)
    with torch.no_grad():
        y = quantized(x)
        assert 0.003 < relative(y, layer(x)) < 0.06
        bfloat16 = copy.deepcopy(quantized).bfloat16()
        assert bfloat16.values.dtype == torch.float8_e4m3fn
        assert bfloat16.scale.dtype == torch.float32
        half = bfloat16(x.bfloat16())
        assert half.dtype == torch.bfloat16
        assert relative(half.float(), y) < 0.03
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert quantized(x).dtype == torch.bfloat16
        other = stl.STLLinearFP8(stl.STLLinear(72, 40, config=layer.config, norm=copy.deepcopy(norm)))
        other.load_state_dict(quantized.state_dict())
        assert torch.equal(other(x), y)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(quantized, fullgraph=True, backend=backend)(x), y)
    assert quantized.cost(9).product_flops == layer.cost(9).product_flops
    assert not [name for name, _ in quantized.named_parameters() if "norm" not in name]


def test_a_model_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = nn.Linear(64, 64)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)), shared, shared, nn.Linear(64, 4)
    )
    x = torch.randn(2, 9, 64)
    conversion = stl.convert(
        model, stl.STLConfig(rank=24), example_inputs=x, filter_fn=lambda _, name: name != "3", force_mixing=["*"]
    )
    model.eval()
    assert list(stl.fuse_mlps(model).fused) == ["0"]
    with torch.no_grad():
        before = model(x)
        quantized = stl.quantize_fp8(model)
        assert set(quantized.converted) == {"0.0", "0.2", "1", "2"}
        assert model[1] is model[2]
        assert "STL in fp8 64→128" in str(quantized)
        after = model(x)
        assert 0.003 < relative(after, before) < 0.2
        mask = torch.tensor([[1] * 6 + [0] * 3] * 2)
        short = model(x[:, :6])
        with conversion.padding(mask):
            torch.testing.assert_close(model(x)[:, :6], short)
        quantized.undo()
        assert torch.equal(model(x), before)
        taken, fused = [], mlp_module._fused
        monkeypatch.setattr(mlp_module, "_fused", lambda *a: taken.append(1) or fused(*a))
        assert torch.equal(model(x), before)
        assert taken, "the MLP runs as one operator again"
    with pytest.raises(BackendError, match="undo the quantisation"):
        stl.quantize_fp8(model)
        model(x.requires_grad_())


def test_what_is_refused() -> None:
    layer = stl.STLLinear(8, 8, config=stl.STLConfig(encoder_scope="tile"))
    with pytest.raises(ConfigError, match="encoder_scope='layer'"):
        stl.STLLinearFP8(layer)
    with pytest.raises(ConversionError, match="each column tile"):
        stl.quantize_fp8(nn.Sequential(layer))
    causal, hooked = stl.STLLinear(8, 8, config=stl.STLConfig(mixing="causal")), stl.STLLinear(8, 8)
    with pytest.raises(ConfigError, match="causal"):
        stl.STLLinearFP8(causal)
    hooked.register_forward_hook(lambda *_: None)
    mixed = nn.Sequential(causal, hooked, stl.STLLinear(8, 8))
    conversion = stl.quantize_fp8(mixed)
    assert set(conversion.converted) == {"2"}
    assert "later ones" in conversion.skipped["0"]
    assert "hooks" in conversion.skipped["1"]
    with pytest.raises(ConversionError, match="no STL layer"):
        stl.quantize_fp8(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ConversionError, match="itself"):
        stl.quantize_fp8(layer)
    quantized = stl.STLLinearFP8(stl.STLLinear(8, 8))
    with pytest.raises(ShapeError, match="2-D input"), torch.no_grad():
        quantized(torch.randn(4, 8))
    with pytest.raises(ShapeError, match="8 features"), torch.no_grad():
        quantized(torch.randn(1, 4, 7))
