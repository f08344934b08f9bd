"""If these fail, a layer that is fed rows of several people's data is made to mix them."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import APART, CAUSAL, SEQUENCE
from torch import nn

from strassen_tile import convert
from strassen_tile.errors import ConversionError

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(2))


class Turned(nn.Module):
    """Attention between the rows of a sample around a layer whose input is turned, and turned back."""

    def __init__(self, turn):
        super().__init__()
        self.turn, self.a, self.b = turn, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = F.layer_norm(self.a(x.to(self.a.bias.dtype)), (8,))
        y = y + (y @ y.mT).softmax(dim=-1) @ y
        return self.turn(self.b(self.turn(y))).relu()


def sequence_first(x):
    return x.transpose(0, 1)


@pytest.mark.parametrize(
    "examples", [X, X[:1], (X * 99).byte(), (X * 99).long()], ids=["two", "one", "bytes", "integers"]
)
@pytest.mark.parametrize("config", [SEQUENCE, CAUSAL], ids=["sequence", "causal"])
def test_rows_of_several_samples_in_one_dimension_are_left_alone(config, examples):
    done = convert(Turned(sequence_first), config, example_inputs=examples)
    assert list(done.converted) == ["a"]
    assert done.skipped["b"].startswith("dimension −2 of its input holds rows of several samples")
    assert done.calls["a"] == [tuple(examples.shape)]


def windows(x):
    return x.unflatten(1, (2, 3)) if x.ndim == 3 else x.flatten(1, 2)


def one_sample_only(x):
    assert x.shape[0] == 1, "this model takes one sample"
    return x


@pytest.mark.parametrize("turn", [lambda x: x.flip(0), windows, one_sample_only], ids=["reversed", "windows", "one"])
def test_samples_that_stay_apart_in_another_way_are_seen_to(turn):
    examples = X[:1] if turn is one_sample_only else X
    assert not convert(Turned(turn), SEQUENCE, example_inputs=examples).skipped


def test_rows_apart_need_not_ask_whose_rows_they_are():
    assert not convert(Turned(sequence_first), APART, example_inputs=X).skipped


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.rest = nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 8)

    def forward(self, x):
        return self.rest(self.body(x.transpose(0, 1)).transpose(0, 1)).relu()


@pytest.mark.parametrize("examples", [X[:1], X], ids=["one sample", "two samples"])
def test_sequence_first_attention_keeps_its_blocks_dense(examples):
    model = SequenceFirst()
    done = convert(model, SEQUENCE, example_inputs=examples)
    assert list(done.converted) == ["rest"]
    assert all("rows of several samples" in done.skipped[f"body.linear{i}"] for i in (1, 2))
    done.undo()
    assert len(convert(model, APART, example_inputs=examples).converted) == 3


def test_attention_that_only_turns_its_input_does_not_keep_its_block_dense():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.mlp = nn.Linear(8, 8)

        def forward(self, x):
            turned = x.transpose(0, 1)
            return self.mlp(self.attention(turned, turned, turned)[0].transpose(0, 1)).relu()

    assert list(convert(Block(), SEQUENCE, example_inputs=X).converted) == ["mlp"]
    with pytest.raises(ConversionError, match="pass example_inputs"):
        convert(Block(), SEQUENCE)


def test_samples_do_not_meet_though_it_is_asked_for_by_name():
    with pytest.raises(ConversionError, match="rows of several samples"):
        convert(
            Turned(sequence_first),
            SEQUENCE,
            example_inputs=X,
            force_mixing=["*"],
            filter_fn=lambda m, name: name == "b",
        )
    with pytest.raises(ConversionError, match=r"force_mixing: 'c\*' matches no linear layer; there are a, b"):
        convert(Turned(sequence_first), SEQUENCE, example_inputs=X, force_mixing=["a", "c*"])


def test_a_sequence_first_model_is_told_where_its_batch_belongs():
    """force_mixing, which cannot help it, is not named."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3, enable_nested_tensor=False)
    x = torch.randn(6, 2, 8)  # six rows of two samples
    with pytest.raises(ConversionError) as refusal:
        convert(model, SEQUENCE, example_inputs=x)
    said = str(refusal.value)
    assert "batch_first=True" in said
    assert "mixing='none'" in said
    assert "force_mixing" not in said
    assert said.count("rows of several samples") <= 2  # and not once for each of six layers
    with pytest.raises(ConversionError, match="force_mixing") as refusal:
        convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), SEQUENCE, example_inputs=X)
    assert "batch_first" not in str(refusal.value)
