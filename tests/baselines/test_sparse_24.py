"""If these fail, "2:4" in a comparison is not what the hardware runs, or not what the papers trained."""

import itertools

import pytest
import torch
from torch import nn

from strassen_tile import baselines
from strassen_tile.baselines import Sparse24Linear, mask_24
from strassen_tile.errors import ConversionError, ShapeError

X = torch.randn(4, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def dense(k=16, m=6, **options):
    return nn.Linear(k, m, dtype=torch.float64, **options)


def best_pairs(score):
    """Of every four, the two whose scores sum highest, by trying all six pairs."""
    kept = torch.zeros_like(score, dtype=torch.bool)
    for row, group in itertools.product(range(score.shape[0]), range(score.shape[1] // 4)):
        four = range(4 * group, 4 * group + 4)
        pair = max(itertools.combinations(four, 2), key=lambda pair: float(score[row, list(pair)].sum()))
        kept[row, list(pair)] = True
    return kept


def test_mask_keeps_the_two_largest_of_every_four():
    weight = torch.randn(6, 16)
    mask = mask_24(weight)
    assert mask.dtype == torch.bool
    assert (mask.view(6, 4, 4).sum(dim=-1) == 2).all()
    assert torch.equal(mask, best_pairs(weight.abs()))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_ties_still_keep_exactly_two(value):
    assert (mask_24(torch.full((3, 8), value)).view(3, 2, 4).sum(dim=-1) == 2).all()


def test_wanda_weighs_by_the_norm_of_the_inputs():
    weight, scale = torch.randn(6, 16, dtype=torch.float64), torch.logspace(-2, 2, 16, dtype=torch.float64)
    inputs = X * scale[torch.randperm(16)]
    mask = mask_24(weight, inputs)
    assert torch.equal(mask, best_pairs(weight.abs() * inputs.reshape(-1, 16).norm(dim=0)))
    assert not torch.equal(mask, mask_24(weight))
    assert torch.equal(mask_24(weight, torch.ones(5, 16)), mask_24(weight))  # equal norms change nothing


def test_sizes_that_hold_no_whole_groups_are_refused():
    with pytest.raises(ShapeError, match="multiple of 4; got 6"):
        mask_24(torch.zeros(4, 6))
    with pytest.raises(ShapeError, match=r"inputs must be \(…, 8\)"):
        mask_24(torch.zeros(4, 8), torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="calibration inputs"):
        Sparse24Linear.from_linear(dense(), one_shot="wanda")


def test_method_names_the_layers_it_cannot_prune():
    model = nn.Sequential(nn.Linear(16, 6), nn.Linear(6, 8), nn.Linear(8, 8))
    done = baselines.sparse_24().apply(model, None, None)
    assert list(done.converted) == ["0", "2"]
    assert done.skipped == {"1": "in_features 6 is not a multiple of 4"}
    with pytest.raises(ConversionError, match="in_features 6"):
        baselines.sparse_24().apply(nn.Sequential(nn.Linear(6, 8)), None, None)


def test_forward_uses_the_masked_weight():
    linear = dense()
    layer = Sparse24Linear.from_linear(linear)
    expected = X @ (linear.weight * best_pairs(linear.weight.detach().abs())).mT + linear.bias
    torch.testing.assert_close(layer(X), expected)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias


@pytest.mark.parametrize("decay", [2e-4, 0.0, 0.3])
def test_gradient_is_straight_through_plus_decay_on_the_pruned(decay):
    layer = Sparse24Linear(16, 6, decay=decay, dtype=torch.float64)
    mask = best_pairs(layer.weight.detach().abs())
    x, seed = X.clone().requires_grad_(), torch.randn(4, 3, 6, dtype=torch.float64)
    layer(x).backward(seed)
    through = seed.reshape(-1, 6).mT @ X.reshape(-1, 16)  # the gradient in the masked weight
    torch.testing.assert_close(layer.weight.grad, through + decay * layer.weight * ~mask)
    torch.testing.assert_close(layer.bias.grad, seed.sum(dim=(0, 1)))
    torch.testing.assert_close(x.grad, seed @ (layer.weight * mask))


def test_what_is_pruned_decays_at_zhous_rate_by_default():
    layer = Sparse24Linear(16, 6, dtype=torch.float64)
    (0.0 * layer(X)).sum().backward()
    expected = 2e-4 * layer.weight * ~best_pairs(layer.weight.detach().abs())
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-12, atol=0)


def test_mask_follows_the_weights_in_training():
    layer = Sparse24Linear(16, 6, dtype=torch.float64)
    first = mask_24(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    for _ in range(20):
        optimizer.zero_grad()
        (layer(X) - X[..., :6]).square().mean().backward()
        optimizer.step()
    assert not torch.equal(mask_24(layer.weight), first)
    effective = layer(torch.eye(16, dtype=torch.float64)) - layer.bias
    assert ((effective.mT.reshape(6, 4, 4) != 0).sum(dim=-1) == 2).all()


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_weights_pruned_in_one_shot_stay_zero(criterion):
    inputs = X * torch.logspace(-2, 2, 16, dtype=torch.float64)[torch.randperm(16)]
    linear = dense()
    layer = Sparse24Linear.from_linear(linear, one_shot=criterion, inputs=inputs)
    mask = mask_24(linear.weight, inputs if criterion == "wanda" else None)
    eye, start = torch.eye(16, dtype=torch.float64), layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.2, weight_decay=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (layer(X) - X[..., :6]).square().mean().backward()
        optimizer.step()
        effective = (layer(eye) - layer.bias).mT
        assert not effective[~mask].any()
    assert (effective[mask] != start[mask]).all()
    assert not layer.weight[~mask].any()  # whoever reads the weight, as a saved one, finds what the layer computes with


def test_state_of_a_one_shot_layer_holds_its_mask():
    layer = Sparse24Linear.from_linear(dense(), one_shot="magnitude")
    other = Sparse24Linear.from_linear(dense(), one_shot="magnitude")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(X), layer(X))
    assert set(Sparse24Linear(8, 8).state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("assign", [False, True])
def test_a_fresh_layer_takes_the_mask_of_a_state(assign):
    layer, model = Sparse24Linear.from_linear(dense(), one_shot="magnitude"), nn.Sequential(Sparse24Linear(16, 6))
    model.double().load_state_dict({f"0.{key}": value for key, value in layer.state_dict().items()}, assign=assign)
    assert torch.equal(model(X), layer(X))
    assert torch.equal(model[0].fixed_mask, layer.fixed_mask)
    with pytest.raises(RuntimeError, match="fixed_mask"):  # a mask is not lost in silence
        layer.load_state_dict(dense().state_dict())
    fresh = Sparse24Linear(8, 6)
    with pytest.raises(RuntimeError):
        fresh.load_state_dict(layer.state_dict())
    assert fresh.fixed_mask is None


def test_cost_is_half():
    cost = Sparse24Linear(16, 6).cost(3, 4)
    assert (cost.flops, cost.product_flops, cost.params) == (12 * 16 * 6, 12 * 16 * 6, 48)
    assert (cost.dense_flops, cost.dense_params) == (2 * 12 * 16 * 6, 96)


def test_mode_and_missing_bias_are_kept():
    assert Sparse24Linear.from_linear(dense(bias=False)).bias is None
    assert not Sparse24Linear.from_linear(dense().eval()).training
    assert Sparse24Linear.from_linear(dense().train()).training
