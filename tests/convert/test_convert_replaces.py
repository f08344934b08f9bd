"""If these fail, convert says that a layer is replaced while the model goes on with the old one, reads what is not there, loses
what hung on the layer, or is left half converted.
"""

import functools
import random

import numpy as np
import pytest
import torch
from tiny_models import APART, SEQUENCE
from torch import nn

from strassen_tile import STLLinear, convert, quantize_fp8
from strassen_tile.errors import ConversionError, ShapeError

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(2))


def stack():
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU())


class Reaches(nn.Module):
    """Two layers, of which `a` is reached in some other way than by calling self.a."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(8, 8), nn.Linear(8, 8), how
        if how == "list":
            self.steps = [self.a, torch.relu]
        elif how == "nested":
            self.steps = {"first": ({"then": self.a},)}
        elif how == "partial":
            self.step = functools.partial(self.a)
        elif how == "bound method":
            self.step = self.a.forward
        elif how == "closure":
            a = self.a
            self.step = lambda x: a(x)

    def forward(self, x):
        x = {
            "list": lambda: self.steps[0](x),
            "nested": lambda: self.steps["first"][0]["then"](x),
            "partial": lambda: self.step(x),
            "bound method": lambda: self.step(x),
            "closure": lambda: self.step(x),
            "weight": lambda: self.a(x) * self.a.weight.norm(),
            "transposed": lambda: x @ self.a.weight.T,
            "class": lambda: self.a(x) if type(self.a) is nn.Linear else None,
        }[self.how]()
        return self.b(x.relu()).relu()


WAYS = ["list", "nested", "partial", "bound method", "closure", "weight", "transposed", "class"]


@pytest.mark.parametrize("how", WAYS)
def test_a_layer_reached_in_another_way_is_left_dense(how):
    model = Reaches(how)
    before, x = model.a, X.requires_grad_(False)
    done = convert(model, APART, example_inputs=x)
    assert list(done.converted) == ["b"]
    assert model.a is before
    assert any(word in done.skipped["a"] for word in ("held by", "called past its name", "does not run", "not called"))
    assert model(x).isfinite().all()


@pytest.mark.parametrize("how", ["list", "nested", "partial", "bound method"])
def test_containers_are_looked_into_without_examples_too(how):
    assert "is also held by step" in convert(Reaches(how), APART).skipped["a"]


def test_layers_called_by_keyword_are_called_so_afterwards():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            return self.a(input=x).relu()

    model = Keyword()
    assert list(convert(model, APART, example_inputs=X).converted) == ["a"]
    assert model(X).shape == X.shape
    assert list(convert(Keyword(), APART).converted) == ["a"]


def test_a_weight_that_is_not_there_cannot_be_computed_with():
    layer = STLLinear(8, 6, dtype=torch.bfloat16)
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((6, 8), torch.bfloat16, "cpu")
    for use in (
        lambda: weight.norm(),
        lambda: nn.functional.linear(torch.ones(2, 8).bfloat16(), weight),
        lambda: weight.sum() * 0.1,
        lambda: weight.float(),
        lambda: weight[0, 0],
        lambda: weight.detach() @ weight.T,
    ):
        with pytest.raises(ShapeError, match="no dense weight"):
            use()


HOOKS = {
    "forward": lambda layer: layer.register_forward_hook(lambda *_: None),
    "forward pre": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "backward": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
    "state dict": lambda layer: layer.register_state_dict_post_hook(lambda *_: None),
    "state dict pre": lambda layer: layer.register_state_dict_pre_hook(lambda *_: None),
    "load": lambda layer: layer.register_load_state_dict_pre_hook(lambda *_: None),
    "loaded": lambda layer: layer.register_load_state_dict_post_hook(lambda *_: None),
    "weight": lambda layer: layer.weight.register_hook(lambda g: g),
    "bias, accumulated": lambda layer: layer.bias.register_post_accumulate_grad_hook(lambda p: None),
    "compiled": lambda layer: layer.compile(),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_what_hangs_on_a_layer_is_not_dropped(kind):
    model = stack()
    HOOKS[kind](model[0])
    before = model[0]
    done = convert(model, APART, example_inputs=X)
    assert list(done.converted) == ["2"]
    assert "would be lost" in done.skipped["0"]
    assert model[0] is before


class Picky(nn.Module):
    """Takes its first layer in another's place, and not its second."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.ready = nn.Linear(8, 8), nn.Linear(8, 8), True

    def __setattr__(self, name, value):
        if name == "b" and "ready" in vars(self):
            raise KeyError("b is fixed")
        super().__setattr__(name, value)

    def forward(self, x):
        return self.b(self.a(x).relu()).relu()


def test_all_layers_are_replaced_or_none():
    model = Picky()
    layers, expected = (model.a, model.b), model(X)
    with pytest.raises(
        ConversionError, match=r"Picky does not take another layer as 'b'.*b is fixed.*Nothing was changed"
    ):
        convert(model, APART, example_inputs=X)
    assert (model.a, model.b) == layers
    assert torch.equal(model(X), expected)
    assert list(convert(model, APART, filter_fn=lambda module, name: name == "a").converted) == ["a"]


@pytest.mark.parametrize(
    "change", [lambda m: m.double(), lambda m: m.bfloat16(), lambda m: m.eval()], ids=["64", "16", "eval"]
)
def test_undo_follows_what_the_model_became(change):
    model = stack()
    dense = [model[0], model[2]]
    done = convert(model, APART)
    change(model)
    dtype, training = next(model.parameters()).dtype, model.training
    done.undo()
    assert [model[0], model[2]] == dense
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {m.training for m in model.modules()} == {training}
    assert model(X.to(dtype)).dtype == dtype


def test_generators_and_buffers_are_as_they_were():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(6)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.norm.train()
            return self.a(self.norm(x + random.random() + float(np.random.rand()))).relu()

    model = Draws().eval()
    random.seed(0)
    np.random.seed(0)
    before = random.getstate(), np.random.get_state()[2], model.norm.running_mean.clone()
    convert(model, APART, example_inputs=X)
    assert random.getstate() == before[0]
    assert np.random.get_state()[2] == before[1]
    assert torch.equal(model.norm.running_mean, before[2])
    assert model.calls == 0
    assert not model.norm.training


def test_scripted_parts_are_named_and_left():
    inner = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    model = nn.Sequential(inner, nn.Linear(8, 8), nn.ReLU())
    done = convert(model, APART, example_inputs=X)
    assert list(done.converted) == ["1"]
    assert "torch.jit" in done.skipped["0"]
    assert set(quantize_fp8(model).converted) == {"1"}
    with pytest.raises(ConversionError, match=r"torch\.jit"):
        convert(inner, APART)


def test_a_router_among_experts_is_left_as_it_was_found():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.expert = nn.Linear(8, 4), nn.Linear(8, 8)

        def forward(self, x):
            return x * self.router(x).softmax(-1).amax(-1, keepdim=True) + self.expert(x)

    with pytest.raises(ConversionError, match=r"2 layers \(router, expert\): mixing its rows would make output"):
        convert(Routed(), SEQUENCE, example_inputs=X)


def test_what_is_converted_in_inference_mode_can_be_trained():
    model = stack()
    with torch.inference_mode():
        convert(model, APART, example_inputs=X.clone())
    model(X).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
