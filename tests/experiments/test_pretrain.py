"""If these fail, `strassen-tile pretrain` compares language models that were trained otherwise than it says."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from strassen_tile import check_mixing
from strassen_tile.cli import main
from strassen_tile.data.text import load_text
from strassen_tile.errors import ConfigError, ConversionError, DataError
from strassen_tile.experiments import language
from strassen_tile.experiments.text_recipe import RECIPES, text_recipe_of
from strassen_tile.integrations.decoders import MODELS, decoder

METHODS = "dense,stl[rank=6,mixing=none]"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A text that is learned in a few steps."""
    where = tmp_path_factory.mktemp("words")
    for part, count in (("train", 400), ("validation", 40), ("test", 40)):
        (where / f"{part}.txt").write_text("the cat sat on the mat. " * count)
    return str(where)


def changes(words, **more):
    given = {
        "data": words, "model": "llama-1m", "epochs": 2, "steps": 3, "batch_size": 4, "context": 16, "methods": METHODS,
        "lr_grid": "none", "lr": 3e-3, "seeds": "0,", "precision": "float32", **more,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in given.items()]


def recipe(words, **more):
    return text_recipe_of(None, changes(words, **more))


def command(words, out, **more):
    return ["pretrain", *(part for change in changes(words, **more) for part in ("--set", change)), "--out", str(out)]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert main(command(words, out, save="true")) == 0
    return out


def rows_of(out):
    return json.loads((out / "rows.json").read_text())


def losses(rows):
    return [(row["method"], row["epoch"], row["val_loss"], row["train_loss"], row.get("loss")) for row in rows]


def test_rows_say_what_was_trained_and_measured(whole, words):
    rows, splits = rows_of(whole), load_text(words)
    assert [(row["method"], row["epoch"]) for row in rows] == [(m, e) for m in ("dense", "stl") for e in (1, 2)]
    for row in rows:
        assert row["val_bits"] == pytest.approx(row["val_loss"] / math.log(2))
        assert ("bits" in row) == (row["epoch"] == 2)  # the test text is read once
        assert (row["tokens_per_epoch"], row["train_bytes"], row["text"]) == (
            3 * 4 * 16,
            splits.train.size,
            splits.digest,
        )
    assert rows[1]["val_loss"] < rows[0]["val_loss"] < math.log(256)
    dense, stl = rows[1], rows[3]
    assert dense["flop_ratio"] == 1 and 0.4 < stl["flop_ratio_all_in"] < stl["flop_ratio"] < 0.6
    assert dense["layers_converted"] == stl["layers_converted"] == 5 * 7
    for name in ("report.html", "plot.png", "recipe.json"):
        assert (whole / name).stat().st_size > 100
    assert "bits a byte" in (whole / "report.html").read_text().lower()


def test_the_loss_is_that_of_the_saved_model(whole, words):
    how, splits = recipe(words), load_text(words)
    for index, name in enumerate(("dense-0", "stl-r=6")):
        (path,) = (whole / "models").glob(f"{name}*.safetensors")
        model, _ = language.build(how, 256, how.roster()[index], 5)  # of another seed: all that counts is in the file
        model.load_state_dict(load_file(path))
        tokens, context, total, count = splits.test.tokens.long(), 16, 0.0, 0
        with torch.no_grad():
            for start in range(0, len(tokens) - context, context):
                piece = tokens[start : start + context + 1]
                logits = model.eval()(input_ids=piece[None, :-1]).logits[0].double()
                total += float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
                count += context
        row = rows_of(whole)[2 * index + 1]
        assert row["loss"] == pytest.approx(total / count, rel=1e-5)


def test_flops_are_the_counters(words):
    how = recipe(words, methods="dense")
    model, conversion = language.build(how, 256, how.roster()[0], 0)
    fields = language._cost(how, 256, False, {}, model, conversion)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval().set_attn_implementation("eager")
        model(input_ids=torch.zeros(1, 16, dtype=torch.long))
    assert fields["flops_per_token"] == counter.get_total_flops() // 16
    narrow = recipe(words, methods="dense[width=64]").roster()[0]
    found = language._cost(how, 256, True, {}, *language.build(how, 256, narrow, 0))
    assert found["flop_ratio"] == pytest.approx(found["flops_per_token"] / fields["flops_per_token"])
    assert found["flop_ratio_all_in"] == pytest.approx(1 / 4, rel=0.05)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A network of two narrow blocks."""
    where = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    transformers.GPTNeoXConfig(**sizes).save_pretrained(where)
    return str(where)


def test_every_method_mixes_and_keeps_the_future_out(words, tiny):
    entries = "low-rank[flop_ratio=0.5,mix=causal],stl[rank=24,mixing=causal],stl[rank=6,mixing=none,mix=causal]"
    how = recipe(words, methods=entries, model=tiny)
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(1))
    for one in how.roster():
        model, conversion = language.build(how, 256, one, 0)
        assert len(conversion.converted) == 2 * 4
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "mix" in name:
                    parameter.normal_(0, 0.3)
            other = tokens.clone()
            other[:, 9:] = (other[:, 9:] + 1) % 256
            before, after = (model.eval()(input_ids=ids, use_cache=False).logits for ids in (tokens, other))
        assert torch.equal(before[:, :8], after[:, :8])
        assert not torch.allclose(before[:, 9:], after[:, 9:])
    assert check_mixing(model, {"input_ids": tokens})
    with pytest.raises(ConversionError, match="mixing its rows would make"):
        leaking = recipe(words, methods="stl[rank=24,mixing=sequence]").roster()[0]
        language.build(how, 256, leaking, 0)


def test_killed_and_repeated_it_comes_to_the_same(whole, words, tmp_path):
    out = tmp_path / "killed"
    script = (
        "import os, signal, sys\n"
        "from torch.optim.optimizer import register_optimizer_step_pre_hook\n"
        "from strassen_tile.cli import main\n"
        "left = [5]\n"
        "def count(*_):\n"
        "    left[0] -= 1\n"
        "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "register_optimizer_step_pre_hook(count)\n"
        "main(sys.argv[1:])\n"
    )
    arguments = command(words, out, save="true")
    ended = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, timeout=300, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(rows_of(out)) == 1
    assert main(arguments) == 0
    assert losses(rows_of(out)) == losses(rows_of(whole))
    for path in (whole / "models").iterdir():
        state, other = load_file(path), load_file(out / "models" / path.name)
        assert all(torch.equal(state[key], other[key]) for key in state)


def test_two_processes_train_what_one_trains(whole, words, tmp_path):
    out = tmp_path / "two"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
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
    done = subprocess.run(
        [*runner, *command(words, out)], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for one, two in zip(losses(rows_of(whole)), losses(rows_of(out)), strict=True):
        assert one[:2] == two[:2]
        assert two[2:4] == pytest.approx(one[2:4], rel=1e-4)


def test_an_entry_has_a_start_of_its_own(words):
    how = recipe(words, methods="dense,dense[init_range=0.1],stl[rank=6,mixing=none,init_range=0.1]")
    usual, wide, stl = how.roster()
    assert (usual.variant, wide.variant, stl.variant) == ("", "start 0.1", "r=6, tile 1×4×4, mixing none, start 0.1")
    deviation = {}
    for one in (usual, wide):
        model, _ = language.build(how, 256, one, 0)
        deviation[one.variant] = float(model.model.layers[0].mlp.up_proj.weight.std())
    assert deviation == {"": pytest.approx(0.02, rel=0.05), "start 0.1": pytest.approx(0.1, rel=0.05)}
    # STL's start has the outputs' variance of the dense one that it stands for.
    x = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = [language.build(how, 256, one, 0)[0].model.layers[0].mlp.up_proj(x).std() for one in (wide, stl)]
    assert float(found[1]) == pytest.approx(float(found[0]), rel=0.15)


def test_rates_are_chosen_on_the_validation_text(words, tmp_path):
    how = recipe(words, methods="dense", lr_grid="1e-5,3e-3")
    rows = language.compare(how, tmp_path)
    assert {row["lr"] for row in rows} == {3e-3}
    tried = json.loads((tmp_path / "tuning" / "rows.json").read_text())
    assert {row["lr"] for row in tried} == {1e-5, 3e-3}
    assert all("bits" not in row and row["tested"] is False for row in tried)
    assert rows[0]["tuned"] == "1e-05, 0.003"


def test_what_makes_no_sense_is_one_line(words, tiny, tmp_path, capsys):
    for change, message in (
        ({"steps": 0}, "steps, context, held_out, tested_on and limit must be positive"),
        ({"held_out": 0}, "must be positive"),
        ({"tested_on": 0}, "must be positive"),
        ({"data": ""}, "data is empty"),
        ({"model": "llama-9x"}, "there is no model 'llama-9x'; there are llama-1m"),
        ({"init_range": 2}, "init_range must be above 0"),
        ({"methods": "dense[init_range=0]"}, "init_range must be above 0"),
        ({"methods": "dense[width=48]"}, "width must be a multiple of 32, the width of a head"),
        (
            {"methods": "dense,stl[rank=24,mixing=sequence]"},
            "methods: stl r=24: nothing to convert",
        ),
        ({"data": "nowhere"}, "no such file or folder"),
        ({"context": 100_000}, "and a piece is 100000"),
        ({"methods": "stl[rank=24,mixing=sequence]", "model": tiny}, "mixing its rows would make"),
        ({"seeds": "1000000,", "lr_grid": "1e-3"}, "seed 1000000 is that of the runs that choose rates"),
    ):
        assert main(command(words, tmp_path / "out", **change)) == 1
        said = capsys.readouterr().err
        assert message in said and said.startswith("strassen-tile: ") and said.count("\n") == 1
    assert main(command(words, tmp_path / "diverged", methods="dense", lr=1e9, warmup=0, model=tiny)) == 3
    assert "diverged in epoch" in capsys.readouterr().err
    change = {"methods": "dense", "lr_grid": "1e9,1e8", "warmup": 0, "model": tiny}
    assert main(command(words, tmp_path / "at every rate", **change)) == 3
    assert "it diverged at every rate" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="there is no recipe 'other'; there are"):
        text_recipe_of("other")
    with pytest.raises(DataError, match="has no files"):
        load_text(str(tmp_path / "out"))


def test_a_folder_is_of_one_text_and_one_architecture(words, tiny, tmp_path, capsys):
    """Repeated over files that have changed since, a command would take means over different texts."""
    text, shape = tmp_path / "text", tmp_path / "config.json"
    text.mkdir()
    for part in ("train", "validation", "test"):
        (text / f"{part}.txt").write_text("one and two. " * 40)
    shape.write_text((Path(tiny) / "config.json" if Path(tiny).is_dir() else Path(tiny)).read_text())
    first = {"methods": "dense", "model": str(shape), "epochs": 1, "steps": 1}
    assert main(command(text, tmp_path / "out", **first)) == 0
    before = rows_of(tmp_path / "out")
    changed = json.loads(shape.read_text()) | {"initializer_range": 0.3}
    for path, content, said in (
        (shape, json.dumps(changed), "runs on another architecture"),
        (text / "train.txt", "three and four. " * 40, "runs on another text"),
    ):
        kept = path.read_text()
        path.write_text(content)
        assert main(command(text, tmp_path / "out", **first | {"seeds": "0,1"})) == 1
        assert said in capsys.readouterr().err and rows_of(tmp_path / "out") == before
        path.write_text(kept)
    assert main(command(text, tmp_path / "out", **first | {"seeds": "0,1"})) == 0


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_recipes_can_be_read(name):
    how = text_recipe_of(name)
    assert how.roster()
    assert how.model in MODELS
    assert replace(how, seeds=(0,)).seeds == (0,)


def test_decoders_have_the_sizes_that_they_are_called_by():
    for name in MODELS:
        vocabulary = 256 if name.split("-")[1] in ("1m", "3m", "10m", "30m") else 50_304
        with torch.device("meta"):
            model = decoder(name, vocabulary=vocabulary, context=128)
        size = sum(p.numel() for p in model.parameters())
        said = float(name.split("-")[1][:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
        assert 0.85 * said < size < 1.25 * said, name
    with pytest.raises(ConfigError, match=r"width must be a multiple of 32, the width of a head of llama-3m; got 40"):
        decoder("llama-3m", vocabulary=256, context=8, width=40)


def test_a_config_of_transformers_is_a_model(tmp_path):
    with torch.device("meta"):
        decoder("neox-1m", vocabulary=256, context=64).config.save_pretrained(tmp_path)
        model = decoder(str(tmp_path), vocabulary=300, context=16)
    assert type(model).__name__ == "GPTNeoXForCausalLM"
    assert model.config.vocab_size == 300
    Path(tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="no config of transformers"):
        decoder(str(tmp_path), vocabulary=256, context=8)
