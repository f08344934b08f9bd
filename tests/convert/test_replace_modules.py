"""If these fail, a model is left with some modules replaced and others not, or does not come back as it was."""

import copy
import pickle

import pytest
import torch
from torch import nn

from strassen_tile import STLConfig, STLLinear, convert, quantize_fp8
from strassen_tile.convert import replace_modules
from strassen_tile.errors import ConversionError


class Owners(nn.Module):
    """One layer under three names, one of them with a dot in it, and another layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.inside = nn.ModuleDict({"again": self.a})
        self.add_module("parts", nn.Module())
        self.parts._modules["odd.name"] = self.a


class Fixed(Owners):
    def __setattr__(self, name, value):
        replaces = name == "b" and "b" in self._modules
        if not replaces or self.late:
            super().__setattr__(name, value)
        if replaces:
            raise self.error


def test_a_module_is_replaced_under_all_its_names_and_put_back():
    model, new = Owners(), nn.Identity()
    before = dict(model.named_modules(remove_duplicate=False))
    undo = replace_modules(model, {"parts.odd.name": new})
    after = dict(model.named_modules(remove_duplicate=False))
    assert {name for name, module in after.items() if module is new} == {"a", "inside.again", "parts.odd.name"}
    assert model.b is before["b"]
    undo()
    assert dict(model.named_modules(remove_duplicate=False)) == before
    model.a = nn.Tanh()
    undo()  # once only
    assert type(model.a) is nn.Tanh


def test_a_whole_block_and_a_layer_that_holds_the_old_one():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 8))
    block, layer = model[0], model[1]
    undo = replace_modules(model, {"0": nn.Sequential(block, nn.Tanh()), "1": nn.Sequential(layer)})
    assert model[0][0] is block
    assert model[1][0] is layer
    undo()
    assert [model[0], model[1]] == [block, layer]


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [KeyError("fixed"), KeyboardInterrupt()], ids=["refused", "interrupted"])
def test_all_or_none(error, late):
    model = Fixed()
    model.error, model.late = error, late
    before = dict(model.named_modules(remove_duplicate=False))
    with pytest.raises(ConversionError if isinstance(error, Exception) else KeyboardInterrupt):
        replace_modules(model, {"a": nn.Identity(), "b": nn.Identity()})
    assert dict(model.named_modules(remove_duplicate=False)) == before


@pytest.mark.parametrize("names", [["a", "c"], ["a", ""], ["a", "inside.again"]], ids=["unknown", "model", "two ways"])
def test_names_that_cannot_be_meant_change_nothing(names):
    model = Owners()
    before = dict(model.named_modules(remove_duplicate=False))
    with pytest.raises(ConversionError, match=repr(names[1])):
        replace_modules(model, {name: nn.Identity() for name in names})
    assert dict(model.named_modules(remove_duplicate=False)) == before


def test_old_modules_follow_the_model():
    model = Owners().double()
    undo = replace_modules(model, {"a": nn.Linear(8, 8), "b": nn.Identity()})
    model.bfloat16().eval()
    undo()
    assert model.a.weight.dtype is torch.bfloat16
    assert model.b.weight.dtype is torch.float64  # nothing in its place had a dtype
    assert not model.a.training
    assert not model.b.training
    model = nn.Sequential(STLLinear(8, 8, config=STLConfig(rank=8)))
    undo = quantize_fp8(model).undo
    model.to("meta")
    undo()
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_fused_encoders_stay_off_while_any_layer_is_replaced():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    assert model.layers[0].activation_relu_or_gelu
    first, second = (replace_modules(model, {f"layers.0.linear{i}": nn.Identity()}) for i in (1, 2))
    for undo, linears in ((first, 1), (second, 2)):  # in the order that is not the usual one
        undo()
        types = [type(model.layers[0].linear1), type(model.layers[0].linear2)]
        assert types.count(nn.Linear) == linears
        assert bool(model.layers[0].activation_relu_or_gelu) is model.use_nested_tensor is (linears == 2)
    assert model.layers[0].activation_relu_or_gelu == 1  # ReLU, as it was


class Derived(nn.Linear):
    """Not what PyTorch's encoder looks for, but it reads the weight all the same."""


def test_an_encoder_whose_layer_was_no_linear_before_keeps_its_fused_path():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    model.layers[0].linear1 = Derived(8, 16)
    model.extra = nn.Linear(8, 8)
    undo = replace_modules(model, {"extra": nn.Identity()})
    assert model.layers[0].activation_relu_or_gelu == 1 and model.use_nested_tensor
    undo()
    assert model.layers[0].activation_relu_or_gelu == 1 and model.use_nested_tensor


def test_an_encoder_layer_without_its_usual_layers_is_converted():
    class Odd(nn.TransformerEncoderLayer):
        def __init__(self):
            super().__init__(8, 2, 16, batch_first=True)
            del self.linear1
            self.other = nn.Linear(8, 16)

    model = nn.ModuleDict({"odd": Odd()})
    done = convert(model, STLConfig(rank=8, mixing="none"))
    assert set(done.converted) == {"odd.other", "odd.linear2"}
    done.undo()
    assert type(model["odd"].other) is nn.Linear


@torch.no_grad()
def test_conversions_undone_in_either_order_compute_what_they_did():
    x, config = torch.randn(2, 5, 8), STLConfig(rank=8, mixing="none")
    for first in (0, 1):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
        dense = model(x)
        done = [convert(model, config, filter_fn=lambda _, name, i=i: name.endswith(f"linear{i}")) for i in (1, 2)]
        done[first].undo()
        half = model(x)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            torch.testing.assert_close(half, model(x))
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        done[1 - first].undo()
        torch.testing.assert_close(model(x), dense)


def test_what_took_a_replacements_place_is_undone_first():
    """Else the mask of the row-mixing layers would go and they, or their like, would stay."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(2, 5, 8)
    before, done = (
        list(model),
        convert(model, STLConfig(), example_inputs=x, filter_fn=lambda *_: True, force_mixing="*"),
    )
    quantized = quantize_fp8(model)
    now = list(model)
    with pytest.raises(ConversionError, match=r"0 is a STLLinearFP8 by now, .* undo that first"):
        done.undo()
    assert list(model) == now
    quantized.undo()
    done.undo()
    assert list(model) == before


def test_old_layers_follow_layers_in_fp8():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    done = convert(model, STLConfig(mixing="none"))
    quantized = quantize_fp8(model)
    model.half()
    quantized.undo()
    done.undo()
    assert {p.dtype for p in model.parameters()} == {torch.float16}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_model_and_report_undoes_the_copy(copied):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    done = convert(model, STLConfig(mixing="none"))
    other, report = copied((model, done))
    report.undo()
    assert [type(m) for m in other] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [type(m) for m in model] == [STLLinear, nn.ReLU, STLLinear]
    done.undo()
    assert type(model[0]) is nn.Linear
