"""If these fail, an architecture of transformers that users bring is converted wrongly, or not at all."""

import pytest
import torch
from tiny_models import APART, IDS, MASK, SEQUENCE, bert, distilbert, gpt2, t5, vit

from strassen_tile import STLConfig, STLLinear, convert
from strassen_tile.errors import ConversionError

hf = pytest.importorskip("transformers")
TEXT = {"input_ids": IDS, "attention_mask": MASK}
PIXELS = {"pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64)}
HEAD = "a head: it makes the model's output"
EXACT = STLConfig(tile=2, rank=7, basis="strassen")
MODELS = {
    "bert": (bert, TEXT, {"classifier": HEAD}),
    "distilbert": (distilbert, TEXT, {"classifier": HEAD, "pre_classifier": HEAD}),
    "vit": (vit, PIXELS, {"classifier": HEAD}),
}


@pytest.mark.parametrize("name", MODELS)
def test_exact_conversion_gives_the_same_logits(name):
    make, examples, heads = MODELS[name]
    model = make()
    expected = model(**examples).logits
    done = convert(model, EXACT, example_inputs=examples)
    assert {key: value for key, value in done.skipped.items() if value == HEAD} == heads
    torch.testing.assert_close(model(**examples).logits, expected, rtol=1e-9, atol=1e-9)
    done.undo()
    assert torch.equal(model(**examples).logits, expected)


def test_pooler_is_fed_one_row_a_sample():
    assert (
        convert(bert(), SEQUENCE, example_inputs=TEXT)
        .skipped["bert.pooler.dense"]
        .startswith("fed a 2-D input (3, 16)")
    )
    assert "bert.pooler.dense" in convert(bert(), APART, example_inputs=TEXT).converted


def test_masked_language_model_keeps_its_tied_head():
    model = bert("BertForMaskedLM")
    done = convert(model, SEQUENCE, example_inputs=TEXT)
    assert done.skipped == {"cls.predictions.decoder": "its weight is tied to bert.embeddings.word_embeddings.weight"}
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_untied_head_is_found_by_get_output_embeddings():
    model = bert("BertForMaskedLM", tie_word_embeddings=False)
    assert convert(model, SEQUENCE, example_inputs=TEXT).skipped == {"cls.predictions.decoder": HEAD}
    assert isinstance(model.cls.predictions.decoder, torch.nn.Linear)


def test_t5_asks_its_layers_for_a_weights_dtype():
    model = t5()
    examples = {**TEXT, "decoder_input_ids": IDS[:, :4]}
    expected = model(**examples).logits
    done = convert(model, STLConfig(tile=(1, 2, 2), rank=4, basis="naive"), example_inputs=examples)
    assert len(done.converted) == 32
    torch.testing.assert_close(model(**examples).logits, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(
        model.generate(IDS, max_new_tokens=4, do_sample=False),
        model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=False),
    )


def test_layers_of_gpt2_are_named_though_they_are_no_linear_ones():
    with pytest.raises(
        ConversionError, match=r"lm_head: its weight is tied.*4 layers \(.*0\.attn\.c_attn, .*\): is a Conv1D"
    ):
        convert(gpt2(), APART)


def test_bfloat16_model_trains():
    model = vit().bfloat16()
    pixels = PIXELS["pixel_values"].bfloat16()
    done = convert(model, SEQUENCE, example_inputs={"pixel_values": pixels})
    model.train()(pixels, labels=torch.tensor([0, 1])).loss.backward()
    for layer in done.converted.values():
        assert isinstance(layer, STLLinear)
        assert all(p.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in layer.parameters())


def test_save_and_load_of_the_state(tmp_path):
    models = [vit(), vit()]
    for model in models:
        convert(model, SEQUENCE, example_inputs=PIXELS)
    torch.save(models[0].state_dict(), tmp_path / "vit.pt")
    models[1].load_state_dict(torch.load(tmp_path / "vit.pt", weights_only=True))
    assert torch.equal(models[0](**PIXELS).logits, models[1](**PIXELS).logits)
