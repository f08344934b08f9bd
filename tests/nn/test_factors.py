"""If these fail, normalised weights train something else, or a branch that is to start as none does something."""

import copy

import pytest
import torch
from torch import nn

from strassen_tile import STLMLP, STLConfig, STLLinear, reference
from strassen_tile.baselines.layers import LowRankLinear
from strassen_tile.errors import ConfigError
from strassen_tile.models.layers import Block
from strassen_tile.nn import normalise_weights, zero_last

G, V = "parametrizations.encoded_weight.original0", "parametrizations.encoded_weight.original1"


def layer(**config):
    made = STLConfig(**{"tile": (2, 4, 3), "rank": 5, **config})
    return STLLinear(10, 7, config=made, dtype=torch.float64)


KINDS = [{}, {"encoder_scope": "tile"}, {"mixing": "causal"}, {"mixing": "none"}, {"recompute": True}]


@pytest.mark.parametrize("config", KINDS, ids=str)
@pytest.mark.parametrize("per", ["term", "layer"])
def test_a_normalised_layer_computes_and_learns_as_its_definition_says(config, per):
    plain = layer(**config)
    normalised = copy.deepcopy(plain)
    assert normalise_weights(normalised, per) == [""]
    x, target = torch.randn(3, 5, 10).double().requires_grad_(), torch.randn(3, 5, 7).double()
    torch.testing.assert_close(normalised(x), plain(x), rtol=1e-12, atol=1e-12)

    trained = dict(normalised.named_parameters())
    assert trained[G].shape == ((5, 1, 1) if per == "term" else ())
    with torch.no_grad():  # away from the start, where norm and direction are one
        trained[G].mul_(1.5)
        trained[V].add_(0.1)
    twin = {name: p.detach().clone().requires_grad_() for name, p in trained.items()}
    norm = twin[V].flatten(1).norm(dim=1)[:, None, None] if per == "term" else twin[V].norm()
    read, written = (1, 1) if config.get("mixing") != "causal" else (f != 0 for f in normalised.factors())
    y = reference.stl_linear(
        x, twin[G] * twin[V] / norm, twin["encoder"] * read, twin["decoder"] * written, twin["bias"], out_features=7
    )
    found = normalised(x)
    torch.testing.assert_close(found, y, rtol=1e-12, atol=1e-12)
    (found * target).sum().backward()
    (y * target).sum().backward()
    for name, p in trained.items():
        torch.testing.assert_close(p.grad, twin[name].grad, rtol=1e-11, atol=1e-11, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(normalised(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
def test_a_normalised_mlp_runs_with_and_without_gradients(gated):
    mlp = STLMLP(8, 12, gated=gated, config=STLConfig(tile=2, rank=3), dtype=torch.float64)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    before = mlp(x).detach()
    assert normalise_weights(mlp) == (["gate", "up", "down"] if gated else ["up", "down"])
    torch.testing.assert_close(mlp(x).detach(), before, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), before, rtol=1e-12, atol=1e-12)
    assert normalise_weights(mlp) == []


def test_a_normalised_layer_is_saved_and_loaded():
    one, other = layer(), layer()
    for made in (one, other):
        normalise_weights(made)
    other.load_state_dict(one.state_dict())
    x = torch.randn(1, 4, 10, dtype=torch.float64)
    assert torch.equal(other(x), one(x))
    with pytest.raises(RuntimeError, match="encoded_weight"):
        layer().load_state_dict(one.state_dict())


def test_what_cannot_be_normalised_is_said():
    with pytest.raises(ConfigError, match="per must be one of term, layer; got 'row'"):
        normalise_weights(layer(), "row")
    with pytest.raises(ConfigError, match="no STLLinear"):
        normalise_weights(nn.Linear(4, 4))
    model = nn.ModuleDict({"good": layer(), "zero": layer()})
    with torch.no_grad():
        model["zero"].encoded_weight[2] = 0
    with pytest.raises(ConfigError, match="zero has a Ŵ or a term"):
        normalise_weights(model)
    assert "encoded_weight" in dict(model["good"].named_parameters())  # all or none
    assert normalise_weights(model, "layer") == ["good", "zero"]


LAST = ["*.attn.proj", "*.mlp.fc2"]


def blocks(kind):
    made = nn.ModuleList(Block(8, 2, 12, scale=1.0) for _ in range(2))
    config = STLConfig(tile=2, rank=3, train_decoder=kind == "stl")
    for name, linear in list(made.named_modules()):
        if kind != "dense" and isinstance(linear, nn.Linear):
            path, _, leaf = name.rpartition(".")
            setattr(made.get_submodule(path), leaf, STLLinear.from_linear(linear, config))
    if kind == "normalised":
        normalise_weights(made)
    return made


@pytest.mark.parametrize("kind", ["dense", "stl", "fixed decoder", "normalised"])
def test_blocks_start_as_nothing_and_learn(kind):
    model = blocks(kind)
    kept = {name: p.clone() for name, p in model.named_parameters()}
    assert sorted(zero_last(model, LAST)) == ["0.attn.proj", "0.mlp.fc2", "1.attn.proj", "1.mlp.fc2"]
    x = torch.randn(2, 5, 8)
    for block in model:
        assert torch.equal(block(x), x)
    ends = {"dense": "weight", "stl": "decoder", "fixed decoder": "encoded_weight", "normalised": G}
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, kept[name])}
    last = {name for name in kept if ".attn.proj." in name or ".mlp.fc2." in name}
    assert {name for name in changed if not name.endswith("bias")} == {n for n in last if n.endswith(ends[kind])}
    assert all(name in last for name in changed)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model[1](model[0](x)).square().sum().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name in last and p.requires_grad)


def test_the_norm_inside_a_layer_stays_and_low_rank_ends_with_its_second():
    inner = STLLinear(8, 8, config=STLConfig(rank=6), norm=nn.LayerNorm(8))
    nn.init.ones_(inner.norm.bias)
    model = nn.ModuleDict({"stl": inner, "low": LowRankLinear(8, 8, rank=2)})
    zero_last(model, ["*"])
    assert bool(inner.norm.bias.all()) and not inner.bias.any() and not inner.decoder.any()
    assert not model["low"].second.weight.any() and not model["low"].second.bias.any()
    assert bool(inner.encoded_weight.any()) and bool(model["low"].first.weight.any())


def test_names_that_mean_no_layer_are_refused_and_nothing_is_zeroed():
    model = nn.ModuleDict({"one": layer(), "two": nn.Linear(4, 4).requires_grad_(False)})
    kept = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=r"no linear layer is called th\*; there are one, two"):
        zero_last(model, ["one", "th*"])
    with pytest.raises(ConfigError, match="two would be zero for good"):
        zero_last(model, ["*"])
    with pytest.raises(ConfigError, match=r"patterns must be a list of names, \['one'\]"):
        zero_last(model, "one")
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
