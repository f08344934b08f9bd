"""Transformers' architectures with random weights, with inputs and how rows may mix. In float32."""

import torch
import transformers as hf

IDS = torch.randint(1, 60, (2, 11), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(11) < torch.tensor([11, 7])[:, None]).long()
TEXT = {"input_ids": IDS, "attention_mask": MASK}
PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
_SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 32,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
_T5 = {
    "vocab_size": 60,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_VIT = {
    "image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "num_labels": 3,
}  # fmt: skip
# name → (class, config, mixing, inputs)
MODELS = {
    "bert": (hf.BertForMaskedLM, lambda: hf.BertConfig(**_SIZES), "sequence", TEXT),
    "vit": (hf.ViTForImageClassification, lambda: hf.ViTConfig(**_VIT), "sequence", PIXELS),
    "llama": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**_GROUPED), "none", TEXT),
    "llama, tied": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**_GROUPED, tie_word_embeddings=True), "causal", TEXT),
    "mistral": (hf.MistralForCausalLM, lambda: hf.MistralConfig(**_GROUPED, sliding_window=8), "none", TEXT),
    "qwen2": (hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**_GROUPED, tie_word_embeddings=True), "none", TEXT),
    "qwen3": (hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**_GROUPED, head_dim=16), "none", TEXT),
    "t5 encoder": (hf.T5EncoderModel, lambda: hf.T5Config(**_T5), "sequence", TEXT),
    "t5": (
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(**_T5),
        "none",
        {**TEXT, "decoder_input_ids": IDS[:, :5]},
    ),
}


def built(name, **changes):
    """A dense model with its own random weights."""
    kind, config, _, _ = MODELS[name]
    torch.manual_seed(0)
    config = config()
    for key, value in changes.items():
        setattr(config, key, value)
    return kind(config).eval()


def outputs(model, inputs):
    """Its logits, or its last hidden state."""
    with torch.no_grad():
        found = model(**{k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()})
    return found.logits if "logits" in found else found.last_hidden_state
