"""If these fail, what a call says of its rows is not heard: masks under torch's names, a second sequence, packed documents."""

import pytest
import torch
from torch import nn

import strassen_tile
from strassen_tile import STLConfig, STLLinear, convert
from strassen_tile.errors import ConversionError, ShapeError
from strassen_tile.nn import PaddingMask
from strassen_tile.nn.masks import real_rows

K = 8
CONFIG = STLConfig(tile=4, rank=24)
X = torch.randn(3, 7, K, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
REAL = torch.arange(7) < torch.tensor([[6], [3], [7]])
SCORES = torch.zeros(3, 7, dtype=torch.float64).masked_fill(~REAL, -torch.inf)
EVERYTHING = {"example_inputs": X, "filter_fn": lambda layer, name: "out_proj" not in name}


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(K, 2, 16, batch_first=True, dropout=0.0, dtype=torch.float64)
    return nn.TransformerEncoder(layer, 2).eval()


def spread(run):
    """The largest change of a real row when its padding is other junk; run(x) → (3, 7, …)."""
    junk = torch.where(REAL[..., None], X, X.flip(1) + 3)
    return float((run(X) - run(junk))[REAL].detach().abs().max())


class Around(nn.Module):
    """A model around an encoder, which hands its mask down under another name."""

    def __init__(self, own=False):
        super().__init__()
        self.inner, self.own = encoder(), nn.Linear(K, K, dtype=torch.float64)

    def forward(self, x, attention_mask=None):
        return self.inner(self.own(x), src_key_padding_mask=None if attention_mask is None else ~attention_mask.bool())


class Same(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = encoder()

    def forward(self, x, src_key_padding_mask=None):
        for layer in self.inner.layers:
            x = layer(x, src_key_padding_mask=src_key_padding_mask)
        return x


@pytest.mark.parametrize("mask", [~REAL, SCORES], ids=["bool", "scores"])
@pytest.mark.parametrize("make", [encoder, Same])
def test_torch_encoders_follow_their_mask(make, mask, monkeypatch):
    model = make()
    convert(model, CONFIG, **EVERYTHING)
    for training in (False, True):
        model.train(training)
        assert spread(lambda x: model(x, src_key_padding_mask=mask)) < 1e-12
        assert spread(lambda x: model(x, src_key_padding_mask=None)) > 1e-3
    monkeypatch.setattr(PaddingMask, "zero", lambda self, x: x)
    assert spread(lambda x: model(x, src_key_padding_mask=mask)) > 1e-3


def test_layers_called_alone_and_models_around_them():
    model = encoder()
    convert(model, CONFIG, **EVERYTHING)
    assert spread(lambda x: model.layers[1](x, src_key_padding_mask=~REAL)) < 1e-12
    assert spread(lambda x: model.layers[1](x, None, ~REAL)) < 1e-12
    around = Around()
    convert(around, CONFIG, **EVERYTHING)
    assert spread(lambda x: around(x, REAL.long())) < 1e-12
    assert spread(lambda x: around.inner(x, src_key_padding_mask=~REAL)) < 1e-12


def test_padding_on_the_left_under_torchs_name_is_refused():
    model = encoder()
    convert(model, CONFIG, **EVERYTHING)
    for mask in (~REAL.flip(1), SCORES.flip(1)):
        with pytest.raises(ShapeError, match="pad on the right"):
            model(X, src_key_padding_mask=mask)


def test_two_towers_each_with_its_own_mask_or_none():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = encoder(), encoder()

        def forward(self, x, y, attention_mask):
            return self.a(x, src_key_padding_mask=~attention_mask), self.b(y)

    model = Towers()
    convert(model, CONFIG, **{**EVERYTHING, "example_inputs": (X, X, REAL)})
    a, b = model(X, X, REAL)
    assert torch.equal(b, model.b(X))
    assert torch.equal(a, model.a(X, src_key_padding_mask=~REAL))


def test_a_pattern_in_place_of_a_mask_is_not_taken_for_no_padding():
    class Pattern(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = encoder()

        def forward(self, x, attention_mask):
            hidden = ~attention_mask[:, None, :].expand(3, 7, 7).repeat_interleave(2, dim=0)
            return self.inner(x, mask=hidden)

    model = Pattern()
    with pytest.raises(ConversionError, match="takes a mask and was given none"):  # said before anything is replaced
        convert(model, CONFIG, **{**EVERYTHING, "example_inputs": (X, REAL)})


def test_the_mask_of_one_sequence_is_not_taken_for_the_others():
    torch.manual_seed(0)
    model = nn.Transformer(K, 2, 1, 1, 16, batch_first=True, dropout=0.0, dtype=torch.float64).eval()
    linears = {name for name, layer in model.named_modules() if name.endswith(("linear1", "linear2"))}
    keep = lambda layer, name: name in linears and name.startswith("encoder")  # noqa: E731
    convert(model, CONFIG, example_inputs=(X, X), filter_fn=keep)
    decoder = model.decoder.layers[0]
    decoder.linear1 = STLLinear.from_linear(decoder.linear1, CONFIG)
    decoder.linear1.padding = model.encoder.layers[0].linear1.padding
    PaddingMask.attach(decoder.linear1.padding, decoder)
    memory = model.encoder(X, src_key_padding_mask=~REAL)
    run = lambda tgt, **masks: model(X, tgt, src_key_padding_mask=~REAL, memory_key_padding_mask=~REAL, **masks)  # noqa: E731
    expected = decoder(X, memory, memory_key_padding_mask=~REAL)
    assert torch.equal(run(X), model.decoder.norm(expected))
    assert spread(lambda tgt: run(tgt, tgt_key_padding_mask=~REAL)) < 1e-12

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(K, K, dtype=torch.float64)

        def forward(self, x, attention_mask=None, decoder_attention_mask=None):
            return self.layer(x)

    both = Both()
    convert(both, CONFIG, example_inputs=X, filter_fn=lambda layer, name: True, force_mixing=["*"])
    both(X)
    with pytest.raises(ShapeError, match="two sequences"):
        both(X, attention_mask=REAL)


class Packed(nn.Module):
    """Takes what says that documents are packed."""

    def __init__(self, mixing):
        super().__init__()
        self.layer = STLLinear(K, K, config=STLConfig(tile=4, rank=24, mixing=mixing), dtype=torch.float64)
        self.layer.padding = PaddingMask()
        self.layer.padding.attach(self)

    def forward(self, x, attention_mask=None, position_ids=None, **kwargs):
        return self.layer(x)


STARTS = torch.arange(7).expand(3, 7)
IMAGE = torch.tensor([[0, 1, 2, 2, 2, 2, 3], [0, 1, 2, 2, 3, 3, 4], [0, 1, 2, 3, 2, 3, 4]])[:, None].expand(3, 3, 7)


@pytest.mark.parametrize("mixing", ["sequence", "causal"])
@pytest.mark.parametrize("packed", [
    {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(3, 7)},
    {"position_ids": torch.tensor([[5, 6, 7, 8, 0, 1, 2]])},
    {"position_ids": torch.tensor([[0, 0, 1, 2, 3, 4, 5]])},
    {"position_ids": torch.tensor([[0, 1, 2, 9, 10, 11, 12]])},
    {"position_ids": torch.zeros(3, 7, dtype=torch.long)},
    {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(3, 1, 7)},
    {"position_ids": torch.where(REAL, torch.tensor([0, 1, 0, 1, 2, 3, 4]), 0), "attention_mask": REAL},
    {"cu_seq_lens_q": torch.tensor([0, 3, 7])},
    {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 1]])},
    {"attention_mask": torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).expand(3, 1, 7, 7)},
], ids=["anew", "offset", "one row", "gap", "one place", "planes", "padding", "boundaries", "indices", "blocks"])  # fmt: skip
def test_packed_documents_are_refused(packed, mixing):
    with pytest.raises(ShapeError, match=r"packed|does not say which rows"):
        Packed(mixing)(X, **packed)


@pytest.mark.parametrize("mixing", ["sequence", "causal"])
@pytest.mark.parametrize("fine", [
    {"position_ids": STARTS},
    {"position_ids": STARTS[:1] + 100},
    {"position_ids": IMAGE},
    {"position_ids": torch.where(REAL, STARTS, 0), "attention_mask": REAL},
    {"position_ids": torch.where(REAL, STARTS, 1), "attention_mask": REAL.long()},
    {"cu_seq_lens_q": torch.tensor([0, 7])},
    {"seq_idx": torch.zeros(3, 7)},
    {"position_ids": None, "seq_idx": None},
], ids=["plain", "offset", "planes", "zeros", "ones", "boundaries", "indices", "none"])  # fmt: skip
def test_what_is_not_packed_is_not_refused(fine, mixing):
    Packed(mixing)(X, **fine)


def test_patterns_inside_a_with_are_refused_only_if_they_keep_neighbours_apart():
    model = Packed("sequence")
    blocks = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).bool().expand(3, 1, 7, 7)
    band = (torch.ones(7, 7).tril() - torch.ones(7, 7).tril(-3)).bool().expand(3, 1, 7, 7)
    padding = REAL[:, None, None, :] & REAL[:, None, :, None]
    with strassen_tile.padding(model, REAL):
        expected = model(X)
        for fine in (
            band,
            padding,
            padding.long(),
            torch.zeros(3, 1, 7, 7).masked_fill(~band, -torch.inf),
            REAL[:, None, None, :],
        ):
            assert torch.equal(model(X, attention_mask=fine), expected)
        for packed in (
            blocks,
            blocks.long(),
            blocks[:, 0],
            torch.zeros(3, 1, 7, 7).masked_fill(~blocks, torch.finfo().min),
        ):
            with pytest.raises(ShapeError, match="packed"):
                model(X, attention_mask=packed)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_packed_documents_are_refused_in_compiled_graphs(backend):
    torch._dynamo.reset()
    model = Packed("causal")
    whole = torch.compile(model, backend=backend, fullgraph=True)
    within = torch.compile(lambda x, ids: model(x, position_ids=ids) + 1, backend=backend, fullgraph=True)
    anew = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    for run in (lambda ids: whole(X, position_ids=ids), lambda ids: within(X, ids)):
        run(STARTS[:1])
        with pytest.raises((ShapeError, RuntimeError), match="packed"):
            run(anew)


@pytest.mark.parametrize("mask", [{"full_attention": None}, [[1, 1]], SCORES], ids=["dict", "list", "scores"])
def test_a_mask_that_does_not_say_which_rows_are_real_is_refused(mask):
    with pytest.raises(ShapeError, match=r"does not say which rows|pad on the right|negative"):
        Packed("sequence")(X, attention_mask=mask)


@pytest.mark.parametrize("at", [0, 6])
def test_a_mask_with_nan_says_so(at):
    mask = torch.ones(3, 7)
    mask[1, at] = float("nan")
    with pytest.raises(ShapeError, match="attention_mask has NaN"):
        Packed("sequence")(X, attention_mask=mask)
    with pytest.raises(ShapeError, match="src_key_padding_mask has NaN"):
        real_rows(1 - mask, "src_key_padding_mask")
