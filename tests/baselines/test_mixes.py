"""If these fail, a comparison of methods with mixing mixes other rows than it says, or lets a model see what it must not."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from strassen_tile import STLConfig, baselines, check_mixing, models
from strassen_tile.baselines import MIXES, LowRankLinear, MixedLinear, Sparse24Linear, mixed
from strassen_tile.errors import ConfigError, ConversionError, ShapeError
from strassen_tile.nn import STLLinear

K, M = 6, 10
SIZES = [("tile", 9), ("tile", 10), ("tile", 1), ("symmetric", 7), ("symmetric", 1), ("symmetric", 2), ("causal", 7),
         ("causal", 1), ("causal", 2), ("grid", 9), ("grid", 10), ("grid", 1), ("grid", 2), ("grid", 4)]  # fmt: skip
SEEN = {"causal": (-3, -2, -1, 0), "symmetric": (-2, -1, 0, 1)}


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def layer(kind, **options):
    made = MixedLinear(nn.Linear(K, M, dtype=torch.float64), kind, **options)
    with torch.no_grad():
        weights(made).copy_(drawn(*weights(made).shape))
    return made


def weights(made):
    return made.mix.weight if made.kind in SEEN else made.mix


def neighbours(kind, n, p=4):
    """(row, row that it sees, index of the weight), one by one."""
    side = {1: 1, 2: 1, 4: 2, 9: 3, 10: 3}.get(n, 0)  # of the grid; what is over is the class token
    first = n - side * side
    for a in range(n):
        if kind == "tile":
            yield from ((a, b, (a % p, b % p)) for b in range(n) if a // p == b // p)
        elif kind in SEEN:
            yield from ((a, a + t, (tap,)) for tap, t in enumerate(SEEN[kind]) if 0 <= a + t < n)
        elif a >= first:
            row, column = divmod(a - first, side)
            for u in (-1, 0, 1):
                for v in (-1, 0, 1):
                    if 0 <= row + u < side and 0 <= column + v < side:
                        yield a, first + (row + u) * side + column + v, (0, u + 1, v + 1)


@pytest.mark.parametrize(("kind", "n"), SIZES)
def test_a_mix_is_its_formula(kind, n):
    made, x = layer(kind), drawn(2, 3, n, K)
    expected = x.clone()
    for row, other, index in neighbours(kind, n):
        expected[..., row, :] += weights(made).detach()[(slice(None), *index)] * x[..., other, :]
    torch.testing.assert_close(made(x), made.linear(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made(x[0, :1]), made.linear(expected[0, :1]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "n"), [("tile", 7), ("symmetric", 5), ("causal", 5), ("grid", 5)])
def test_gradients(kind, n):
    made = layer(kind)

    def call(x, mix):
        return torch.func.functional_call(made, {"mix.weight" if kind in SEEN else "mix": mix}, (x,))

    inputs = drawn(1, n, K).requires_grad_(), weights(made).detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MIXES)
def test_lower_precision_differs_by_rounding(kind, dtype):
    made, x = layer(kind), drawn(2, 16, K)
    exact = made(x).detach()
    found = made.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    error = float((found.detach().double() - exact).norm() / exact.norm())
    assert 0 < error < 4 * torch.finfo(dtype).eps


def test_rows_of_no_grid_are_refused():
    for n in (3, 6, 7, 12):
        with pytest.raises(ShapeError, match=f"square grid.*N={n}"):
            layer("grid")(drawn(1, n, K))
    for kind in MIXES:
        with pytest.raises(ShapeError, match="batch of rows"):
            layer(kind)(drawn(4, K))
        assert layer(kind)(drawn(0, 4, K)).shape == (0, 4, M)
    with pytest.raises(ConfigError, match="kind must be one of causal, symmetric, tile, grid; got 'ring'"):
        mixed(baselines.dense(), "ring")
    with pytest.raises(ConfigError, match="rows_mixed"):
        mixed(baselines.dense(), "tile", 0)


@pytest.mark.parametrize(("kind", "n"), [*SIZES, ("grid", 17)])
def test_cost_is_the_counters_count(kind, n):
    made = layer(kind)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(drawn(3, n, K))
    found = made.cost(n, 3)
    assert found.flops == counter.get_total_flops()
    assert found.dense_flops == found.product_flops == 2 * 3 * n * K * M
    assert found.params == sum(p.numel() for p in made.parameters()) - M
    assert (found.dense_params, found.bytes - found.dense_bytes) == (K * M, 8 * (6 * n * K + weights(made).numel()))


def test_states_are_those_of_the_layer_and_its_mix():
    """What was saved by versions whose dense layers alone could mix goes on loading."""
    made = layer("tile")
    assert [(name, tuple(p.shape)) for name, p in made.named_parameters()] == [
        ("mix", (K, 4, 4)), ("linear.weight", (M, K)), ("linear.bias", (M,))
    ]  # fmt: skip


class Cumulative(nn.Module):
    """Lets rows see earlier rows, or all."""

    def __init__(self, causal):
        super().__init__()
        self.causal = causal

    def forward(self, x):
        return x + (x.cumsum(dim=1) if self.causal else x.mean(dim=1, keepdim=True))


def network(causal=False, hidden=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, hidden), nn.ReLU(), nn.Linear(hidden, 8), Cumulative(causal)).eval()


EXAMPLES = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [kind for kind in MIXES if kind != "causal"])
def test_a_causal_model_is_refused(kind):
    method, model = mixed(baselines.stl(STLConfig(rank=6, mixing="none")), kind), network(causal=True)
    layers = list(model)
    with pytest.raises(ConversionError, match="mixing its rows would make output"):
        method.apply(model, EXAMPLES, None)
    assert list(model) == layers
    method.apply(network(), EXAMPLES, None)


def test_a_causal_mix_is_for_causal_models():
    model = network(causal=True)
    done = mixed(baselines.low_rank(0.5), "causal").apply(model, EXAMPLES, None)
    assert list(done.converted) == ["0", "2"]
    with torch.no_grad():
        for made in done.converted.values():
            made.mix.weight.normal_()
        before, changed = model(EXAMPLES), EXAMPLES.clone()
        changed[:, 5] += 1
        after = model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).any()
    assert check_mixing(model, EXAMPLES)
    done.converted["2"].mix.kind = "symmetric"  # a planted fault
    assert not check_mixing(model, EXAMPLES)


def test_rows_that_meet_within_tiles_alone_may_not_be_convolved():
    class Fours(nn.Module):
        def forward(self, x):
            return x + x.unflatten(1, (-1, 4)).mean(dim=2, keepdim=True).expand(-1, -1, 4, -1).flatten(1, 2)

    def model():
        return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), Fours())

    x = EXAMPLES[:, :8]
    mixed(baselines.dense(), "tile", 4).apply(model(), x, None)
    stl = baselines.stl(STLConfig(tile=(4, 4, 4), rank=24))
    mixed(stl, "tile", 2).apply(model(), x, None)
    for refused in (mixed(baselines.dense(), "symmetric"), mixed(baselines.dense(), "tile", 3), mixed(stl, "tile", 3)):
        with pytest.raises(ConversionError, match="mixing its rows would"):
            refused.apply(model(), x, None)


def test_without_examples_nothing_is_mixed():
    for kind in MIXES:
        with pytest.raises(ConversionError, match="pass example_inputs"):
            mixed(baselines.dense(), kind).apply(network(), None, None)


def test_what_the_method_leaves_is_left_unmixed_with_its_reason():
    model = network(hidden=6)
    second = model[2]
    done = mixed(baselines.sparse_24(), "symmetric").apply(model, EXAMPLES, None)
    assert list(done.converted) == ["0"]
    assert isinstance(done.converted["0"].linear, Sparse24Linear)
    assert model[2] is second
    assert "in_features 6 is not a multiple of 4" in done.skipped["2"]
    grids = EXAMPLES[:, :7]
    with pytest.raises(ConversionError, match="square grid"):
        mixed(baselines.sparse_24(), "grid").apply(network(), grids, None)


def test_the_dense_one_is_the_token_mix_there_was():
    one, other = mixed(baselines.dense(), "tile", 4), baselines.token_mix()
    assert (one.name, one.tile, one.cost(9, 12, 8)) == (other.name, other.tile, other.cost(9, 12, 8))
    assert one.name == "dense+mix"
    assert other.cost(9, 12, 8).flops == 2 * 9 * 12 * 8 + 2 * 12 * 12 * 4  # 9 rows are three tiles
    assert mixed(baselines.stl(STLConfig(rank=24)), "grid").label == "stl+grid r=24"


@pytest.mark.parametrize(
    ("method", "kind", "inside"),
    [
        (baselines.sparse_24(), "tile", Sparse24Linear),
        (baselines.low_rank(0.375), "symmetric", LowRankLinear),
        (baselines.stl(STLConfig(rank=24)), "grid", STLLinear),
    ],
    ids=["2:4 tile", "low-rank symmetric", "stl grid"],
)
def test_t2t_vit(method, kind, inside):
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def build(method):
        torch.manual_seed(0)
        sizes = {"image_size": 8, "in_channels": 1, "depth": 1, "embed_dim": 16, "heads": 2}
        model = models.t2t_vit("t2t_vit_nano", num_classes=10, pool="cls", **sizes)
        dense = dict(model.named_modules())
        return model.eval(), dense, method.apply(model, x, lambda module, name: name.startswith("blocks."))

    (plain, _, before), (model, dense, done) = build(method), build(mixed(method, kind))
    assert torch.equal(model(x), plain(x))  # the mix starts at zero, and draws nothing
    assert list(done.converted) == list(before.converted)
    assert len(done.converted) == 4
    assert all(type(made.linear) is inside and made.kind == kind for made in done.converted.values())
    found, without = baselines.model_cost(model, done, x), baselines.model_cost(plain, before, x)
    features = sum(made.in_features for made in done.converted.values())
    rows, each = {"tile": (20, 4), "symmetric": (17, 4), "grid": (16, 9)}[kind]  # of 17 tokens
    assert found.flops - without.flops == 2 * 2 * rows * each * features
    assert found.dense_flops == without.dense_flops
    assert found.params - without.params == features * {"tile": 16, "symmetric": 4, "grid": 9}[kind]
    with torch.no_grad():
        weights(next(iter(done.converted.values()))).add_(0.1)
    assert not torch.allclose(model(x), plain(x))
    done.undo()
    assert all(module is dense[name] for name, module in model.named_modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
