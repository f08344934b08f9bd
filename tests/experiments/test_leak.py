"""If these fail, docs/leak.md's numbers are not of what a model sees when it generates."""

import pytest
import torch
import transformers

from strassen_tile import STLConfig, convert
from strassen_tile.cli import main
from strassen_tile.data.text import load_text
from strassen_tile.errors import DataError
from strassen_tile.experiments import leak
from strassen_tile.experiments.saved import load_run

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 256,
}


def model(config=None, **more):
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    if config is not None:
        tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
        convert(made, config, example_inputs={"input_ids": tokens}, **more)
    return made


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    where = tmp_path_factory.mktemp("words")
    for part in ("train", "validation", "test"):
        (where / f"{part}.txt").write_text("".join(chr(33 + i * i % 90) for i in range(400)))
    return load_text(str(where))


def test_only_rows_that_see_later_ones_lose_by_predicting_alone(splits):
    safe = (None, STLConfig(mixing="none"), STLConfig(mixing="causal", token_mix="causal"))
    for config in safe:
        rows = leak.rows_of(model(config), splits, 16, 3)
        assert [row["position"] for row in rows] == [0, 1, 2, 3]
        assert all(row["check_mixing"] and row["bits"] == pytest.approx(row["bits_alone"], rel=1e-6) for row in rows)
    rows = leak.rows_of(model(STLConfig(rank=24), force_mixing=["*"]), splits, 16, 3)
    assert not any(row["check_mixing"] for row in rows)
    first, *_, last = rows
    assert abs(first["bits"] - first["bits_alone"]) > 1e-4
    assert last["bits"] == pytest.approx(last["bits_alone"], rel=1e-6)  # nothing stands behind it in its tile


def test_losses_are_those_of_each_token_by_itself(splits):
    made, tokens = model(), splits.test.tokens[:20].long().reshape(2, 10)
    found = leak.losses(made, tokens, alone=True)
    for b in range(2):
        for n in range(1, 10):
            with torch.no_grad():
                logits = made(input_ids=tokens[b : b + 1, :n]).logits[0, -1]
            expected = -torch.log_softmax(logits, dim=-1)[tokens[b, n]]
            assert float(found[b, n - 1]) == pytest.approx(float(expected), rel=1e-5)


def test_saved_runs_come_back(tmp_path, capsys):
    transformers.LlamaConfig(**SIZES).save_pretrained(tmp_path / "tiny")
    (tmp_path / "words").mkdir()
    for part in ("train", "validation", "test"):
        (tmp_path / "words" / f"{part}.txt").write_text("to be or not to be. " * 30)
    options = {
        "data": tmp_path / "words", "model": tmp_path / "tiny", "epochs": 1, "steps": 2, "batch_size": 2, "context": 16,
        "methods": "dense,stl[rank=24,mixing=sequence,force_mixing=true,epochs=2]",
        "lr_grid": "none", "seeds": "0,", "save": "true",
    }  # fmt: skip
    changes = [part for key, value in options.items() for part in ("--set", f"{key}={value}")]
    assert main(["pretrain", *changes, "--out", str(tmp_path / "out")]) == 0
    paths = sorted((tmp_path / "out" / "models").iterdir())
    runs = [load_run(path) for path in paths]
    assert [tuple(run.told.values()) for run in runs] == [
        ("dense", "", 0),
        ("stl", "r=24, forced, 2 epochs", 0),
    ]
    assert runs[0].decode(runs[0].encode("to bé")) == "to bé"
    assert len(leak.continued(runs[0].model, runs[0].encode("to be"), 7)) == 7
    torch.save({}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="has no weights of a run of pretrain"):
        load_run(tmp_path / "other.safetensors")
