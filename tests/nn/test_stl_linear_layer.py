"""If these fail, the layer is not what a PyTorch user takes it for: names, shapes, copies, devices, dtypes, compilation."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from strassen_tile import STLConfig, STLLinear, reference
from strassen_tile.errors import ShapeError

CONFIGS = {
    "default": STLConfig(tile=4, rank=6),
    "flat tile": STLConfig(tile=(2, 4, 3), rank=5),
    "per tile": STLConfig(tile=(2, 4, 3), rank=5, encoder_scope="tile"),
    "causal": STLConfig(tile=(3, 2, 4), rank=7, mixing="causal"),
    "causal per tile": STLConfig(tile=(3, 2, 4), rank=7, mixing="causal", encoder_scope="tile"),
    "rows apart": STLConfig(tile=4, rank=6, mixing="none"),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def expected_shapes(config, k, m, bias):
    (p, q, s), r = config.pqs, config.rank
    j, l = -(-k // q), -(-m // s)  # noqa: E741
    lead = (lambda n: (n,)) if config.encoder_scope == "tile" else (lambda n: ())
    shapes = {"encoder": (*lead(j), r, p, q), "encoded_weight": (r, j, l), "decoder": (*lead(l), r, p, s)}
    return {**shapes, "bias": (m,)} if bias else shapes


@every_config
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_the_contracts(config, bias):
    layer = STLLinear(9, 10, bias, config=config)
    parameters = dict(layer.named_parameters())
    assert {name: tuple(p.shape) for name, p in parameters.items()} == expected_shapes(config, 9, 10, bias)
    assert set(layer.state_dict()) == {*parameters, "meaning"}
    assert all(p.requires_grad and p.isfinite().all() for p in parameters.values())
    assert layer.bias is None or bias


def test_encoder_and_decoder_can_be_fixed():
    layer = STLLinear(8, 8, config=STLConfig(rank=6, train_encoder=False))
    assert [n for n, p in layer.named_parameters() if not p.requires_grad] == ["encoder"]
    layer = STLLinear(8, 8, config=STLConfig(rank=6, train_decoder=False))
    assert [n for n, p in layer.named_parameters() if not p.requires_grad] == ["decoder"]


@every_config
def test_repr_reconstructs_the_layer(config):
    layer = STLLinear(9, 10, False, config=config)
    again = eval(repr(layer))
    assert repr(again) == repr(layer)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 9)
    torch.testing.assert_close(again(x), layer(x), rtol=0, atol=0)


@every_config
def test_state_dict_and_deepcopy_carry_the_whole_layer(config):
    layer, x = STLLinear(9, 10, config=config), torch.randn(2, 5, 9)
    other = STLLinear(9, 10, config=config)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
    with torch.no_grad():
        twin.encoder.add_(1.0)
    assert not torch.equal(twin(x), layer(x))


@every_config
@pytest.mark.parametrize("lead", [(2,), (2, 3), (0,)], ids=str)
def test_forward_is_the_definition(config, lead):
    layer = STLLinear(9, 10, config=config, dtype=torch.float64)
    for n in (0, 1, 5, 8):
        x = torch.randn(*lead, n, 9, dtype=torch.float64)
        encoder, decoder = layer.factors()
        expected = reference.stl_linear(x, layer.encoded_weight, encoder, decoder, layer.bias, out_features=10)
        assert layer(x).shape == (*lead, n, 10)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_backend_of_the_config_is_used():
    layer = STLLinear(8, 8, config=STLConfig(rank=6, backend="reference"), dtype=torch.float64)
    auto = STLLinear(8, 8, config=STLConfig(rank=6), dtype=torch.float64)
    auto.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), auto(x), rtol=1e-12, atol=1e-12)
    assert "Linear" not in type(layer(x).grad_fn).__name__  # einsum's own graph, not the operator's


def test_meta_device_holds_no_numbers_until_it_is_given_some():
    layer = STLLinear(9, 10, config=CONFIGS["causal"], device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())
    assert layer(torch.empty(2, 5, 9, device="meta", dtype=torch.bfloat16)).shape == (2, 5, 10)
    source = STLLinear(9, 10, config=CONFIGS["causal"], dtype=torch.bfloat16)
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(2, 5, 9, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), source(x), rtol=0, atol=0)


@pytest.mark.parametrize("basis", ["random", "naive", "approximate"])
def test_device_argument_beats_the_default_device(basis):
    rank = {"random": 5, "naive": 8, "approximate": 5}[basis]
    with torch.device("meta"):
        layer = STLLinear(8, 8, config=STLConfig(tile=2, rank=rank, basis=basis), device="cpu")
        assert STLLinear(8, 8).encoder.is_meta
    assert layer(torch.randn(1, 4, 8)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_taken_and_kept(dtype):
    layer = STLLinear(8, 8, config=STLConfig(rank=6), dtype=dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(torch.randn(2, 5, 8, dtype=dtype)).dtype == dtype
    assert layer.weight.dtype == dtype


def test_there_is_no_dense_weight_to_use_by_mistake():
    layer = STLLinear(8, 8, config=STLConfig(rank=6))
    with pytest.raises(ShapeError, match="no dense weight"):
        nn.functional.linear(torch.randn(2, 5, 8), layer.weight)
    before = layer.encoded_weight.clone()
    with torch.no_grad():
        layer.weight.normal_()  # as an initialiser that knows `weight` would
    assert torch.equal(layer.encoded_weight, before)


@every_config
def test_autocast_computes_in_bfloat16(config):
    layer, x = STLLinear(9, 10, config=config), torch.randn(2, 5, 9)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    error = (y.float() - layer(x)).norm() / layer(x).norm()
    assert 1e-5 < error < 0.03  # rounded to bfloat16, and no worse
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@every_config
def test_compiles_to_one_graph_with_the_same_gradients(config):
    layer = STLLinear(9, 10, config=config, dtype=torch.float64)
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    names = [name for name, _ in layer.named_parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    found = torch.autograd.grad(compiled(x).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(compiled(x), layer(x))
    for name, a, b in zip(names, found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("k", "m"), [(0, 8), (8, 0), (0, 0), (1, 1), (3, 17)])
def test_any_size_trains(k, m):
    layer = STLLinear(k, m, config=STLConfig(tile=4, rank=6))
    y = layer(torch.randn(2, 3, k))
    assert y.shape == (2, 3, m)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_negative_sizes_and_wrong_inputs_are_refused():
    with pytest.raises(ShapeError, match="in_features=-1"):
        STLLinear(-1, 4)
    layer = STLLinear(8, 8, config=STLConfig(rank=6))
    for shape in ((2, 5, 9), (8,), ()):
        with pytest.raises(ShapeError):
            layer(torch.randn(shape))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["encoder", "encoded_weight", "decoder", "bias"])
def test_a_tensor_on_another_device_is_said(name: str, gradients: bool) -> None:
    """Else the operator's shape function answers for it, with memory that nobody has written to."""
    layer = STLLinear(16, 16)
    setattr(layer, name, torch.nn.Parameter(getattr(layer, name).to("meta")))
    with torch.set_grad_enabled(gradients), pytest.raises(ShapeError, match="meta"):
        layer(torch.ones(1, 4, 16))
    with pytest.raises(ShapeError, match="on meta"):
        STLLinear(16, 16)(torch.ones(1, 4, 16, device="meta"))


@pytest.mark.parametrize("scope", ["layer", "tile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_features_changed_after_building_are_said(scope: str, dtype: torch.dtype) -> None:
    layer = STLLinear(16, 16, bias=False, dtype=dtype, config=STLConfig(encoder_scope=scope))
    layer.out_features = 3
    with pytest.raises(ShapeError, match="out_features = 3"):
        layer(torch.randn(2, 4, 16, dtype=dtype))


@pytest.mark.parametrize("x", [torch.randn(16), torch.tensor(1.0)], ids=["1-D", "0-D"])
def test_rows_apart_still_need_rows(x: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match="at least two dimensions"):
        STLLinear(16, 16, config=STLConfig(mixing="none"))(x)


def test_another_config_on_a_layer_is_traced_whole() -> None:
    layer = STLLinear(16, 16)
    layer.config = dataclasses.replace(layer.config, recompute=True)
    x = torch.randn(2, 4, 16)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_a_layer_that_was_pickled_whole_by_an_older_version_runs() -> None:
    layer, x = STLLinear(16, 16), torch.randn(1, 4, 16)
    expected = layer(x)
    del layer._built
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
