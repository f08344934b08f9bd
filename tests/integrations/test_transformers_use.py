"""If these fail, a converted model that was loaded does not train, generate or take adapters as its dense one does."""

import copy

import pytest
import torch

import strassen_tile as st
from strassen_tile.errors import ShapeError

hf = pytest.importorskip("transformers")
from tiny_transformers import IDS, MASK, MODELS, TEXT, built, outputs  # noqa: E402


def loaded(name, folder, **options):
    kind, _, mixing, inputs = MODELS[name]
    model = built(name)
    st.convert(model, st.STLConfig(**{"mixing": mixing, **options}), example_inputs=inputs)
    model.save_pretrained(folder)
    return kind.from_pretrained(folder)


def data():
    generator = torch.Generator().manual_seed(3)
    return [
        {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        for ids in torch.randint(1, 60, (12, 9), generator=generator)
    ]


def trainer(model, folder, **options):
    arguments = {
        "per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "seed": 1, "disable_tqdm": True, **options,
    }  # fmt: skip
    return hf.Trainer(model, hf.TrainingArguments(str(folder), **arguments), train_dataset=data())


def test_trainer_trains_resumes_and_its_checkpoints_load(tmp_path):
    model = loaded("llama", tmp_path / "start")
    again = copy.deepcopy(model)
    layer = model.model.layers[0].mlp.up_proj
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    done = trainer(model, tmp_path / "run")
    done.train()
    assert all(not torch.equal(p, before[n]) for n, p in layer.named_parameters())
    trainer(again, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, msg=name)
    third = hf.LlamaForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert torch.equal(outputs(third, TEXT), outputs(model.eval(), TEXT))


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradient_checkpointing_gives_the_same_weights(reentrant, tmp_path):
    model = loaded("bert", tmp_path / "start", rank=20)
    plain = copy.deepcopy(model)
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}, "max_steps": 2, "save_steps": 9}
    trainer(model, tmp_path / "a", gradient_checkpointing=True, **options).train()
    trainer(plain, tmp_path / "b", max_steps=2, save_steps=9).train()
    for (name, one), two in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_cached_text_is_the_text_without_a_cache(name, tmp_path):
    """Unequal lengths, padding on either side."""
    model = loaded(name, tmp_path).double()
    for side in ("left", "right"):
        ids, mask = (t.clone() for t in (IDS, MASK))
        if side == "left":
            ids[1], mask[1] = ids[1].roll(4), mask[1].flip(0)
        options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
        cached = model.generate(ids, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
        if side == "left":  # as it is alone; on the right, generate itself goes on behind the padding
            alone = model.generate(ids[1:, 4:], **{**options, "attention_mask": mask[1:, 4:]})
            assert torch.equal(alone[:, 7:], cached[1:, 11:])


def test_causal_tiles_refuse_a_cache_and_generate_without(tmp_path):
    model = loaded("llama, tied", tmp_path)
    with pytest.raises(ShapeError, match=r"use_cache=False"):
        model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert model.generate(IDS[:1], max_new_tokens=4, do_sample=False, use_cache=False, pad_token_id=0).shape == (1, 15)


def test_documents_packed_by_a_collator_are_refused_where_rows_mix(tmp_path):
    model = loaded("llama, tied", tmp_path)
    batch = hf.DataCollatorWithFlattening(return_position_ids=True)(
        [{"input_ids": [1, 2, 3, 4, 5]}, {"input_ids": [6, 7, 8]}]
    )
    with pytest.raises(ShapeError, match="several documents"):
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    apart = loaded("llama", tmp_path / "apart")
    assert apart(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits.shape == (1, 8, 60)


def test_adapters_on_the_dense_layers(tmp_path):
    peft = pytest.importorskip("peft")
    kind, _, _, _ = MODELS["llama"]
    model = built("llama")
    st.convert(model, st.STLConfig(mixing="none"), filter_fn=lambda _, name: ".mlp." in name)
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        kind.from_pretrained(tmp_path / "base"), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    targets = {name for name, m in adapted.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert targets and all("self_attn" in name for name in targets)
    trainer(adapted, tmp_path / "run", max_steps=1).train()
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(outputs(again.base_model.model, TEXT), outputs(adapted.base_model.model.eval(), TEXT))
    assert not torch.allclose(outputs(again.base_model.model, TEXT), outputs(model, TEXT))
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    third = kind.from_pretrained(tmp_path / "merged")
    assert torch.equal(outputs(third, TEXT), outputs(merged, TEXT))


def test_an_adapter_on_an_stl_layer_is_refused_by_name(tmp_path):
    peft = pytest.importorskip("peft")
    model = loaded("llama", tmp_path)
    with pytest.raises(ValueError, match=r"STLLinear.* is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"]))
