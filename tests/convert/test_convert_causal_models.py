"""If these fail, a language model converted with mixing both ways looks at the tokens it is to predict."""

import pytest
import torch
from tiny_models import APART, CAUSAL, IDS, MASK, SEQUENCE, VOCABULARY, Tokens, bert, llama, t5
from torch import nn

from strassen_tile import STLConfig, STLLinear, convert
from strassen_tile.errors import ConversionError, ShapeError

EXAMPLES = {"input_ids": IDS}


def sees_the_future(logits):
    """Tokens whose change alters an earlier token's logits: logits(ids) → (B, N, …)."""
    before, seen = logits(IDS), []
    for i in range(1, IDS.shape[1]):
        ids = IDS.clone()
        ids[:, i] = (ids[:, i] + 1) % VOCABULARY
        if not torch.equal(logits(ids)[:, :i], before[:, :i]):
            seen.append(i)
    return seen


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


@pytest.mark.parametrize(
    "make",
    [
        llama,
        lambda: llama("LlamaModel"),
        lambda: Wrapped(llama()),
        lambda: bert("BertLMHeadModel", is_decoder=True),
    ],
    ids=["llama", "base model", "wrapped", "decoder"],
)
def test_causal_language_models_are_refused(make):
    pytest.importorskip("transformers")
    model = make()
    with pytest.raises(ConversionError, match=r"input_ids\[0, 1\].*mixing='none'.*mixing='causal'"):
        convert(model, SEQUENCE, example_inputs=EXAMPLES)
    with pytest.raises(
        ConversionError, match=r"pass example_inputs.*example_inputs=model.dummy_inputs|pass example_inputs"
    ):
        convert(model, SEQUENCE)
    assert not any(isinstance(module, STLLinear) for module in model.modules())


def test_what_a_model_brings_to_be_tried_on_is_named():
    pytest.importorskip("transformers")
    model = bert()
    with pytest.raises(ConversionError, match=r"example_inputs=model\.dummy_inputs"):
        convert(model, SEQUENCE)
    assert convert(model, SEQUENCE, example_inputs=model.dummy_inputs).converted


@pytest.mark.parametrize("config", [APART, CAUSAL], ids=["none", "causal"])
def test_llama_takes_the_mixings_that_do_not_look_ahead(config):
    pytest.importorskip("transformers")
    model = llama()
    assert len(convert(model, config, example_inputs=EXAMPLES).converted) == 14
    assert sees_the_future(lambda ids: model(ids).logits) == []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert sees_the_future(lambda ids: model.eval()(ids).logits) == []


def test_asked_for_by_name_llama_looks_ahead():
    pytest.importorskip("transformers")
    model = llama()
    done = convert(model, SEQUENCE, example_inputs=EXAMPLES, force_mixing=["model.layers.*"])
    assert len(done.converted) == 14
    assert sees_the_future(lambda ids: model(ids).logits) != []


def test_plain_causal_model_is_found_by_what_it_does():
    model = Tokens(backwards_only=True)
    assert sees_the_future(model) == []
    for examples in (
        IDS,
        (IDS,),
        {"ids": IDS},
        IDS.int(),
        IDS[:1],
        torch.full_like(IDS, VOCABULARY - 1),
        torch.zeros_like(IDS),
    ):
        with pytest.raises(ConversionError, match=r"would make output 0.* depend on"):
            convert(model, SEQUENCE, example_inputs=examples)
    assert list(convert(model, CAUSAL, example_inputs=IDS).converted) == ["inner", "outer"]
    assert sees_the_future(model) == []
    model = Tokens(backwards_only=True)
    convert(model, SEQUENCE, example_inputs=IDS, force_mixing=["*"])
    assert sees_the_future(model) != []


def test_models_that_read_both_ways_are_not_taken_for_causal_ones():
    assert convert(Tokens(backwards_only=False), SEQUENCE, example_inputs=IDS).converted
    pytest.importorskip("transformers")
    padded = torch.cat(
        [IDS, torch.zeros(3, 4, dtype=torch.long)], dim=1
    )  # to a fixed length: the last tokens do nothing
    mask = torch.cat([MASK, torch.zeros(3, 4, dtype=torch.long)], dim=1)
    examples = {"input_ids": padded, "attention_mask": mask}
    assert convert(bert(), SEQUENCE, example_inputs=examples).converted


def test_one_row_tiles_need_no_refusal():
    model = Tokens(backwards_only=True)
    assert convert(model, STLConfig(tile=(1, 4, 4), rank=8), example_inputs=IDS).converted
    assert sees_the_future(model) == []


def test_decoder_of_an_encoder_decoder_model_keeps_its_rows_apart():
    pytest.importorskip("transformers")
    examples = {**EXAMPLES, "decoder_input_ids": IDS[:, :5]}
    model = t5()
    done = convert(model, SEQUENCE, example_inputs=examples)
    reads = {name for name in done.converted if name.startswith("decoder.")}
    assert reads == {
        f"decoder.block.{i}.layer.1.EncDecAttention.{part}" for i in (0, 1) for part in ("k", "v")
    }  # of source rows
    assert len(done.converted) == 12 + len(reads)
    assert sees_the_future(lambda ids: model(IDS, decoder_input_ids=ids).logits) == []
    model = t5()
    first = lambda module, name: name.startswith("decoder.block.0")  # noqa: E731 - enough to see it
    convert(model, SEQUENCE, example_inputs=examples, filter_fn=first, force_mixing=["decoder.*"])
    assert sees_the_future(lambda ids: model(IDS, decoder_input_ids=ids).logits) != []


@torch.no_grad()
def test_masks_of_encoder_and_decoder_are_not_mixed_up():
    pytest.importorskip("transformers")
    model = t5()
    convert(model, CAUSAL, example_inputs={**EXAMPLES, "decoder_input_ids": IDS}, force_mixing=["*"])
    inputs = {"input_ids": IDS[2:], "attention_mask": torch.ones_like(IDS[2:])}
    written, real = IDS[1:2], MASK[2:]  # as long as the source, and three tokens of it real
    padded = model(**inputs, decoder_input_ids=written, decoder_attention_mask=real).logits[:, :3]
    alone = model(**inputs, decoder_input_ids=written[:, :3]).logits
    torch.testing.assert_close(padded, alone, rtol=1e-10, atol=1e-10)


def test_plain_encoder_decoder_is_found_by_what_it_does():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.reader, self.writer = Tokens(backwards_only=False), Tokens(backwards_only=True)

        def forward(self, source, target):
            return self.writer(target) + self.reader(source).mean(dim=1, keepdim=True)

    done = convert(Pair(), SEQUENCE, example_inputs=(IDS, IDS[:, :5]))
    assert list(done.converted) == ["reader.inner", "reader.outer", "reader.words"]
    assert all("would" in done.skipped[f"writer.{name}"] for name in ("inner", "outer", "words"))


def test_cached_generation_is_refused_where_tiles_would_be_torn():
    pytest.importorskip("transformers")
    model = llama()
    convert(model, CAUSAL, example_inputs=EXAMPLES)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    with pytest.raises(ShapeError, match=r"a cache holds 7 rows.*use_cache=False"):
        model.generate(IDS, **options)
    written = model.generate(IDS, use_cache=False, **options)
    assert torch.equal(model(written).logits[:, 6:-1].argmax(-1), written[:, 7:])
    whole = model(IDS).logits  # a prompt may be read in chunks of whole tiles
    first = model(IDS[:, :4], use_cache=True)
    second = model(IDS[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole, rtol=1e-10, atol=1e-10)


def test_cached_generation_is_free_where_rows_are_apart():
    pytest.importorskip("transformers")
    model = llama()
    convert(model, APART)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **options), model.generate(IDS, use_cache=False, **options))


@pytest.mark.parametrize("how", ["mask", "is_causal", "floats"])
def test_causal_models_of_floats_are_found_by_what_they_do(how):
    """No ids, no names: torch's encoder under a mask among its arguments, or one that it makes itself."""

    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.body, self.out = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 3)

        def forward(self, x, mask=None):
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) if mask is None else mask
            return self.out(self.body(x, mask=mask, is_causal=how == "is_causal")).relu()

    x = torch.randn(2, 9, 8, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    examples = (x,) if how == "floats" else (x, mask)
    with pytest.raises(ConversionError, match="mixing its rows would make output 0"):
        convert(Causal().double(), SEQUENCE, example_inputs=examples)
    model = Causal().double().eval()
    assert set(convert(model, CAUSAL, example_inputs=examples).converted) == {
        "body.layers.0.linear1", "body.layers.0.linear2", "out"
    }  # fmt: skip
    before = model(x, mask)
    x[:, 5] += 1
    assert torch.equal(model(x, mask)[:, :5], before[:, :5])
