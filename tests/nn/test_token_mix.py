"""If these fail, a short convolution sees rows that it must not, or a layer with one is not what it is said to be."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import strassen_tile as st
from strassen_tile import STLConfig, STLLinear
from strassen_tile.errors import ConfigError, ConversionError, ShapeError
from strassen_tile.nn import STLMLP, PaddingMask, Roles, STLLinearFP8, TokenMix, token_mix

K, M, B, N = 6, 10, 2, 9
OFFSETS = {"causal": (-3, -2, -1, 0), "symmetric": (-2, -1, 0, 1)}
KINDS = list(OFFSETS)
CONFIG = STLConfig(mixing="none")
CUBE = {"tile": 4, "rank": 24}


def drawn(*shape, seed=4):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def oracle(x, weight, kind, documents=None):
    """One row after the other, as the formula says it."""
    y = x.clone()
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            for tap, by in enumerate(OFFSETS[kind]):
                at = n + by
                if not 0 <= at < x.shape[1]:
                    continue
                if documents is not None and documents[b, at] != documents[b, n]:
                    continue
                y[b, n] += weight[:, tap] * x[b, at]
    return y


def layer(kind, **changes):
    torch.manual_seed(0)
    made = STLLinear(K, M, config=replace(CONFIG, token_mix=kind, **changes), dtype=torch.float64)
    with torch.no_grad():
        made.token_mix.weight.copy_(drawn(K, 4))
    return made


DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 6]])


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_and_its_gradients(kind, documents):
    before, x, weight = -OFFSETS[kind][0], drawn(B, N, K), drawn(K, 4, seed=1)
    found = token_mix(x, weight, before, documents=documents)
    torch.testing.assert_close(found, oracle(x, weight, kind, documents), rtol=1e-13, atol=1e-13)
    many = token_mix(torch.stack([x, 2 * x]), weight, before)
    torch.testing.assert_close(many[1], 2 * oracle(x, weight, kind), rtol=1e-13, atol=1e-13)
    inputs = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: token_mix(x, weight, before, documents=documents), inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [{}, {"mixing": "sequence", **CUBE}, {"mixing": "causal", **CUBE}])
def test_a_layer_mixes_ahead_of_its_product(kind, tile):
    made, x = layer(kind, **tile), drawn(B, N, K)
    plain = STLLinear(K, M, config=replace(made.config, token_mix="none"), dtype=torch.float64)
    plain.load_state_dict(
        {n: t for n, t in made.state_dict().items() if "token_mix" not in n and n != "meaning"}, strict=False
    )
    torch.testing.assert_close(made(x), plain(oracle(x, made.token_mix.weight.detach(), kind)), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        made.token_mix.weight.zero_()
    assert torch.equal(made(x), plain(x))


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_none_and_draws_nothing(kind):
    torch.manual_seed(3)
    plain = STLLinear(K, M, config=CONFIG)
    torch.manual_seed(3)
    made = STLLinear(K, M, config=replace(CONFIG, token_mix=kind))
    assert torch.equal(made.encoded_weight, plain.encoded_weight)
    assert not made.token_mix.weight.any()
    x = torch.randn(B, N, K)
    assert torch.equal(made(x), plain(x))
    made(x).square().mean().backward()
    assert made.token_mix.weight.grad.any()
    with torch.no_grad():
        made.token_mix.weight.fill_(1.0)
    made.reset_parameters()
    assert not made.token_mix.weight.any()


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_rows_are_not_seen(kind, left):
    made = layer(kind)
    made.padding = mask = PaddingMask(tiles=False)
    real = torch.arange(N) < torch.tensor([[N], [5]])
    real = real.flip(1) if left else real
    x = drawn(B, N, K)
    junk = torch.where(real[..., None], x, 1e3)
    with mask(real):
        found, other = made(x), made(junk)
    assert torch.equal(found[real], other[real])
    alone = made(x[1:, real[1]])[0]
    torch.testing.assert_close(found[1][real[1]], alone, rtol=1e-12, atol=1e-12)
    if kind == "symmetric" or left:
        assert not torch.allclose(made(junk)[real], found[real])  # without the mask it is seen


def test_tiles_go_on_wanting_their_padding_on_the_right():
    made = layer("causal", mixing="sequence", **CUBE)
    made.padding = mask = PaddingMask()
    real = (torch.arange(N) >= 3).expand(B, N)
    with pytest.raises(ShapeError, match="pad on the right"), mask(real):
        made(drawn(B, N, K))
    right, x = torch.arange(N) < torch.tensor([[N], [5]]), drawn(B, N, K)
    with mask(right):
        a, b = made(x), made(torch.where(right[..., None], x, 1e3))
    assert torch.equal(a[right], b[right])


def test_a_symmetric_mix_is_not_told_of_its_rows_by_a_causal_mask():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer("symmetric")

        def forward(self, x, attention_mask=None):
            return self.layer(x)

    model, causal = Attends(), torch.ones(B, 1, N, N).tril().bool()
    model.layer.padding = PaddingMask(tiles=False)
    model.layer.padding.attach(model)
    with pytest.raises(ShapeError, match="does not say which rows are padding"):
        model(drawn(B, N, K), attention_mask=causal)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(K, K, dtype=torch.float64), nn.Linear(K, K, dtype=torch.float64)

    def forward(self, x, position_ids=None, seq_idx=None, cu_seq_lens=None, input_ids=None):
        x = self.second(torch.tanh(self.first(x)))
        return x + x.cumsum(1)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_in_one_row_stay_apart(kind):
    class Both(Packed):
        def forward(self, x, **more):
            y = super().forward(x)
            return y + y.mean(dim=1, keepdim=True)

    model = Both() if kind == "symmetric" else Packed()
    done = st.convert(
        model, replace(CONFIG, token_mix=kind), example_inputs=drawn(2, 12, K), filter_fn=lambda m, n: True
    )
    assert len(done.converted) == 2
    for made in done.converted.values():
        made.token_mix.weight.data.normal_()
    x = drawn(1, 11, K)
    seen = {}
    model.second.register_forward_hook(lambda m, args, y: seen.update(y=y))
    model(x[:, :4])
    first = seen["y"]
    model(x[:, 4:])
    apart = torch.cat([first, seen["y"]], dim=1)
    ways = [
        {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]])},
        {"seq_idx": torch.tensor([[0] * 4 + [1] * 7])},
        {"cu_seq_lens": torch.tensor([0, 4, 11]), "input_ids": torch.zeros(1, 11, dtype=torch.long)},
    ]
    for way in ways if kind == "causal" else ():
        model(x, **way)
        torch.testing.assert_close(seen["y"], apart, rtol=1e-12, atol=1e-12)
    model(x)
    assert not torch.allclose(seen["y"], apart)
    if kind == "causal":
        with pytest.raises(ShapeError, match="where documents end"):
            model(x, position_ids=torch.tensor([[0, 1, 0, 1]]))
        for counting in (
            [[3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]],
            [[0] * 11],
            [[0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]],
        ):
            model(x, position_ids=torch.tensor(counting))  # one document
            assert not torch.allclose(seen["y"], apart)


def test_what_is_refused():
    with pytest.raises(ConfigError, match="token_mix must be one of none, causal, symmetric; got 'both'"):
        STLConfig(token_mix="both")
    with pytest.raises(ConfigError, match="kind must be one of causal, symmetric; got 'none'"):
        TokenMix(4, "none")
    with pytest.raises(ShapeError, match=r"token_mix='causal'.*mixes neighbouring rows: samples would leak"):
        layer("causal")(drawn(N, K))
    with pytest.raises(ShapeError, match="which a token mix would mix"):
        token_mix(drawn(N, K), drawn(K, 4), 3)
    made = layer("causal")
    assert made(drawn(0, N, K)).shape == (0, N, M)
    assert made(drawn(B, 0, K)).shape == (B, 0, M)
    assert made(drawn(2, 3, N, K)).shape == (2, 3, N, M)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ConversionError, match=r"would mix neighbouring rows.*pass example_inputs"):
        st.convert(model, STLConfig(mixing="none", token_mix="causal"))


@pytest.mark.parametrize("kind", KINDS)
def test_configs_and_states_say_which_mix_there_is(kind, tmp_path):
    made = layer(kind)
    assert STLConfig.from_json(made.config.to_json()) == made.config
    assert made.config.mixes_rows
    assert not made.config.mixes_in_tiles
    assert made.config.sees_later_rows == (kind == "symmetric")
    other = layer("symmetric" if kind == "causal" else "causal")
    with pytest.raises(RuntimeError, match=f"token_mix='{kind}'"):
        other.load_state_dict(made.state_dict())
    plain = STLLinear(K, M, config=CONFIG, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="numbers are those of another layer"):
        plain.load_state_dict(made.state_dict())
    again = layer(kind)
    again.load_state_dict(made.state_dict())
    x = drawn(B, N, K)
    assert torch.equal(again(x), made(x))


def test_models_are_saved_and_loaded(tmp_path):
    model, config = Packed(), replace(CONFIG, token_mix="causal")
    done = st.convert(model, config, example_inputs=drawn(2, 12, K), filter_fn=lambda m, n: True)
    for made in done.converted.values():
        made.token_mix.weight.data.normal_()
    st.save_model(model, tmp_path / "saved")
    loaded = Packed()
    done = st.load_model(loaded, tmp_path / "saved")
    x = drawn(1, 7, K)
    assert torch.equal(loaded(x), model(x))
    assert (done.padding.tiles, done.padding.ahead) == (False, False)
    assert "token_mix='causal'" in str(done)


def test_cost_is_the_counters_count():
    made = layer("causal")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(drawn(3, N, K))
    found, plain = made.cost(N, 3), STLLinear(K, M, config=CONFIG).cost(N, 3)
    assert found.flops == counter.get_total_flops()
    assert found.flops - plain.flops == 2 * 3 * N * K * 4
    assert found.params == sum(p.numel() for n, p in made.named_parameters() if n != "bias")
    assert (found.dense_flops, found.product_flops) == (plain.dense_flops, plain.product_flops)


def test_fused_mlps_and_fp8_mix_too():
    torch.manual_seed(0)
    config = STLConfig(mixing="none", token_mix="causal")
    layers = {"up": STLLinear(8, 16, config=config), "down": STLLinear(16, 8, config=config)}
    for one in layers.values():
        one.token_mix.weight.data.normal_()
    mlp, x = STLMLP.from_layers(layers, Roles(up="up", down="down", activation="gelu")), torch.randn(2, 9, 8)
    expected = layers["down"](nn.functional.gelu(layers["up"](x)))
    with torch.no_grad():
        torch.testing.assert_close(mlp.eval()(x), expected, rtol=1e-5, atol=1e-6)
        rounded = STLLinearFP8(copy.deepcopy(layers["up"]))(x)
    exact = layers["up"](x)
    error = float((rounded - exact).detach().norm() / exact.detach().norm())
    assert 0 < error < 0.1
    assert not torch.allclose(exact, STLLinear(8, 16, config=CONFIG)(x), atol=0.1)


class Windows(nn.Module):
    """Rows see later ones, or earlier ones alone, as `causal` says it."""

    def __init__(self, causal):
        super().__init__()
        self.causal = causal

    def forward(self, x):
        return x + (x.cumsum(dim=1) if self.causal else x.mean(dim=1, keepdim=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_the_model_lets_be_seen_is_mixed(kind, causal):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), Windows(causal)), torch.randn(3, 9, 8)
    config = STLConfig(mixing="none", token_mix=kind)
    if causal and kind == "symmetric":
        with pytest.raises(ConversionError, match="mixing its rows would make output"):
            st.convert(model, config, example_inputs=x)
        done = st.convert(model, config, example_inputs=x, force_mixing=["*"])
    else:
        done = st.convert(model, config, example_inputs=x)
    assert len(done.converted) == 2
    for made in done.converted.values():
        made.token_mix.weight.data.normal_()
    assert bool(st.check_mixing(model, x)) == (not causal or kind == "causal")
    done.undo()
    batch = nn.Sequential(nn.Linear(8, 8), nn.Flatten(0, 1))
    with pytest.raises(ConversionError, match=r"see|several samples|nothing in the model"):
        st.convert(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), batch[0]), config, example_inputs=x)


def test_checkpointed_layers_see_the_documents_and_the_padding_of_their_call():
    def gradients(checkpointed):
        model = Packed()
        st.convert(
            model, replace(CONFIG, token_mix="causal"), example_inputs=drawn(2, 12, K), filter_fn=lambda m, n: True
        )
        for seed, one in enumerate((model.first, model.second)):
            one.token_mix.weight.data.copy_(drawn(K, 4, seed=seed))
        if checkpointed:
            forward, inner = model.second.forward, model.second
            inner.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
        x = drawn(1, 11, K).requires_grad_()
        ways = ({"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]])}, {})
        losses = [model.train()(x, **way).square().sum() for way in ways]  # both are run before either's backward pass
        return [torch.autograd.grad(loss, x)[0] for loss in losses]

    expected, found = gradients(False), gradients(True)
    assert not torch.allclose(*expected)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_compiled_graphs_keep_documents_apart_and_padding_out():
    torch._dynamo.reset()
    model = Packed()
    st.convert(model, replace(CONFIG, token_mix="causal"), example_inputs=drawn(2, 12, K), filter_fn=lambda m, n: True)
    for seed, one in enumerate((model.first, model.second)):
        one.token_mix.weight.data.copy_(drawn(K, 4, seed=seed))
    x, compiled = drawn(1, 11, K), torch.compile(model, backend="aot_eager")
    for positions in ([0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6], list(range(11)), [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]):
        way = {"position_ids": torch.tensor([positions])}
        torch.testing.assert_close(compiled(x, **way), model(x, **way), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
