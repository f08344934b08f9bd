"""If these fail, text generated with a cache by a model with token mixes is not that of the model."""

import copy

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, DynamicCache

from strassen_tile import STLConfig, baselines, check_mixing, convert
from strassen_tile.errors import ShapeError

_SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
_NEOX = {"use_parallel_residual": True, "attention_dropout": 0.0, "hidden_dropout": 0.0}
MODELS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**_SIZES, num_key_value_heads=1)),
    "gpt-neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**_SIZES, **_NEOX)),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**_SIZES, num_key_value_heads=1, sliding_window=6)),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**_SIZES, num_key_value_heads=1, head_dim=16)),
}
IDS = torch.randint(1, 60, (2, 13), generator=torch.Generator().manual_seed(0))
CONFIG = STLConfig(mixing="none", token_mix="causal")


def built(name="llama", method=None):
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = kind(copy.deepcopy(config)).eval()
    examples = {"input_ids": IDS}
    done = method.apply(model, examples, None) if method else convert(model, CONFIG, example_inputs=examples)
    for layer in done.converted.values():
        (layer.mix if method else layer.token_mix).weight.data.normal_(0, 0.5)
    return model


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_steps_and_chunks_come_to_the_whole(name):
    model = built(name)
    whole = model(IDS).logits
    for cuts in ([5, *range(6, 14)], [1, 2, 4, 13], [13]):
        cache, parts, start = None, [], 0
        for end in cuts:
            out = model(IDS[:, start:end], past_key_values=cache)
            cache, start = out.past_key_values, end
            parts.append(out.logits)
        close(torch.cat(parts, dim=1), whole)
    with torch.no_grad():  # the mix matters
        for module in model.modules():
            if hasattr(module, "token_mix") and module.token_mix is not None:
                module.token_mix.weight.zero_()
    assert not torch.allclose(model(IDS).logits, whole, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache_is_that_without(name):
    model = built(name)
    options = {"max_new_tokens": 9, "do_sample": False}
    greedy = model.generate(IDS, use_cache=False, **options)
    assert torch.equal(model.generate(IDS, **options), greedy)
    beams = model.generate(IDS, use_cache=False, num_beams=3, **options)
    assert torch.equal(model.generate(IDS, num_beams=3, **options), beams)
    if name != "mistral":  # whose cache of a window cannot be cropped by itself
        guessed = model.generate(IDS[:1], prompt_lookup_num_tokens=3, **options)
        assert torch.equal(guessed, greedy[:1])
    mask = torch.tensor([[0] * 3 + [1] * 13, [1] * 16])
    longer = torch.cat([IDS[1:, :3], IDS[1:]], dim=1)
    batch = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1]], dim=1), longer])
    left = model.generate(batch, attention_mask=mask, **options)
    assert torch.equal(left[0, 3:], greedy[0])
    assert torch.equal(left[1:], model.generate(longer, **options))


@torch.no_grad()
def test_a_past_of_states_is_refused():
    """States stand for rows that a layer was fed, and do not tell what they were: each step would begin anew, unsaid."""
    torch.manual_seed(0)
    model = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    convert(model, CONFIG, example_inputs={"input_ids": IDS})
    model(IDS)
    with pytest.raises(ShapeError, match=r"run whole sequences \(use_cache=False\)"):
        model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False, use_cache=False).shape == (2, 16)
    with pytest.raises(ShapeError, match="its state does not hold rows"):  # as RWKV is called
        built()(IDS, state=[torch.zeros(1)], use_cache=True)


@torch.no_grad()
def test_a_paged_cache_is_refused():
    with pytest.raises(ShapeError, match="batched continuously"):
        built()(IDS, write_index=[torch.arange(13)])


@torch.no_grad()
def test_a_static_cache_where_layers_are_told_of_their_kind():
    """Masks then come in a dict by kind of layer, and None where nothing is hidden."""
    model, options = built("qwen3"), {"max_new_tokens": 9, "do_sample": False}
    expected = model.generate(IDS, use_cache=False, **options)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **options), expected)


@torch.no_grad()
def test_static_caches_and_masks_of_who_sees_whom():
    model, options = built(), {"max_new_tokens": 9, "do_sample": False}
    expected = model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **options), expected)
    mask = torch.tensor([[0] * 3 + [1] * 13, [0] * 3 + [1] * 13])
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], dim=1)
    left = model.generate(padded, attention_mask=mask, cache_implementation="static", **options)
    assert torch.equal(left[:, 3:], expected)
    causal = torch.ones(1, 1, 13, 13).tril().bool()
    blocks = causal & (torch.arange(13)[:, None] // 6 == torch.arange(13) // 6)
    positions = torch.tensor([[*range(6), *range(6), 0]])
    for shown in (blocks, torch.where(blocks, 0.0, torch.finfo(torch.float32).min)):
        found = model(IDS, attention_mask=shown.expand(2, 1, 13, 13), position_ids=positions, use_cache=False).logits
        close(found[:, 6:12], model(IDS[:, 6:12]).logits)
    ones = blocks.float().expand(
        2, 1, 13, 13
    )  # 1 and 0, as some say it; who adds it to scores would have another model
    seen = []
    model.model.layers[0].self_attn.q_proj.token_mix.register_forward_pre_hook(
        lambda m, args: seen.append(args[1].current())
    )
    model(IDS, attention_mask=ones, position_ids=positions, use_cache=False)
    assert seen[0].unique(dim=0).tolist() == [[1] * 6 + [2] * 6 + [3]]
    odd = causal & ~torch.eye(13).roll(2, 0).bool()
    with pytest.raises(ShapeError, match="a token mix cannot follow that"):
        model(IDS, attention_mask=odd, use_cache=False)


@torch.no_grad()
def test_any_method_is_decoded():
    model = built(method=baselines.mixed(baselines.low_rank(0.5), "causal"))
    whole = model(IDS).logits
    out = model(IDS[:, :7])
    close(model(IDS[:, 7:], past_key_values=out.past_key_values).logits, whole[:, 7:])
    assert check_mixing(model, {"input_ids": IDS})


@torch.no_grad()
def test_what_happens_to_a_cache_happens_to_its_rows():
    model = built()
    whole = model(IDS).logits
    cache = model(IDS[:, :9], past_key_values=DynamicCache()).past_key_values
    twin = copy.deepcopy(cache)
    twin.reorder_cache(torch.tensor([1, 1]))
    close(model(IDS[[1, 1], 9:], past_key_values=twin).logits, whole[[1, 1], 9:])
    twin = copy.deepcopy(cache)
    twin.batch_select_indices(torch.tensor([1]))
    close(model(IDS[1:, 9:], past_key_values=twin).logits, whole[1:, 9:])
    twin = copy.deepcopy(cache)
    twin.batch_repeat_interleave(2)
    close(model(IDS[[0, 0, 1, 1], 9:], past_key_values=twin).logits, whole[[0, 0, 1, 1], 9:])
    twin = copy.deepcopy(cache)
    twin.crop(-3)
    close(model(IDS[:, 6:], past_key_values=twin).logits, whole[:, 6:])
    twin = copy.deepcopy(cache)
    twin.reset()
    close(model(IDS, past_key_values=twin).logits, whole)
    close(model(IDS[:, 9:], past_key_values=cache).logits, whole[:, 9:])  # the copies' changes are theirs
    other = built("llama")
    with pytest.raises(ShapeError, match="filled by another model, or in training mode, or under"):
        other(IDS[:, 9:], past_key_values=model.train()(IDS[:, :9]).past_key_values)
    long = torch.randint(1, 60, (2, 50), generator=torch.Generator().manual_seed(1))
    cache = model.eval()(long).past_key_values
    cache.crop(-40)
    with pytest.raises(ShapeError, match="cropped by at most the 32 last rows"):
        model(IDS, past_key_values=cache)


@torch.no_grad()
def test_a_symmetric_mix_wants_the_whole_sequence():
    model = built()
    for module in model.modules():
        if getattr(module, "token_mix", None) is not None:
            module.token_mix.kind = "symmetric"
    cache = model(IDS).past_key_values
    with pytest.raises(ShapeError, match="symmetric token mix wants the whole sequence"):
        model(IDS[:, :1], past_key_values=cache)


@torch.no_grad()
def test_packed_documents_stay_apart():
    model = built()
    packed = torch.cat([IDS[:1, :6], IDS[1:, :7]], dim=1)
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
    found = model(packed, position_ids=positions, use_cache=False).logits
    close(found[:, :6], model(IDS[:1, :6]).logits)
    close(found[:, 6:], model(IDS[1:, :7]).logits)


@torch.no_grad()
@pytest.mark.parametrize("positions", [[0, 1, 2, 3, 9, 10, 11, 12], [0] * 8], ids=["a gap", "all at one"])
def test_positions_that_transformers_takes_for_documents_keep_them_apart(positions):
    """Whatever is not the next position begins a document: earlier ones are seen by nothing of it, dense or mixed."""
    model, other = built(), IDS[:1, :8].clone()
    other[:, :4] = torch.tensor([7, 8, 9, 10])
    options = {"position_ids": torch.tensor([positions]), "use_cache": False}
    assert torch.equal(model(IDS[:1, :8], **options).logits[:, 4:], model(other, **options).logits[:, 4:])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["padding", "documents"])
def test_a_call_on_a_cache_does_not_see_what_its_mask_hides(kind):
    """Rows of the past that are hidden, or another document's: by the mask of the call, whatever the earlier one's said."""
    model, n = built(), 12
    if kind == "padding":
        mask = torch.ones(2, n, dtype=torch.long)
        mask[:, 5:8] = 0
        first, second, whole = {}, {"attention_mask": mask}, {"attention_mask": mask}
    else:
        document = torch.tensor([0] * 7 + [1] * 5)
        seen = ((document[:, None] == document) & torch.ones(n, n).tril().bool()).expand(2, 1, n, n)
        at = torch.tensor([[*range(7), *range(5)]] * 2)
        first = {"attention_mask": seen[:, :, :8, :8], "position_ids": at[:, :8]}
        second = {"attention_mask": seen[:, :, 8:], "position_ids": at[:, 8:]}
        whole = {"attention_mask": seen, "position_ids": at}
    changed, other = IDS[:, :n].clone(), slice(5, 8) if kind == "padding" else slice(4, 7)
    changed[:, other] = changed[:, other] % 59 + 1
    found = []
    for ids in (IDS[:, :n], changed):
        cache = model(ids[:, :8], use_cache=True, **first).past_key_values
        found.append(model(ids[:, 8:], past_key_values=cache, **second).logits)
    assert torch.equal(*found)
    close(found[0], model(IDS[:, :n], use_cache=False, **whole).logits[:, 8:])


@torch.no_grad()
@pytest.mark.parametrize("end", [12, 10])
@pytest.mark.parametrize("filler", ["dense", "compiled", "itself"])
def test_a_cropped_cache_that_another_call_wrote_to_is_refused(filler, end):
    model, ids = built(), IDS[:, :12].clone()
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(-6)
    ids[:, 6:] = ids[:, 6:].flip(1)
    dense = MODELS["llama"][0](MODELS["llama"][1]).eval()
    fill = {"dense": dense, "compiled": torch.compile(model, backend="eager"), "itself": model}[filler]
    fill(ids[:, 6:end], past_key_values=cache)
    more = torch.cat([ids[:, :end], IDS[:, :1]], dim=1)
    if filler == "itself":
        close(model(more[:, end:], past_key_values=cache).logits, model(more, use_cache=False).logits[:, end:])
    else:
        with pytest.raises(ShapeError, match="written by another model"):
            model(more[:, end:], past_key_values=cache)


@torch.no_grad()
def test_saved_reloaded_and_trained(tmp_path):
    model = built()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(IDS, **options), model.generate(IDS, use_cache=False, **options))
    with torch.enable_grad():
        loaded.train().gradient_checkpointing_enable()
        loaded(IDS, labels=IDS).loss.backward()
        again = model.train()(IDS, labels=IDS).loss
        again.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    mixes = [n for n in grads if "token_mix" in n]
    assert len(mixes) == 14
    for name, parameter in loaded.named_parameters():
        close(parameter.grad, grads[name])
