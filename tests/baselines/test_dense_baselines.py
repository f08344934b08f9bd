"""If these fail, low rank and the row-mixing control start from something else than the dense layer they stand beside."""

import pytest
import torch
from torch import nn

from strassen_tile import baselines
from strassen_tile.baselines import LowRankLinear, MixedLinear
from strassen_tile.errors import ConfigError, ShapeError

X = torch.randn(2, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def dense(k=12, m=10, **options):
    return nn.Linear(k, m, dtype=torch.float64, **options)


def product(layer):
    return layer.second.weight @ layer.first.weight


def test_low_rank_is_the_truncated_svd():
    linear = dense()
    layer = LowRankLinear.from_linear(linear, 0.6)
    assert layer.rank == int(0.6 * 120 / 22) == 3
    u, s, vt = torch.linalg.svd(linear.weight)
    expected = u[:, :3] @ torch.diag(s[:3]) @ vt[:3]
    torch.testing.assert_close(product(layer), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer(X), X @ expected.mT + linear.bias, rtol=1e-10, atol=1e-10)
    error = float((product(layer) - linear.weight).detach().norm())
    assert error == pytest.approx(float(s[3:].detach().norm()), rel=1e-9)
    norms = layer.first.weight.norm(dim=1), layer.second.weight.norm(dim=0)
    torch.testing.assert_close(*norms)  # split evenly


def test_no_product_of_that_rank_is_closer():
    linear = dense()
    layer = LowRankLinear.from_linear(linear, 0.6)
    best = (product(layer) - linear.weight).norm()
    gradients = torch.autograd.grad(best, [layer.first.weight, layer.second.weight])
    assert all(gradient.abs().max() < 1e-10 for gradient in gradients)
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.5, max_iter=50, line_search_fn="strong_wolfe")
    for _ in range(5):
        with torch.no_grad():
            for p in (layer.first.weight, layer.second.weight):
                p.add_(0.3 * torch.randn_like(p))

        def distance():
            optimizer.zero_grad()
            loss = (product(layer) - linear.weight).square().sum()
            loss.backward()
            return loss

        optimizer.step(distance)
        assert distance().sqrt() > best * (1 - 1e-9)


@pytest.mark.parametrize(("ratio", "rank"), [(1e-9, 1), (0.5, 2), (0.99, 5), (1.9, 10), (5.0, 10)])
def test_rank_for_a_flop_ratio(ratio, rank):
    layer = LowRankLinear.from_linear(dense(), ratio)
    assert layer.rank == rank
    assert layer.cost(7, 2).flops == 2 * 14 * rank * 22
    if 0.2 < ratio < 1:
        assert layer.cost(7, 2).flop_ratio <= ratio


def test_full_rank_is_exact():
    linear = dense()
    torch.testing.assert_close(LowRankLinear.from_linear(linear, 2.0)(X), linear(X), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(("k", "m"), [(0, 5), (5, 0), (1, 1)])
def test_sizes_without_rank(k, m):
    linear = dense(k, m)
    y = LowRankLinear.from_linear(linear, 0.5)(torch.ones(2, k, dtype=torch.float64))
    assert y.shape == (2, m)
    if not k:
        torch.testing.assert_close(y, linear.bias.expand(2, -1))


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan")])
def test_ratio_that_is_not_positive_is_refused(ratio):
    with pytest.raises(ConfigError, match="flop_ratio"):
        LowRankLinear.from_linear(dense(), ratio)


def test_rank_below_one_is_refused():
    with pytest.raises(ConfigError, match="rank must be >= 1; got 0"):
        LowRankLinear(4, 4, rank=0)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_token_mix_starts_as_the_dense_layer(n):
    linear = dense()
    layer = MixedLinear(linear, "tile", 4)
    torch.testing.assert_close(layer(X[:, :n]), linear(X[:, :n]), rtol=0, atol=1e-14)
    assert layer.linear is linear


def mixing(p=4):
    layer = MixedLinear(dense(), "tile", p)
    with torch.no_grad():
        layer.mix.add_(torch.randn_like(layer.mix))
    return layer


def test_token_mix_is_its_formula():
    layer = mixing()
    padded = nn.functional.pad(X, (0, 0, 0, 1))
    mixed = padded.clone()
    for tile in (0, 1):
        for a in range(4):
            for b in range(4):
                mixed[:, 4 * tile + a] += layer.mix[:, a, b].detach() * padded[:, 4 * tile + b]
    torch.testing.assert_close(layer(X), layer.linear(mixed[:, :7]))


def test_token_mix_keeps_samples_and_tiles_apart():
    layer = mixing()
    other = torch.randn_like(X)
    other[0] = X[0]
    assert torch.equal(layer(other)[0], layer(X)[0])
    changed = X.clone()
    changed[:, 1] += 1
    assert (layer(changed) != layer(X)).any(dim=-1).all(dim=0).tolist() == [True] * 4 + [False] * 3
    flat = layer(X.reshape(1, 14, 12)).view(2, 7, 10)  # samples end to end would share a tile
    assert not torch.allclose(flat[1], layer(X)[1])
    with pytest.raises(ShapeError, match="batch of rows"):
        layer(X[0])


def test_token_mix_trains_the_mix_and_keeps_the_mode():
    layer = MixedLinear(dense().eval())
    assert not layer.training
    layer(X).square().sum().backward()
    assert layer.mix.grad.abs().sum() > 0
    with pytest.raises(ConfigError, match="rows_mixed"):
        MixedLinear(dense(), "tile", 0)


class MeanAdded(nn.Module):
    """Lets all rows of a sample meet."""

    def forward(self, x):
        return x + x.mean(dim=1, keepdim=True)


def test_methods_convert_and_undo():
    examples = torch.randn(2, 7, 12)
    methods = {
        "dense": (baselines.dense(), nn.Linear),
        "2:4": (baselines.sparse_24(), baselines.Sparse24Linear),
        "low-rank": (baselines.low_rank(0.5), LowRankLinear),
        "dense+mix": (baselines.token_mix(3), MixedLinear),
    }
    for name, (method, kind) in methods.items():
        model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), MeanAdded()).eval()
        layers, expected = list(model), model(examples)
        done = method.apply(model, examples, None)
        assert method.name == method.label == name
        assert [type(model[i]) for i in (0, 2)] == [kind, kind]
        assert not any(module.training for module in model.modules())
        assert done.calls["2"] == [(2, 7, 8)]
        done.undo()
        assert list(model) == layers
        assert torch.equal(model(examples), expected)


def test_only_the_row_mixing_method_refuses_batches_of_rows():
    rows = torch.randn(5, 12)
    for method in (baselines.dense(), baselines.sparse_24(), baselines.low_rank(0.5)):
        method.apply(nn.Sequential(nn.Linear(12, 8), nn.ReLU()), rows, None)
    with pytest.raises(ValueError, match="whose rows are a batch"):
        baselines.token_mix().apply(nn.Sequential(nn.Linear(12, 8), nn.ReLU()), rows, None)
