"""If these fail, a table is of a model with random layers, of another one than it says, or a traceback stands in its place."""

import copy

import pytest
import torch
import transformers as hf

import strassen_tile as st
from strassen_tile.errors import ConfigError
from strassen_tile.integrations.pretrained import Pretrained, pretrained
from strassen_tile.integrations.trial import check_tokens, digest, try_out

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}


def decoder(**more):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, max_position_embeddings=32, **more)).eval()


def encoder():
    return hf.BertModel(hf.BertConfig(**SIZES, max_position_embeddings=32)).eval()


def damaged():
    model = decoder()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    return model


def converted():
    model = decoder()
    st.convert(model, st.STLConfig(mixing="none"), filter_fn=lambda module, name: ".layers.0." in name)
    return model


def found(model, *, decodes=True, missing=()):
    return Pretrained(model, None, decodes, "it", missing)


@pytest.mark.parametrize(
    ("make", "context", "missing", "said"),
    [
        (decoder, 33, (), "model=it: has 32 positions, and context=33"),
        (damaged, 8, (), "its own outputs are not finite"),
        (converted, 8, (), "has STL layers already"),
        (decoder, 8, ("a", "b"), r"its files lack 2 tensors, which would be random \(a, b …\)"),
        (
            lambda: hf.ViTModel(hf.ViTConfig(**SIZES, image_size=8, patch_size=4)).eval(),
            8,
            (),
            "does not run on pieces of 8",
        ),
    ],
)
def test_what_is_unsound_is_refused(make, context, missing, said):
    with pytest.raises(ConfigError, match=said):
        try_out(found(make(), missing=missing), context)


def test_a_pooler_that_nothing_depends_on_is_frozen_and_may_be_missing():
    """Several processes would wait for its gradients."""
    model = encoder()
    try_out(found(model, decodes=False, missing=("pooler.dense.weight", "pooler.dense.bias")), 16)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"pooler.dense.weight", "pooler.dense.bias"}
    with pytest.raises(ConfigError, match=r"lack 1 tensors, which would be random \(encoder\.layer\.0"):
        try_out(found(encoder(), decodes=False, missing=("encoder.layer.0.output.dense.weight",)), 16)


def test_a_decoder_is_left_as_it_is():
    model = decoder()
    before = copy.deepcopy(model.state_dict())
    try_out(found(model), 32)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_every_token_has_an_embedding():
    check_tokens(found(decoder()), [torch.tensor([0, 39]), torch.tensor([], dtype=torch.long)])
    with pytest.raises(
        ConfigError, match=r"its tokenizer does not fit: the text has a token 40, and there are 40 embeddings"
    ):
        check_tokens(found(decoder()), [torch.tensor([0]), torch.tensor([40])])


def test_a_digest_is_of_weights_and_of_what_is_computed_with_them(tmp_path):
    torch.manual_seed(0)
    model = decoder()
    model.save_pretrained(tmp_path)
    back = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert digest(back) == digest(model)
    with torch.no_grad():
        back.lm_head.weight[3, 3] += 1e-3
    assert digest(back) != digest(model)
    other = decoder(rms_norm_eps=1e-3)
    other.load_state_dict(model.state_dict())
    assert digest(other) != digest(model)


def test_kinds_that_neither_decode_nor_encode_are_refused(tmp_path):
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    hf.T5Config(**sizes).save_pretrained(tmp_path / "t5")
    hf.ViTConfig(hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path / "vit")
    for name, said in (("t5", "reads one text and writes another"), ("vit", "is of no text")):
        with pytest.raises(ConfigError, match=said):
            pretrained(str(tmp_path / name))
