"""If these fail, a conversion lets an output depend on what it did not: another sample, a later token, another window.

`gained` is an oracle of its own: every place of every input is changed, one by one, in the dense and in the converted model.
"""

import copy
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from zoo import VOCABULARY, D

from strassen_tile import STLConfig, STLLinear, check_mixing, convert
from strassen_tile.errors import ConversionError

SEQUENCE, CAUSAL = STLConfig(tile=4, rank=20), STLConfig(tile=4, rank=20, mixing="causal")
X = torch.randn(2, 12, D, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
BLOCK = ["attention.qkv", "attention.proj", "up", "down"]


def within(name, layers=BLOCK):
    return {f"{name}.{layer}" for layer in layers}


BLOCKS = within("blocks.0") | within("blocks.1")
# name → (model, examples, the layers whose rows may mix)
BOTH_WAYS = {
    "encoder": (lambda: zoo.Language(False), IDS, BLOCKS | {"words"}),
    "encoder, pooled": (lambda: zoo.Language(False, "pooled"), IDS, BLOCKS),
    "encoder, classes": (lambda: zoo.Language(False, "classes"), IDS, BLOCKS),
    "encoder, last row": (lambda: zoo.Language(False, "last"), IDS, BLOCKS),
    "encoder, loss": (lambda: zoo.Language(False, "loss"), IDS, BLOCKS | {"words"}),
    "encoder behind zero gates": (lambda: zoo.Language(False, gate=0.0), IDS, BLOCKS | {"words"}),
    "encoder behind an MLP": (lambda: zoo.Language(False, first=True), IDS, BLOCKS | {"words", "first.0", "first.2"}),
    "vision": (zoo.Vision, PIXELS, BLOCKS | {"patch"}),
    "vision, read at one token": (lambda: zoo.Vision(token=True), PIXELS, BLOCKS | {"patch"}),
    "mixer": (zoo.Mixer, PIXELS, {"patch", "over", "back", "up", "down"}),
    "diffusion": (zoo.Diffusion, (PIXELS, torch.rand(2)), {"patch", "final", *BLOCK}),
    "recurrent both ways": (lambda: zoo.Recurrent("both"), X, {"before", "after"}),
    "scan both ways": (lambda: zoo.Scan(both=True), X, {"inner", "step", "out"}),
    "set transformer": (
        zoo.SetTransformer,
        X,
        {"reads.kv", "reads.out", "writes.q", "writes.kv", "writes.out", "rows", "pool.kv"},
    ),
    "two towers": (zoo.TwoTowers, (PIXELS, IDS), {f"vision.{name}" for name in BLOCKS | {"patch"}}),
    "encoder and decoder": (zoo.Writer, (IDS, IDS[:, :7]), within("reader") | {"cross.kv"}),
    "encoder and decoder, one tensor": (zoo.Writer, (IDS, IDS), within("reader") | {"cross.kv"}),
    "encoder and decoder, one token": (zoo.Writer, (IDS, IDS[:, :1]), within("reader") | {"cross.kv"}),
    "windows of 8": (lambda: zoo.Windows(8), X.repeat(1, 2, 1), within("block") | {"after"}),
    "windows of 6": (lambda: zoo.Windows(6), X, within("block")),
    "windows of 6, 4-D": (lambda: zoo.Windows(6, five=True), X, within("block")),
    "shifted windows of 6": (lambda: zoo.Windows(6, shift=3), X, within("block")),
    "U-net": (zoo.UNet, X.repeat(1, 2, 1), within("block") | {"fine", "join"}),
    "five dimensions": (lambda: zoo.FiveDimensions(), torch.randn(2, 2, 3, 6, D), within("block") | {"after"}),
    "five dimensions, turned": (lambda: zoo.FiveDimensions(True), torch.randn(2, 2, 5, 6, D), within("block")),
    "cross-attention": (zoo.Cross, (X, X[:, :9] * 2), {"kv"}),
    "experts": (zoo.Experts, X, {"attention.qkv", "attention.proj", "router"}),
    "side head": (zoo.SideHead, IDS, {"side"}),
    "two samples in a row": (lambda: zoo.Folded(2), X, within("block")),
    "four samples in a row": (
        lambda: zoo.Folded(4),
        X.repeat(2, 1, 1) + torch.arange(4)[:, None, None],
        within("block"),
    ),
    "samples interleaved": (lambda: zoo.Folded(2, interleaved=True), X.repeat(2, 1, 1), within("block")),
    "a layer used both ways": (zoo.Shared, X, within("block")),
}
# name → (model, examples): no row may see another one that is later, or at all
APART = {
    "GPT": (lambda: zoo.Language(True), IDS),
    "GPT, one sample": (lambda: zoo.Language(True), IDS[:1]),
    "GPT, bytes": (lambda: zoo.Language(True), IDS.to(torch.uint8)),
    "GPT, int16": (lambda: zoo.Language(True), IDS.to(torch.int16)),
    "GPT, pooled": (lambda: zoo.Language(True, "pooled"), IDS),
    "GPT, classes": (lambda: zoo.Language(True, "classes"), IDS),
    "GPT, last row": (lambda: zoo.Language(True, "last"), IDS),
    "GPT, loss": (lambda: zoo.Language(True, "loss"), IDS),
    "GPT, flat logits": (lambda: zoo.Language(True, "flat"), IDS),
    "GPT behind an MLP": (lambda: zoo.Language(True, first=True), IDS),
    "GPT behind zero gates": (lambda: zoo.Language(True, gate=0.0), IDS),
    "GPT with a token before": (lambda: zoo.Language(True, prepend=True), IDS),
    "GPT, two tokens a row": (zoo.Pairs, IDS.repeat(1, 2)),
    "recurrent": (zoo.Recurrent, X),
    "recurrent, backwards in time": (lambda: zoo.Recurrent("backwards"), X),
    "retention": (zoo.Retention, X),
    "scan": (zoo.Scan, X),
    "causal convolutions": (lambda: zoo.Convolutions(True), X.repeat(1, 3, 1)),
    "local convolutions": (lambda: zoo.Convolutions(False), X.repeat(1, 3, 1)),
    "experts without attention": (lambda: zoo.Experts(attention=False), X),
    "cross-attention of one token": (zoo.Cross, (X[:, :1], X[:, :1])),
    "row by row": (lambda: nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D), nn.GELU()), X),
}  # fmt: skip


LONG = torch.randn(2, 40, D, generator=torch.Generator().manual_seed(4))
UNREAD = (torch.arange(40) != 13).expand(2, 40, 40)
APART |= {
    "points of a field": (zoo.Field, (X[:, 0], X[..., :1])),
    "points of a field, on or off": (zoo.Field, (X[:, 0], X[..., :1] > 0)),
    "lengths, the first one full": (
        lambda: zoo.Masked(lambda lengths, n: (torch.arange(n) < lengths[:, None])[:, None]), (X, torch.tensor([12, 9])),
    ),
    "a prefix read both ways, all of it in the first sample": (
        lambda: zoo.Masked(lambda prefix, n: torch.ones(n, n).tril().bool() | (torch.arange(n) < prefix[:, None])[:, None]),
        (torch.cat([X, X[:, :4]], dim=1), torch.tensor([16, 4])),
    ),
    "a row that nobody reads": (lambda: zoo.Masked(lambda pattern, n: pattern[:, :n, :n]), (LONG, UNREAD)),
    "documents packed into a row": (
        lambda: zoo.Masked(lambda document, n: document[:, :, None] == document[:, None]),
        (X, (torch.arange(12) > 4).long().expand(2, 12)),
    ),
    "lines and columns": (zoo.Crossing, torch.randn(2, 8, 8, D)),
}  # fmt: skip


def arguments(examples):
    return examples if isinstance(examples, tuple) else (examples,)


@torch.no_grad()
def dependences(model, examples):
    """(input, sample, position) → for each output tensor, which elements change with it. Positions are of dimension 1."""
    model = copy.deepcopy(model).double().eval()
    inputs = [t.double() if t.is_floating_point() else t for t in arguments(examples)]
    outputs = lambda given: list(arguments(model(*given)))  # noqa: E731
    before, found = outputs(inputs), {}
    for at, tensor in enumerate(inputs):
        for sample in range(tensor.shape[0]):
            for position in range(tensor.shape[1]) if tensor.ndim > 1 else [None]:
                place = (sample,) if position is None else (sample, position)
                other = tensor.clone()
                if tensor.is_floating_point():
                    other[place] = other[place] * 0.5 + torch.randn(other[place].shape).double()
                else:
                    other[place] = (other[place].long() + 7) % VOCABULARY
                after = outputs([other if i == at else t for i, t in enumerate(inputs)])
                found[at, *place] = [(a - b).abs() > 1e-11 * a.abs().max() for a, b in zip(before, after, strict=True)]
    return found


def awake(model):
    """Gates that start at zero, opened; what converts has to hold then too."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return model


def gained(dense, converted, examples):
    """Places that change an element of an output of the converted model, and did not in the dense one."""
    had, has = dependences(awake(dense), examples), dependences(awake(converted), examples)
    return [place for place in had if any(bool((b & ~a).any()) for a, b in zip(had[place], has[place], strict=True))]


# Each much like one that is run every time: another output, or another layout, of the same model.
LIKE_ANOTHER = {
    "encoder and decoder, one tensor", "encoder and decoder, one token", "encoder behind an MLP", "encoder, loss",
    "encoder, last row", "encoder, classes", "vision, read at one token", "windows of 6, 4-D", "five dimensions, turned",
    "two samples in a row", "scan both ways",
}  # fmt: skip
assert set(BOTH_WAYS) > LIKE_ANOTHER


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_ANOTHER else name for name in BOTH_WAYS]
)
def test_rows_mix_where_the_model_lets_them_meet_and_nowhere_else(name):
    make, examples, expected = BOTH_WAYS[name]
    model = make()
    dense = copy.deepcopy(model)
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    done = convert(model, SEQUENCE, example_inputs=examples, filter_fn=lambda module, name: True)
    assert set(done.converted) == expected, str(done)
    assert set(done.skipped) >= linear - expected
    assert check_mixing(model, examples), str(check_mixing(model, examples))
    if name != "experts":  # where an expert is chosen, what depends on what changes with the values
        assert gained(dense, model, examples) == []


@pytest.mark.parametrize("name", APART)
def test_what_the_model_keeps_apart_is_refused_with_the_layers_named(name):
    make, examples = APART[name]
    model = make()
    with pytest.raises(ConversionError) as refusal:
        convert(model, SEQUENCE, example_inputs=examples, filter_fn=lambda module, name: True)
    assert not any(isinstance(module, STLLinear) for module in model.modules())
    for layer in (n for n, m in model.named_modules() if isinstance(m, nn.Linear)):
        names = [layer, re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer)]  # layers that share a reason are named together
        assert any(re.search(rf"[ (]{re.escape(name)}[,:)]", str(refusal.value)) for name in names), layer
    assert "mixing='none'" in str(refusal.value)


@pytest.mark.parametrize("name", ["GPT", "GPT, two tokens a row", "recurrent, backwards in time", "scan", "row by row"])
def test_forced_by_name_they_leak_and_the_check_says_so(name):
    make, examples = APART[name]
    model = make()
    dense = copy.deepcopy(model)
    done = convert(model, SEQUENCE, example_inputs=examples, filter_fn=lambda module, name: True, force_mixing=["*"])
    assert done.converted
    assert gained(dense, model, examples)
    report = check_mixing(model, examples)
    assert not report
    assert report.unsafe
    assert set(report.unsafe) <= {*done.converted, ""}


@pytest.mark.parametrize("name", ["two samples in a row", "samples interleaved", "a layer used both ways"])
def test_nobody_can_ask_for_samples_to_meet(name):
    make, examples, _ = BOTH_WAYS[name]
    model = make()
    dense = copy.deepcopy(model)
    done = convert(model, SEQUENCE, example_inputs=examples, filter_fn=lambda module, name: True, force_mixing=["*"])
    assert "rows of several samples" in done.skipped["layer"]
    assert gained(dense, model, examples) == []


def test_to_force_one_layer_excuses_no_other():
    def convert_forced(*names):
        return convert(zoo.Heads(), SEQUENCE, example_inputs=X, filter_fn=lambda module, name: True, force_mixing=names)

    assert set(convert_forced("both.*").converted) == within("both")
    done = convert_forced("*")  # a statistic of the batch beside it does not hide what a sample is
    assert set(done.converted) == within("both") | within("causal") | {"aside"}
    assert "turned" in done.skipped


@pytest.mark.parametrize("name", ["GPT", "GPT, loss", "GPT behind an MLP", "recurrent", "scan", "retention"])
def test_causal_tiles_see_backwards_only(name):
    make, examples = APART[name]
    model = make()
    dense = copy.deepcopy(model)
    done = convert(model, CAUSAL, example_inputs=examples, filter_fn=lambda module, name: True)
    assert {n for n, m in dense.named_modules() if isinstance(m, nn.Linear)} == set(done.converted)
    assert check_mixing(model, examples)
    assert gained(dense, model, examples) == []


@pytest.mark.parametrize("name", ["recurrent, backwards in time", "row by row", "local convolutions"])
def test_causal_tiles_are_refused_where_earlier_rows_are_not_seen(name):
    make, examples = APART[name]
    backwards = name == "recurrent, backwards in time"
    if backwards:  # there a row sees later ones, not earlier ones
        model = zoo.Recurrent("backwards")
        model.after = nn.Identity()
        with pytest.raises(ConversionError, match="before: mixing its rows would make output"):
            convert(model, CAUSAL, example_inputs=examples)
        return
    with pytest.raises(ConversionError, match="mixing its rows would make output"):
        convert(make(), CAUSAL, example_inputs=examples)


def test_a_model_built_by_hand_is_checked_too():
    class Hand(nn.Module):
        def __init__(self, turned):
            super().__init__()
            self.block, self.layer, self.turned = zoo.Block(), STLLinear(D, D, config=SEQUENCE), turned

        def forward(self, x):
            x = self.block(x)
            return self.layer(x.transpose(0, 1)).transpose(0, 1) if self.turned else self.layer(x)

    assert check_mixing(Hand(False), X)
    report = check_mixing(Hand(True), X)
    assert list(report.unsafe) == ["layer"]
    assert "rows of several samples" in str(report)


def test_a_dense_model_is_asked_what_could_mix_in_it():
    report = check_mixing(zoo.SideHead(), IDS)
    assert "side" in report.safe
    assert {"blocks.0.up", "words"} <= set(report.unsafe)
    with pytest.raises(ConversionError, match="does not mix rows"):
        check_mixing(zoo.SideHead(), IDS, STLConfig(mixing="none", rank=6))


class Stateful(nn.Module):
    """Draws from every generator, counts its calls, changes its input in place, and trains a norm by itself."""

    def __init__(self):
        super().__init__()
        self.block, self.norm = zoo.Block(), nn.BatchNorm1d(12)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.norm.train()
        x += float(np.random.rand()) * 1e-3 + random.random() * 1e-3 + torch.rand(()) * 1e-3
        return F.dropout(self.block(self.norm(x)), 0.1, training=True)


def test_nothing_is_left_of_the_runs():
    model, x = Stateful(), X.clone()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    check_mixing(model, x)
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name]), name
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.equal(x, X)
    assert all(module.training for module in model.modules())


def test_the_verdict_is_the_same_every_time():
    reports = [check_mixing(zoo.Writer(), (IDS, IDS[:, :7])) for _ in range(2)]
    torch.manual_seed(9)
    reports.append(check_mixing(zoo.Writer(), (IDS, IDS[:, :7])))
    assert [set(report.safe) for report in reports] == [within("reader") | {"cross.kv"}] * 3


class Uncopied(zoo.Windows):
    def __deepcopy__(self, memo):
        raise TypeError("holds a lock")


def test_a_model_that_cannot_be_copied_is_put_back_as_it_was():
    model = Uncopied(6)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [dict(m._forward_hooks) for m in model.modules()]
    report = check_mixing(model, X)
    assert set(report.safe) == within("block")
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name]), name
        assert value.dtype == kept[name].dtype
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks
    assert set(convert(model, SEQUENCE, example_inputs=X).converted) == within("block")


def test_a_model_whose_output_changes_in_shape_cannot_be_checked():
    class Selects(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, x):
            y = self.layer(x)
            return y[y[..., 0] > 0]

    with pytest.raises(ConversionError, match="shapes of the model's outputs depend on the values"):
        convert(Selects(), SEQUENCE, example_inputs=X)


def test_values_that_the_model_does_not_take_show_nothing_and_stop_nothing():
    class Strict(zoo.Windows):
        """Takes numbers between 0 and 1, and one kind of token."""

        def forward(self, x, kinds):
            if x.min() < 0 or x.max() > 1:
                raise ValueError("pixels are between 0 and 1")
            return super().forward(x + torch.zeros(1, D, dtype=x.dtype)[kinds])

    done = convert(Strict(6), SEQUENCE, example_inputs=(X.sigmoid(), torch.zeros(2, 12, dtype=torch.long)))
    assert set(done.converted) <= within("block")


class Frozen(zoo.Block):
    def __deepcopy__(self, memo):
        return self


def test_a_model_whose_parts_return_themselves_as_copies_is_put_back_too():
    model = nn.Sequential(zoo.Block(), Frozen())
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    assert check_mixing(model, X)
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name]), name


def test_names_of_children_may_hold_dots():
    class Dotted(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("block", zoo.Block())
            self._modules["la.yer"] = nn.Linear(D, D)

        def forward(self, x):
            return zoo.bend(self._modules["la.yer"](self.block(x)))

    assert set(convert(Dotted(), SEQUENCE, example_inputs=X).converted) == within("block") | {"la.yer"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"config": "none"}, "config must be an STLConfig"),
        ({"model": torch.nn.functional.relu}, "model must be a torch.nn.Module"),
        ({"filter_fn": "block"}, "filter_fn must be a function"),
        ({"force_mixing": "blok.*"}, r"force_mixing: 'blok\.\*' matches no linear layer"),
    ],
    ids=["config", "model", "filter_fn", "force_mixing"],
)
def test_bad_arguments_are_said(arguments, says):
    with pytest.raises(ConversionError, match=says):
        convert(**{"model": zoo.Windows(6), "config": SEQUENCE, "example_inputs": X, **arguments})


def test_effort_is_a_number_of_times():
    for effort in (0, -1, 1.5):
        with pytest.raises(ConversionError, match="effort is a whole number"):
            check_mixing(zoo.Windows(6), X, effort=effort)
