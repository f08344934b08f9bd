"""If these fail, a dry run says something else than the conversion does, or leaves a trace."""

import pytest
import torch
import zoo
from tiny_models import APART, CAUSAL, IDS, MASK, SEQUENCE, Classifier, Tokens, bert
from torch import nn

from strassen_tile import STLConfig, STLLinear, convert
from strassen_tile.errors import ConversionError

X = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(1))
TEXT = {"input_ids": IDS, "attention_mask": MASK}


class PastItsName(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        a = self.a
        self.step = lambda x: a(x)

    def forward(self, x):
        return self.b(self.step(x).relu()).relu()


CASES = {
    "classifier": (Classifier, SEQUENCE, X, {}),
    "rows apart, blind": (Classifier, APART, None, {}),
    "fitted": (Classifier, STLConfig(tile=2, rank=7, basis="strassen"), X, {}),
    "past its name": (PastItsName, APART, X, {}),
    "two heads": (zoo.SideHead, SEQUENCE, IDS % zoo.VOCABULARY, {}),
    "a config a layer": (
        zoo.SideHead,
        CAUSAL,
        IDS % zoo.VOCABULARY,
        {"layer_configs": {"side": SEQUENCE, "blocks.0.*": None}},
    ),
    "padded text": (bert, SEQUENCE, TEXT, {}),
}


def numbers(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_says_what_the_conversion_does_and_leaves_no_trace(name):
    make, config, examples, options = CASES[name]
    if make is bert:
        pytest.importorskip("transformers")
    model = make()
    modules, before, drawn = dict(model.named_modules()), numbers(model), torch.get_rng_state()
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    dry = convert(model, config, example_inputs=examples, dry_run=True, **options)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), drawn)
    done = convert(model, config, example_inputs=examples, **options)
    converted = dict(model.named_modules())
    dry.undo()  # which undoes nothing
    assert dict(model.named_modules()) == converted
    assert dry.dry_run
    assert not done.dry_run
    assert dry.skipped == done.skipped
    assert dry.calls == done.calls
    assert (dry.padding is None) is (done.padding is None)
    described = {key: (str(layer), layer.training) for key, layer in done.converted.items()}
    assert {key: (str(layer), layer.training) for key, layer in dry.converted.items()} == described
    for key, layer in dry.converted.items():
        assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
        made = done.converted[key]
        assert [(n, p.shape, p.dtype, p.requires_grad) for n, p in layer.named_parameters()] == [
            (n, p.shape, p.dtype, p.requires_grad) for n, p in made.named_parameters()
        ]
    head, *lines = str(dry).splitlines()
    assert head == (f"dry run, nothing was changed: {len(dry.converted)} to convert, {len(dry.skipped)} to leave")
    assert lines == str(done).splitlines()[1:]


def test_where_nothing_is_to_convert_the_reasons_are_the_report():
    model = Tokens(backwards_only=True)
    dry = convert(model, SEQUENCE, example_inputs=IDS, dry_run=True)
    assert dry.converted == {}
    assert set(dry.skipped) == {"inner", "outer", "words"}
    with pytest.raises(ConversionError) as refusal:
        convert(model, SEQUENCE, example_inputs=IDS)
    assert all(reason in str(refusal.value) for reason in dry.skipped.values())


def test_what_convert_refuses_to_ask_a_dry_run_refuses_too():
    for options in ({"config": SEQUENCE}, {"config": APART, "layer_configs": {"x": None}}, {"min_speedup": 2}):
        with pytest.raises(ConversionError):
            convert(Classifier(), dry_run=True, **options)


def test_a_model_without_numbers_can_be_asked():
    with torch.device("meta"):
        model = Classifier()
    dry = convert(model, APART, dry_run=True)
    assert list(dry.converted) == ["first", "second", "unused", "pooled", "last"]
    assert not any(isinstance(module, STLLinear) for module in model.modules())


def test_lazy_layers_stay_lazy_and_each_is_found():
    class Late(nn.Module):
        """Its linear layer is there once it has been called."""

        def __init__(self):
            super().__init__()
            self.first = nn.LazyLinear(8)

        def forward(self, x):
            return self.first(x) + 0

    model, x = nn.Sequential(Late(), nn.LazyLinear(8), nn.ReLU()), torch.randn(2, 5, 6)
    done = convert(model, APART, example_inputs=x, dry_run=True)
    assert set(done.converted) == {"0.first", "1"}
    assert type(model[1]) is nn.LazyLinear and model(torch.randn(2, 5, 7)).shape == (2, 5, 8)
