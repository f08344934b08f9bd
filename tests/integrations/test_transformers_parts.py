"""If these fail, a part of a converted model, or a model with a converted part, comes back with random layers."""

import json

import pytest
import torch

import strassen_tile as st
from strassen_tile.errors import CheckpointError, ConversionError

hf = pytest.importorskip("transformers")
from tiny_transformers import IDS, PIXELS, TEXT, built, outputs  # noqa: E402

APART = st.STLConfig(mixing="none")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
WORDS = {
    **SIZES,
    "vocab_size": 60,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PATCHES = {**SIZES, "image_size": 16, "patch_size": 4}


def stl_layers(model):
    return {name for name, layer in model.named_modules() if isinstance(layer, st.STLLinear)}


def clip():
    torch.manual_seed(0)
    config = hf.CLIPConfig(text_config=WORDS, vision_config={**PATCHES, "projection_dim": 16}, projection_dim=16)
    return hf.CLIPModel(config).eval()


def bart():
    torch.manual_seed(0)
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
             {"layers": 2, "attention_heads": 2, "ffn_dim": 48}.items()}  # fmt: skip
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    sizes = {"vocab_size": 60, "d_model": 32, "max_position_embeddings": 32, "forced_eos_token_id": None}
    return hf.BartForConditionalGeneration(hf.BartConfig(**sizes, **sides, **special)).eval()


def by_hand(model, folder):
    model.bert.encoder.layer[0].output.dense = st.STLLinear.from_linear(model.bert.encoder.layer[0].output.dense, APART)


def a_part(model, folder):
    st.convert(model.bert.encoder, APART)


def loaded(model, folder):
    other = built("bert")
    st.convert(other, APART)
    st.save_model(other, folder / "other")
    st.load_model(model, folder / "other")


def twice(model, folder):
    """Of another rank than the config that it was built from says."""
    st.convert(model, APART)
    model.save_pretrained(folder / "first")
    config = hf.AutoConfig.from_pretrained(folder / "first")
    model.__init__(config)
    st.convert(model.eval(), st.STLConfig(rank=5, mixing="none"))


def fewer(model, folder):
    st.convert(model, APART)
    del model.bert.encoder.layer[1]


@pytest.mark.parametrize("make", [by_hand, a_part, loaded, twice, fewer])
def test_what_is_there_is_written_down_when_it_is_saved(make, tmp_path):
    model = built("bert")
    make(model, tmp_path)
    layers = stl_layers(model)
    model.config.num_hidden_layers = len(model.bert.encoder.layer)
    model.eval().save_pretrained(tmp_path / "saved")
    again = hf.BertForMaskedLM.from_pretrained(tmp_path / "saved")
    assert stl_layers(again) == layers != set()
    assert torch.equal(outputs(again, TEXT), outputs(model, TEXT))


def test_a_dense_model_of_a_converted_ones_config_is_saved_as_dense(tmp_path):
    model = built("bert")
    st.convert(model, APART)
    dense = hf.BertForMaskedLM(model.config).eval()
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    model.save_pretrained(tmp_path / "stl")
    assert stl_layers(hf.BertForMaskedLM.from_pretrained(tmp_path / "stl")) == stl_layers(model)


@pytest.mark.parametrize(
    ("kind", "part", "inputs"),
    [
        ("CLIPVisionModel", "vision_model", PIXELS),
        ("CLIPVisionModelWithProjection", "vision_model", PIXELS),
        ("CLIPTextModel", "text_model", TEXT),
    ],
)
def test_a_tower_of_a_converted_model(kind, part, inputs, tmp_path):
    model = clip()
    st.convert(model, APART, filter_fn=lambda layer, name: "projection" not in name)
    model.save_pretrained(tmp_path / "whole")
    tower = getattr(hf, kind).from_pretrained(tmp_path / "whole")
    assert len(stl_layers(tower)) == 12
    with torch.no_grad():
        expected = getattr(model, part)(**inputs).last_hidden_state
        assert torch.equal(tower(**inputs).last_hidden_state, expected)
        tower.save_pretrained(tmp_path / "tower")  # as a model of its own, with a head or without
        again = getattr(hf, kind.removesuffix("WithProjection")).from_pretrained(tmp_path / "tower")
        assert torch.equal(again(**inputs).last_hidden_state, expected)
    whole = hf.CLIPModel.from_pretrained(tmp_path / "whole")
    assert stl_layers(whole) == stl_layers(model)


def test_a_head_that_the_towers_config_does_not_know_of_is_refused(tmp_path):
    model = clip()
    st.convert(model, APART, filter_fn=lambda layer, name: True)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="visual_projection is an STL layer in the checkpoint"):
        hf.CLIPVisionModelWithProjection.from_pretrained(tmp_path)


def test_configs_inside_stay_those_of_the_models_inside():
    model = clip()
    before = model.config
    st.convert(model, APART)
    assert model.config is not before and not hasattr(before.vision_config, "quantization_config")
    assert model.config.vision_config is model.vision_model.config
    model.config.text_config.vocab_size = 61
    assert model.text_model.config.vocab_size == 61


def test_towers_follow_masks_of_their_own():
    """The text has padding and 17 rows, as many as the image: that is not said of the image."""
    model, length = clip(), 17
    ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(length) < torch.tensor([length, 9])[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask, **PIXELS}
    st.convert(model, st.STLConfig(rank=20), example_inputs=inputs, filter_fn=lambda layer, name: "vision" in name)
    with torch.no_grad():
        whole = model(**inputs).image_embeds
        alone = model.get_image_features(**PIXELS)
        alone = getattr(alone, "pooler_output", alone)
    torch.testing.assert_close(whole, alone / alone.norm(dim=-1, keepdim=True))


def test_the_decoder_of_a_converted_encoder_decoder_model(tmp_path):
    model = bart()
    st.convert(model, APART)
    model.save_pretrained(tmp_path)
    decoder = hf.BartForCausalLM.from_pretrained(tmp_path)
    assert len(stl_layers(decoder)) == 20
    layer = decoder.model.decoder.layers[1].fc1
    assert torch.equal(layer.encoded_weight, model.model.decoder.layers[1].fc1.encoded_weight)
    with pytest.raises(CheckpointError, match="has none of the"):
        hf.BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["ModernBert", "NomicBert"])
def test_models_that_start_or_store_their_layers_in_ways_of_their_own(kind, tmp_path):
    """ModernBERT starts weights by itself; NomicBERT's q, k and v are one matrix in files."""
    config = getattr(hf, f"{kind}Config")(**{**WORDS, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2})
    torch.manual_seed(0)
    model = getattr(hf, f"{kind}Model")(config).eval()
    st.convert(model, st.STLConfig(rank=20), example_inputs=TEXT)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert stl_layers(again) == stl_layers(model) != set()
    assert torch.equal(outputs(again, TEXT), outputs(model, TEXT))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "again"), TEXT), outputs(model, TEXT))


def test_layers_of_an_adapter_stay_what_they_are(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(built("llama"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    done = st.convert(model, APART)
    assert done.converted and not any("q_proj" in name for name in done.converted)
    assert all("adapter" in done.skipped[name] for name in done.skipped if "q_proj" in name)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-5)


def test_padding_said_by_lengths_is_refused():
    """XLM zeroes padding between its blocks; how much of it there is changes what a real row sees inside of one."""
    torch.manual_seed(0)
    model = hf.XLMModel(
        hf.XLMConfig(vocab_size=60, emb_dim=32, n_layers=2, n_heads=2, max_position_embeddings=32)
    ).eval()
    with pytest.raises(ConversionError, match="lengths says which rows are padding, and is not followed"):
        st.convert(model, st.STLConfig(), example_inputs={"input_ids": IDS, "lengths": torch.tensor([11, 7])})
