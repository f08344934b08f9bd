"""If these fail, a trained run is lost to everybody who loads models by `from_pretrained`, or comes back as another."""

import pytest
import torch
import transformers as hf

from strassen_tile.baselines import Sparse24Linear
from strassen_tile.cli import main
from strassen_tile.errors import ConversionError
from strassen_tile.experiments.saved import load_model

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
STL = "stl[rank=6,tile=1x4x4,mixing=none,mix=causal]"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By method, the weights of a run from scratch on bytes."""
    where = tmp_path_factory.mktemp("pretrain")
    hf.LlamaConfig(**SIZES).save_pretrained(where / "tiny")
    (where / "words").mkdir()
    for part in ("train", "validation", "test"):
        (where / "words" / f"{part}.txt").write_text("to be or not to be. " * 30)
    options = {
        "data": where / "words", "model": where / "tiny", "epochs": 1, "steps": 2, "batch_size": 2, "context": 16,
        "methods": f"dense,2:4,low-rank[flop_ratio=0.5],{STL}", "lr_grid": "none", "seeds": "0,", "save": "true",
    }  # fmt: skip
    changes = [part for key, value in options.items() for part in ("--set", f"{key}={value}")]
    assert main(["pretrain", *changes, "--out", str(where / "out")]) == 0
    return {path.name.split("-")[0]: path for path in (where / "out" / "models").iterdir()}


@pytest.mark.parametrize("name", ["dense", "2_4", "stl"])
def test_a_folder_gives_what_the_run_gives(runs, name, tmp_path, capsys):
    path = next(path for key, path in runs.items() if key.startswith(name[0]))
    folder = tmp_path / "made" / "model"
    assert main(["export", str(path), "--out", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    own = load_model(path).model
    back = hf.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(back(tokens).logits, own(tokens).logits)
    assert back.config.use_cache and back.config.vocab_size == 256
    sparse = {name for name, module in own.named_modules() if isinstance(module, Sparse24Linear)}
    assert bool(sparse) == (name == "2_4")
    for layer in map(back.get_submodule, sparse):
        assert type(layer) is torch.nn.Linear
        assert layer.weight.view(layer.out_features, -1, 4).count_nonzero(-1).max() <= 2
    assert sorted(one.name for one in folder.parent.iterdir()) == ["model"]


def test_what_transformers_has_no_layers_for_is_refused(runs, tmp_path, capsys):
    path = next(path for key, path in runs.items() if key.startswith("low"))
    assert main(["export", str(path), "--out", str(tmp_path / "model")]) == 1
    assert "layers that from_pretrained has no classes for: LowRankLinear" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    sparse = load_model(next(path for key, path in runs.items() if key.startswith("2"))).model
    with pytest.raises(ConversionError, match=r"Sparse24Linear \(model\.layers\.0\."):
        sparse.save_pretrained(tmp_path / "model")  # its mask follows the weights, which are not zero


def test_nothing_is_written_over(runs, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("kept")
    path = next(path for key, path in runs.items() if key.startswith("dense"))
    assert main(["export", str(path), "--out", str(tmp_path / "model")]) == 1
    assert "is there already, and not empty" in capsys.readouterr().err
    assert (tmp_path / "model" / "mine").read_text() == "kept"
    for wrong in (tmp_path / "model" / "mine", tmp_path / "nothing", tmp_path):
        assert main(["export", str(wrong), "--out", str(tmp_path / "other")]) == 1
        assert "has no weights of a run" in capsys.readouterr().err


def test_a_model_that_has_changed_since_is_said(runs, tmp_path, capsys):
    path = next(path for key, path in runs.items() if key.startswith("dense"))
    model = load_model(path).recipe.model
    try:
        hf.LlamaConfig(**SIZES | {"intermediate_size": 64}).save_pretrained(model)
        assert main(["export", str(path), "--out", str(tmp_path / "model")]) == 1
    finally:
        hf.LlamaConfig(**SIZES).save_pretrained(model)
    assert "the model or the text has changed since" in " ".join(capsys.readouterr().err.split())
    assert not any(tmp_path.iterdir())
