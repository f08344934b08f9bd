"""However many devices: one recipe, one folder, one writer; and every row says what it was made on."""

import functools
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_runs import TRAINING, exact_network, measure, network, norms_kept, rates_kept, splits, train
from test_compare import RECIPE, command
from transformers import TrainingArguments

from strassen_tile.cli import main
from strassen_tile.errors import ConfigError
from strassen_tile.experiments import vision
from strassen_tile.integrations.training import resolved_precision

pytestmark = pytest.mark.usefixtures("among_few")
distributed = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *launcher, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@distributed
@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path) -> None:
    """Also where the last batch is not whole, and where it leaves one process without an image."""
    done = torchrun(str(Path(__file__).with_name("two_ranks.py")), str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert (first["size"], second["size"]) == (2, 2)
    for number, (name, limit) in enumerate((("ragged", 67), ("one left", 65))):
        model, data = network(), splits(limit)
        with rates_kept() as rates:
            records = train(model, data, tmp_path / "one")
        assert first[f"{name} rates"] == second[f"{name} rates"] == rates
        for one, two in zip(records, first["records"][number], strict=True):
            assert {**one, "seconds": 0} == pytest.approx({**two, "seconds": 0}, rel=1e-4), name
        both = torch.load(tmp_path / f"{name}.pt")
        for key, value in model.state_dict().items():
            torch.testing.assert_close(both[key], value, rtol=0, atol=2e-4)
        # Each test image counts once in two processes: 83 of them leave a last batch that is not whole.
        model.load_state_dict(both)
        last = first["records"][number][-1]
        assert {key: last[key] for key in ("top1", "loss")} == pytest.approx(measure(model, data), rel=1e-6)
        for found in (first, second):
            assert found[f"{name} resumed"] == ([2] if found is first else [])
            assert found[f"{name} equal"]
    for optimizer, lr in (("adamw", 3e-3), ("sgd", 0.1)):
        model = exact_network()
        with norms_kept() as norms:
            train(model, splits(65), tmp_path / "one", optimizer=optimizer, lr=lr)
        # Gradients were clipped, all alike: what each process has is averaged first.
        assert any(norm > 0.999 for norm in norms), norms
        assert first[f"{optimizer} norms"] == second[f"{optimizer} norms"] == pytest.approx(norms, rel=1e-6)
        both, start = torch.load(tmp_path / f"{optimizer}.pt"), exact_network().state_dict()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(both[key], value, rtol=0, atol=1e-10)
        assert max(float((both[key] - value).abs().max()) for key, value in start.items() if value.numel()) > 1e-3
    for found in (first, second):  # both end, at the step of the one that found it, with what was good
        assert found["diverged"][:2] == [2, 6] and str(tmp_path / "diverged" / "checkpoint-4") in found["diverged"][2]
    assert [path.name for path in (tmp_path / "diverged").iterdir()] == ["checkpoint-4"]
    assert second["records"] == [[], []]  # the first alone hands over records
    assert first["told"] == second["told"] == ["from", 0]
    assert first["failed"] == ["OSError", "no space"]
    assert second["failed"] == ["RankError", "the first process stopped: no space"]
    for number in (0, 1):  # whoever it is that cannot write, both end, and nothing is left to go on from
        assert first["no space"][number][0] == "OSError" and "unexpected pos" in first["no space"][number][1]
        assert second["no space"][number] == ["RankError", f"the first process stopped: {first['no space'][number][1]}"]
        assert not any((tmp_path / f"full {number}").iterdir())
    assert first["draw"] != second["draw"]  # else images of different processes are augmented alike


@distributed
@pytest.mark.slow
def test_the_command_on_two_processes(tmp_path) -> None:
    """One writes and prints. The other ends with it, also where the folder is refused."""
    arguments = command(tmp_path / "two", "--methods", "dense,stl", "--batch-size", "16", "--epochs", "2")
    done = torchrun("-m", "strassen_tile.cli", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report.html") == 1
    rows = json.loads((tmp_path / "two" / "rows.json").read_text())
    assert [(row["method"], row["epoch"]) for row in rows] == [("dense", 1), ("dense", 2), ("stl", 1), ("stl", 2)]
    assert {row["world_size"] for row in rows} == {2}
    assert not any((tmp_path / "two" / "runs").iterdir())
    assert main([*arguments, "--seeds", "2"]) == 0  # one process goes on with the same recipe
    rows = json.loads((tmp_path / "two" / "rows.json").read_text())
    assert [row["world_size"] for row in rows] == [2, 2, 2, 2, 1, 1, 1, 1]
    refused = torchrun("-m", "strassen_tile.cli", *arguments, "--lr", "0.5")
    assert refused.returncode != 0
    assert refused.stderr.count("holds a comparison with other lr") == 1
    odd = torchrun("-m", "strassen_tile.cli", *command(tmp_path / "odd", "--batch-size", "15"))
    assert odd.returncode != 0
    assert "batch_size=15 is of all 2 processes" in odd.stderr
    assert not (tmp_path / "odd").exists()


def test_warm_up_and_decay_count_the_steps_of_all_devices(tmp_path) -> None:
    """Of one process here; the test of two compares theirs with these."""
    with rates_kept() as rates:
        train(network(), splits(64), tmp_path)
    assert len(rates) == 8
    assert rates[:3] == [0, TRAINING.lr / 2, TRAINING.lr]
    assert rates[5] == pytest.approx(TRAINING.lr / 2)
    assert all(before > after > 0 for before, after in pairwise(rates[2:]))
    for warmup, expected in ((0.0, [TRAINING.lr]), (1.0, [0.0])):
        with rates_kept() as rates:
            train(network(), splits(16), tmp_path, epochs=1, warmup=warmup)
        assert rates == expected


def test_each_test_image_counts_once(tmp_path) -> None:
    model, data = network(), splits(16)
    records = train(model, data, tmp_path, epochs=1)
    assert {key: records[0][key] for key in ("top1", "loss")} == pytest.approx(measure(model, data), rel=1e-6)


def test_a_process_that_sees_several_gpus_takes_one(tmp_path, monkeypatch) -> None:
    """Trainer would take all, each with a batch of its own: another recipe."""
    alone = vars(TrainingArguments)["_setup_devices"].func

    def two(arguments: TrainingArguments) -> torch.device:
        device = alone(arguments)
        arguments._n_gpu = 2
        return device

    among_two = functools.cached_property(two)
    among_two.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", among_two)
    sizes, model = [], network()
    model.register_forward_pre_hook(lambda _, pixels: sizes.append(len(pixels[0])))
    with rates_kept() as rates:
        train(model, splits(64), tmp_path, epochs=1)
    assert sizes[:4] == [16] * 4 and len(rates) == 4


def test_recipe_rows_and_page_say_precision_device_and_world_size(tmp_path, capsys) -> None:
    assert main(command(tmp_path, "--methods", "stl", "--precision", "bfloat16")) == 0
    assert json.loads((tmp_path / "recipe.json").read_text())["precision"] == "bfloat16"
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    expected = {"precision": "bfloat16", "device": "cuda" if torch.cuda.is_available() else "cpu", "world_size": 1}
    assert {key: row[key] for key in expected} == expected
    page = (tmp_path / "report.html").read_text()
    assert "bfloat16" in page and "<dt>device</dt>" in page and "<dt>world_size</dt>" in page
    assert main(command(tmp_path, "--methods", "stl", "--precision", "float32")) == 1
    assert "other precision" in capsys.readouterr().err


def test_bfloat16_is_computed_in_when_it_is_asked_for(tmp_path) -> None:
    seen = []
    model = network()
    model.blocks[0].mlp.register_forward_hook(lambda *about: seen.append(about[2].dtype))
    for precision in ("float32", "bfloat16"):
        train(model, splits(16), tmp_path, epochs=1, precision=precision)
    assert set(seen) == {torch.float32, torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_folder_from_before_recipes_had_a_precision_and_rows_a_variant_goes_on(tmp_path) -> None:
    """Then the hardware decided: what auto finds is what the folder's runs were. And ranks told runs apart."""
    precision = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(False) else "float32"
    recipe = replace(RECIPE, precision=precision, epochs=1)
    before = vision.compare(recipe, tmp_path)
    new = {"precision", "workers", "train_encoder", "train_decoder"}
    old = {**{key: value for key, value in asdict(recipe).items() if key not in new}, "image_size": None}
    (tmp_path / "recipe.json").write_text(json.dumps(old))
    facts = ["train_images", "test_images", "classes", "image_size", "stored_size", "chance"]
    for row in before:
        for key in ("precision", "device", "world_size", "variant", *facts):
            del row[key]
    (tmp_path / "rows.json").write_text(json.dumps(before))
    assert vision.compare(recipe, tmp_path) == before
    more = vision.compare(replace(recipe, methods=("dense", "stl", "stl[encoder_scope=tile]"), workers=1), tmp_path)
    assert more[:2] == before and [row["variant"] for row in more[2:]] == ["r=8, scope tile"]
    with pytest.raises(ConfigError, match="other precision"):
        other = {"float32": "bfloat16", "bfloat16": "float32"}[precision]
        (tmp_path / "recipe.json").write_text(json.dumps(old))
        vision.compare(replace(recipe, precision=other), tmp_path)


def test_a_precision_nobody_computes_in_is_refused(monkeypatch) -> None:
    with pytest.raises(ConfigError, match="precision"):
        replace(RECIPE, precision="float8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: False)
    with pytest.raises(ConfigError, match="GPU"):
        resolved_precision("bfloat16")
    resolved_precision("float32")
