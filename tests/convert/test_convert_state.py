"""If these fail, converting a model changes more than its layers, or cannot be undone, saved or copied."""

import copy

import pytest
import torch
from tiny_models import APART, IDS, MASK, SEQUENCE, Classifier, Tokens, bert
from torch import nn

from strassen_tile import STLConfig, STLLinear, convert
from strassen_tile.errors import ConversionError

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(2))


def test_undo_puts_the_same_modules_back():
    model = Classifier().eval()
    modules, expected, attributes = dict(model.named_modules()), model(X), set(vars(model))
    state = {name: p.clone() for name, p in model.state_dict().items()}
    done = convert(model, SEQUENCE, example_inputs=X)
    assert not torch.equal(model(X), expected)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.0)
        model.first.encoder.add_(1.0)
    done.undo()
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())
    assert torch.equal(model(X), expected)
    assert set(vars(model)) == attributes
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    done.undo()
    assert torch.equal(model(X), expected)


def test_undo_in_any_order():
    for order in ((0, 1), (1, 0)):
        model = Classifier().eval()
        modules, expected = dict(model.named_modules()), model(X)
        done = [
            convert(model, SEQUENCE, example_inputs=X, filter_fn=lambda module, name: name == "first"),
            convert(model, APART, filter_fn=lambda module, name: name == "second"),
        ]
        assert done[1].skipped["first"] == "is an STLLinear already"
        for index in order:
            done[index].undo()
        assert dict(model.named_modules()) == modules
        assert torch.equal(model(X), expected)


def test_converting_twice_says_so():
    model = Classifier()
    convert(model, SEQUENCE, example_inputs=X)
    with pytest.raises(ConversionError, match=r"2 layers \(first, second\): is an STLLinear already"):
        convert(model, SEQUENCE, example_inputs=X)


def test_examples_leave_no_trace():
    class Noisy(Classifier):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))  # random in eval mode, too

    def converted(examples):
        torch.manual_seed(3)
        model = Noisy()
        model.norm.eval()
        model.pooled.weight.requires_grad_(False)
        model.norm.weight.grad = torch.ones(8)
        convert(model, APART, example_inputs=examples, filter_fn=lambda module, name: name in ("first", "second"))
        return model, torch.rand(1)

    (with_examples, one), (without, other) = converted(X), converted(None)
    assert torch.equal(one, other)  # not even of the random numbers
    for (name, a), (_, b) in zip(with_examples.named_parameters(), without.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.requires_grad is (name != "pooled.weight")
    for (name, a), (_, b) in zip(with_examples.named_modules(), without.named_modules(), strict=True):
        assert a.training is b.training is (name != "norm")
    assert torch.equal(with_examples.norm.weight.grad, torch.ones(8))
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_examples_that_fail_leave_the_model_as_it_was():
    model = Classifier()
    with pytest.raises(RuntimeError):
        convert(model, SEQUENCE, example_inputs=torch.randn(2, 6, 9))
    assert all(module.training for module in model.modules())
    assert not any(isinstance(module, STLLinear) or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "config", [STLConfig(rank=24, basis="no/such.json"), STLConfig(rank=7, basis="naive")], ids=str
)
def test_configs_that_cannot_be_built_touch_nothing(config):
    model = Classifier()
    with pytest.raises(ValueError, match=r"no/such|rank"):
        convert(model, config)
    assert not any(isinstance(module, STLLinear) for module in model.modules())


def test_frozen_layers_stay_frozen():
    model = Classifier().requires_grad_(False)
    model.last.requires_grad_(True)
    convert(model, SEQUENCE, example_inputs=X)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"last.weight", "last.bias"}


@pytest.mark.parametrize(
    "examples",
    [IDS, (IDS,), [IDS], {"ids": IDS}],
    ids=["tensor", "tuple", "list", "dict"],
)
def test_examples_in_every_form(examples):
    done = convert(Tokens(backwards_only=False), SEQUENCE, example_inputs=examples)
    assert done.skipped == {"words": "a head: it makes the model's output"}
    assert done.calls["inner"] == [(3, 7, 8)]


def test_state_dict_of_a_converted_model_loads_into_another(tmp_path):
    model, other = Classifier().eval(), Classifier().eval()
    for each in (model, other):
        convert(each, SEQUENCE, example_inputs=X)
    assert not torch.equal(model(X), other(X))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(model(X), other(X))
    with pytest.raises(RuntimeError, match=r"first\.encoder"):
        Classifier().load_state_dict(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_of_the_model_is_kept(dtype):
    model = Classifier().to(dtype)
    convert(model, SEQUENCE, example_inputs=X.to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(X.to(dtype)).dtype == dtype


def test_fit_is_taken_where_the_config_says_so():
    model = Classifier().double()
    expected = model(X.double())
    convert(model, STLConfig(tile=2, rank=7, basis="strassen"), example_inputs=X.double())
    torch.testing.assert_close(model(X.double()), expected, rtol=1e-12, atol=1e-12)
    assert model.first.config == STLConfig(tile=2, rank=7, basis="strassen")


def test_meta_model_is_converted_without_numbers():
    with torch.device("meta"):
        model, x = Classifier(), torch.empty(2, 6, 8)
    with pytest.raises(ConversionError, match="meta device"):  # and so nothing that shows what its rows may see
        convert(model, SEQUENCE, example_inputs=x)
    done = convert(model, APART, example_inputs=x)
    assert list(done.converted) == ["first", "second", "pooled"]
    assert all(p.is_meta for p in model.parameters())
    assert model(x).shape == (2, 3)
    with torch.device("meta"):
        same_sizes = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        done = convert(same_sizes, APART, example_inputs=torch.empty(2, 6, 8))
    assert not done.skipped  # none of them makes the output


def test_copy_of_a_converted_model_has_a_padding_mask_of_its_own():
    pytest.importorskip("transformers")
    model = bert()
    done = convert(model, SEQUENCE, example_inputs={"input_ids": IDS, "attention_mask": MASK})
    twin = copy.deepcopy(model)
    expected = model(input_ids=IDS, attention_mask=MASK).logits
    done.undo()  # takes the hooks off the model, not off its copy
    assert torch.equal(twin(input_ids=IDS, attention_mask=MASK).logits, expected)
    masks = {id(m.padding) for m in twin.modules() if isinstance(m, STLLinear)}
    assert len(masks) == 1
    assert id(done.padding) not in masks
    assert isinstance(model.bert.encoder.layer[0].intermediate.dense, nn.Linear)
