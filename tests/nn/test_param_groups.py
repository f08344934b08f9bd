"""If these fail, a parameter is trained twice or not at all, or decays that must not."""

import pytest
import torch
from torch import nn

from strassen_tile import STLConfig, STLLinear, convert, models, param_groups
from strassen_tile.errors import ConfigError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.tokens = nn.Parameter(torch.zeros(1, 3, 8))
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.mixed = STLLinear(8, 8, config=STLConfig(tile=2, rank=5))
        self.each = STLLinear(8, 8, config=STLConfig(tile=2, rank=5, encoder_scope="tile", train_decoder=False))
        self.again = self.mixed
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.embed.weight
        self.fixed = nn.Linear(8, 8).requires_grad_(False)


def names(model, groups):
    known = {id(p): name for name, p in model.named_parameters()}
    return {group["name"]: {known[id(p)] for p in group["params"]} for group in groups}


def test_every_trainable_parameter_is_in_the_group_of_its_kind():
    model = Model()
    groups = param_groups(model, 1e-3, 0.05, encoder_lr=1e-4)
    assert names(model, groups) == {
        "weights": {"embed.weight", "tokens", "mixed.encoded_weight", "each.encoded_weight"},
        "encoders": {"mixed.encoder", "mixed.decoder", "each.encoder"},
        "rest": {"norm.weight", "norm.bias", "scale", "mixed.bias", "each.bias"},
    }
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {"weights": (1e-3, 0.05), "encoders": (1e-4, 0.0), "rest": (1e-3, 0.0)}


def test_encoders_take_the_common_rate_by_default():
    assert {group["lr"] for group in param_groups(Model(), 2e-3, 0.1)} == {2e-3}


def test_an_encoder_rate_of_zero_is_kept():
    assert {g["name"]: g["lr"] for g in param_groups(Model(), 1e-3, 0.1, encoder_lr=0.0)}["encoders"] == 0.0


def test_only_groups_with_members_are_made():
    assert [group["name"] for group in param_groups(nn.Linear(4, 4, bias=False), 1e-3, 0.1)] == ["weights"]


def test_optimizer_takes_them_and_only_weights_decay():
    model = convert_t2t()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(param_groups(model, 0.1, 0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    groups = names(model, optimizer.param_groups)
    assert changed == {name for name in groups["weights"] if before[name].any()}
    assert len(groups["encoders"]) == 2 * sum(isinstance(m, STLLinear) for m in model.modules())


def convert_t2t():
    model = models.t2t_vit("t2t_vit_micro", num_classes=3, image_size=8, in_channels=1)
    pixels = torch.randn(2, 1, 8, 8)
    convert(
        model, STLConfig(tile=4, rank=6), example_inputs=pixels, filter_fn=lambda _, name: name.startswith("blocks.")
    )
    return model


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"weight_decay": -0.1}, {"encoder_lr": -1e-9}], ids=str)
def test_negative_rates_are_refused(wrong):
    with pytest.raises(ConfigError, match="must be >= 0"):
        param_groups(Model(), **{"lr": 1e-3, "weight_decay": 0.1, **wrong})


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(4, 4).requires_grad_(False)], ids=["empty", "frozen"])
def test_model_with_nothing_to_train_is_refused(model):
    with pytest.raises(ConfigError, match="no trainable parameters"):
        param_groups(model, 1e-3, 0.1)
