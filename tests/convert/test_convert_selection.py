"""If these fail, a layer is replaced that must not be, or left as it is without a word."""

import pytest
import torch
from tiny_models import APART, IDS, SEQUENCE, Classifier, Tokens
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from strassen_tile import STLLinear, convert
from strassen_tile.errors import ConversionError

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(2))
HEAD = "a head: it makes the model's output"


def everything(module, name):
    return True


def test_each_layer_is_converted_or_skipped_with_its_reason():
    model = Classifier()
    done = convert(model, SEQUENCE, example_inputs=X)
    assert list(done.converted) == ["first", "second"]
    assert done.converted["first"] is model.first
    assert isinstance(model.first, STLLinear)
    assert done.skipped == {
        "unused": "not called on the example inputs",
        "pooled": "fed a 2-D input (2, 8), whose rows are a batch",
        "last": HEAD,
    }
    assert done.calls["first"] == [(2, 6, 8)]
    assert done.calls["pooled"] == [(2, 8)]
    assert model(X).shape == (2, 3)


def test_rows_apart_take_batches_of_rows():
    done = convert(Classifier(), APART, example_inputs=X)
    assert list(done.converted) == ["first", "second", "pooled"]
    assert done.padding is None


def test_str_is_a_table_of_all_layers():
    head, *lines = str(convert(Classifier(), SEQUENCE, example_inputs=X)).splitlines()
    assert head == "2 converted, 3 left as they are"
    assert [line.split()[0] for line in lines] == ["first", "second", "unused", "pooled", "last"]
    assert lines[0].split(maxsplit=1)[1] == "STL 8→12, tile 4×4×4, rank 8"
    assert lines[2].endswith("  not called on the example inputs")
    columns = [line.index("STL" if row < 2 else "left as it is") for row, line in enumerate(lines)]
    assert len(set(columns)) == 1


@pytest.mark.parametrize("examples", [None, X], ids=["blind", "seen"])
def test_filter_decides_and_sees_modules_with_their_names(examples):
    seen = {}

    def keep(module, name):
        seen[name] = module
        return name in ("second", "last")

    model = Classifier()
    before = dict(model.named_modules())
    done = convert(model, APART, example_inputs=examples, filter_fn=keep)
    assert list(done.converted) == ["second", "last"]  # it decides about heads too
    assert done.skipped == dict.fromkeys(["first", "unused", "pooled"], "excluded by filter_fn")
    assert all(seen[name] is before[name] for name in ("first", "second", "unused", "pooled", "last"))


def test_filter_that_matches_nothing_raises_and_touches_nothing():
    model = Classifier()
    named = (
        r"nothing to convert in Classifier. 5 layers \(first, second, unused, pooled, last\): excluded by filter_fn$"
    )
    with pytest.raises(ConversionError, match=named):
        convert(model, SEQUENCE, filter_fn=lambda module, name: name == "frist")
    assert not any(isinstance(module, STLLinear) for module in model.modules())
    assert not model._forward_pre_hooks
    with pytest.raises(ConversionError, match=r"it has no nn.Linear"):
        convert(nn.Sequential(nn.ReLU()), SEQUENCE)


def test_a_linear_layer_itself_is_refused():
    for model in (nn.Linear(8, 8), nn.LazyLinear(8), nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8)):
        with pytest.raises(ConversionError, match=r"itself a linear layer; use STLLinear.from_linear"):
            convert(model, SEQUENCE)


@pytest.mark.parametrize("name", ["head", "lm_head", "classifier", "score", "qa_outputs", "fc_out"])
def test_heads_by_name(name):
    model = nn.ModuleDict({"body": nn.Linear(8, 8), name: nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    assert convert(model, APART).skipped == {name: HEAD}
    nested = nn.ModuleDict({"body": nn.Linear(8, 8), name: nn.ModuleDict({"dense": nn.Linear(8, 8)})})
    assert convert(nested, APART).skipped == {f"{name}.dense": HEAD}


def test_heads_by_get_output_embeddings():
    class Model(nn.Sequential):
        def get_output_embeddings(self):
            return self[1]

    assert convert(Model(nn.Linear(8, 8), nn.Linear(8, 8)), APART).skipped == {"1": HEAD}


@pytest.mark.parametrize(
    "wrap",
    [lambda y: y, lambda y: (y, 1), lambda y: {"logits": [y]}, lambda y: y.squeeze(), lambda y: y.flatten()],
    ids=["tensor", "tuple", "nested", "view", "flat"],
)
def test_heads_by_making_the_output(wrap):
    class Model(nn.Sequential):
        def forward(self, x):
            return wrap(super().forward(x))

    model = Model(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    assert convert(model, APART, example_inputs=X).skipped == {"2": HEAD}
    model = Model(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    assert convert(model, APART, example_inputs=X).skipped == {}


def test_tied_parameters_are_left_alone():
    model = Tokens(backwards_only=False)
    model.words.weight = model.embed.weight
    done = convert(model, SEQUENCE, example_inputs=IDS)
    assert done.skipped == {"words": "its weight is tied to embed.weight"}
    assert model.words.weight is model.embed.weight
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].bias = model[1].bias
    assert convert(model, APART).skipped == {"0": "its bias is tied to 1.bias", "1": "its bias is tied to 0.bias"}


def test_shared_module_is_converted_once_and_everywhere():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.inside = nn.ModuleDict({"b": self.a})

        def forward(self, x):
            return self.inside["b"](self.a(x).relu()).relu()

    model = Twice()
    dense, expected = model.a, model(X)
    done = convert(model, APART, example_inputs=X)
    assert list(done.converted) == ["a"]
    assert model.a is model.inside["b"] is done.converted["a"]
    assert done.calls["a"] == [(2, 6, 8), (2, 6, 8)]
    done.undo()
    assert model.a is model.inside["b"] is dense
    assert torch.equal(model(X), expected)


def hooked(linear):
    linear.register_forward_hook(lambda module, args, output: output * 2)
    return linear


def own_forward(linear):
    linear.forward = lambda x: x
    return linear


UNUSUAL = {
    "subclass": (nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8), "is a NonDynamicallyQuantizableLinear"),
    "lazy": (nn.LazyLinear(8), "is a LazyLinear"),
    "parametrized": (parametrizations.spectral_norm(nn.Linear(8, 8)), "is a ParametrizedLinear"),
    "pruned": (prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5), "made from other parameters"),
    "hooked": (hooked(nn.Linear(8, 8)), "has hooks or a forward of its own"),
    "own forward": (own_forward(nn.Linear(8, 8)), "has hooks or a forward of its own"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm", "ignore:.*Lazy modules")
@pytest.mark.parametrize("kind", [*UNUSUAL, "weight norm"])
def test_layers_that_are_more_than_a_product_are_left_as_they_are(kind):
    layer, reason = UNUSUAL.get(kind) or (weight_norm(nn.Linear(8, 8)), "made from other parameters")
    model = nn.Sequential(layer, nn.Linear(8, 8))
    done = convert(model, APART)
    assert list(done.converted) == ["1"]
    assert reason in done.skipped["0"]
    assert model[0] is layer


def test_matrices_that_are_no_linear_layer_are_named_too():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 8))

    model = nn.ModuleDict(
        {"odd": Odd(), "attention": nn.MultiheadAttention(8, 2, batch_first=True), "a": nn.Linear(8, 8)}
    )
    skipped = convert(model, APART).skipped
    assert skipped["odd"] == "is a Odd; only nn.Linear modules are replaced"
    assert skipped["attention"].startswith("multiplies by its in_proj_weight itself")
    assert skipped["attention.out_proj"].startswith("is a NonDynamicallyQuantizableLinear")


def test_layers_alike_share_a_line_of_the_table():
    model = nn.ModuleDict({"layers": nn.ModuleList([Classifier() for _ in range(12)]), "mine": nn.Linear(8, 12)})
    done = convert(model, APART, filter_fn=lambda _, name: not name.endswith(("unused", "pooled", "last", "1.second")))
    head, *lines = str(done).splitlines()
    assert head == "23 converted, 38 left as they are"
    assert [line.partition("  ")[0] for line in lines] == [
        "13 layers (layers.*.first, mine)",
        "10 layers (layers.0,2-10.second)",
        "38 layers (layers.*.unused, layers.*.pooled, layers.*.last, layers.1,11.second)",
    ]
    assert sum(name.startswith("layers.") for name in done.skipped) == 38  # each by its name
    many = nn.ModuleDict({name: nn.Linear(8, 8) for name in "abcdefghijklmn"})
    assert "14 layers (a, b, c, d, e, f, g, h, i, j, k, l, …)  " in str(convert(many, APART))
    assert "2 layers (0, 1)  " in str(convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), APART))
