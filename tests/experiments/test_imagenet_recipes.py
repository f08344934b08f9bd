"""The recipes for ImageNet: the published values, a made folder end to end, and published checkpoints to start from."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_compare_devices import distributed, torchrun
from torch import nn

from strassen_tile import STLConfig, STLLinear
from strassen_tile.baselines import stl
from strassen_tile.cli import main
from strassen_tile.data import load_images
from strassen_tile.errors import DataError
from strassen_tile.experiments import building
from strassen_tile.experiments.entries import Compared
from strassen_tile.experiments.recipe import recipe_of
from strassen_tile.experiments.start import check, network
from strassen_tile.models import T2TViT, load_checkpoint, t2t_vit

NAMES = json.loads((Path(__file__).parents[1] / "models" / "t2t_vit_state_dicts.json").read_text())["models"]
SMALL = ("model=t2t_vit_nano", "ranks=24")
LIGHT = ("randaugment=none", "erasing=0", "mixup=0", "cutmix=0")  # what needs neither timm nor torchvision


def _imports(*names: str) -> bool:
    try:
        return all(importlib.import_module(name) for name in names)
    except Exception:  # torchvision made for another torch fails in ways of its own
        return False


heavy = pytest.mark.skipif(
    not _imports("timm.data.auto_augment", "torchvision.transforms.v2"), reason="timm or torchvision is not installed"
)


@pytest.fixture
def photographs(tmp_path) -> Path:
    random = np.random.default_rng(0)
    for part, count in (("train", 9), ("val", 4)):
        for index in range(count):
            path = tmp_path / "photographs" / part / f"class {index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photographs"


def command(name: str, data: Path, out: Path, *changes: str, size: int = 32) -> list[str]:
    """What a lab types, and what makes it small: 5 tokens, two batches, one epoch."""
    small = (f"image_size={size}", "epochs=1", "cooldown=0", "batch_size=6", *changes)
    return ["compare", "--recipe", name, "--data", str(data), "--out", str(out), *(f"--set={one}" for one in small)]


def rows_of(out: Path) -> list[dict]:
    return json.loads((out / "rows.json").read_text())


@pytest.mark.parametrize(("name", "lr", "decay"), [("t2t_vit_7", 1e-3, 0.03), ("t2t_vit_14", 5e-4, 0.05)])
def test_the_recipes_are_the_published_ones(name, lr, decay) -> None:
    recipe = recipe_of(f"{name}_imagenet", ["data=x"])
    assert (recipe.model, recipe.lr, recipe.weight_decay) == (name, lr, decay)
    expected = {
        "image_size": 224, "epochs": 310, "cooldown": 10, "batch_size": 512, "min_lr": 1e-5, "label_smoothing": 0.1,
        "drop_path": 0.1, "randaugment": "rand-m9-mstd0.5-inc1", "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0,
        "ema": 0.99996, "optimizer": "adamw", "augment": True, "checkpoint": None, "scope": "blocks",
    }  # fmt: skip
    assert {key: getattr(recipe, key) for key in expected} == expected
    assert recipe.precision in ("float32", "bfloat16")
    assert round(recipe.warmup * recipe.epochs * 2503) == 10 * 2503  # steps of an epoch of ImageNet


def test_a_recipe_is_found_with_either_dash() -> None:
    assert recipe_of("fashion_mnist", ["data=x"]) == recipe_of("fashion-mnist", ["data=x"])


def test_without_timm_and_torchvision_one_line_and_nothing_written(tmp_path, photographs, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "timm.data.auto_augment", None)
    assert main(command("t2t_vit_7_imagenet", photographs, tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert 'pip install "strassen-tile[imagenet]"' in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "model", [SMALL, pytest.param(("ranks=24",), marks=pytest.mark.slow)], ids=["a small model", "its own"]
)
def test_the_smaller_recipe_end_to_end(tmp_path, photographs, model) -> None:
    assert (
        main(
            command(
                "t2t_vit_7_imagenet", photographs, tmp_path / "out", *LIGHT, *model, size=8 if model == SMALL else 32
            )
        )
        == 0
    )
    rows = rows_of(tmp_path / "out")
    assert [(row["method"], row["rank"], row["epoch"]) for row in rows] == [("dense", None, 1), ("stl", 24, 1)]
    assert all(np.isfinite([row["loss"], row["train_loss"]]).all() for row in rows)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The cosine ends at 1e-05" in page and "of decay 0.99996 a step" in page


@pytest.mark.slow
def test_the_larger_recipe_end_to_end(tmp_path, photographs) -> None:
    assert main(command("t2t_vit_14_imagenet", photographs, tmp_path / "out", *LIGHT)) == 0
    assert [row["rank"] for row in rows_of(tmp_path / "out")] == [None, 16, 24]


@heavy
@pytest.mark.slow
@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_14"])
def test_the_recipes_with_all_their_augmentation(tmp_path, photographs, name) -> None:
    assert main(command(f"{name}_imagenet", photographs, tmp_path / "out")) == 0
    rows = rows_of(tmp_path / "out")
    assert [row["rank"] for row in rows] == [None, 16, 24]
    assert all(np.isfinite([row["loss"], row["train_loss"]]).all() for row in rows)
    assert (
        "RandAugment rand-m9-mstd0.5-inc1, random erasing 0.25, mixup 0.8, cutmix 1"
        in (tmp_path / "out" / "report.html").read_text()
    )


@distributed
@pytest.mark.slow
@pytest.mark.parametrize("augmentation", [pytest.param((), marks=heavy), LIGHT], ids=["all of it", "light"])
def test_the_recipe_on_two_processes(tmp_path, photographs, augmentation) -> None:
    """Also where the last batch leaves one of them two images, the other one."""
    arguments = command("t2t_vit_7_imagenet", photographs, tmp_path / "out", *augmentation, "ranks=24", "methods=stl")
    done = torchrun("-m", "strassen_tile.cli", *arguments)
    assert done.returncode == 0, done.stderr
    (row,) = rows_of(tmp_path / "out")
    assert row["world_size"] == 2 and np.isfinite([row["loss"], row["train_loss"]]).all()


def small() -> T2TViT:
    return t2t_vit("t2t_vit_nano", image_size=8)


def published(path: Path, name: str = "t2t_vit_7") -> dict[str, torch.Tensor]:
    """A stand-in with the names, shapes and wrapping of the published files."""
    generator = torch.Generator().manual_seed(7)
    shapes = NAMES[name]["state_dict"] if name in NAMES else [(k, v.shape) for k, v in small().state_dict().items()]
    state = {key: 0.05 * torch.randn(tuple(shape), generator=generator) for key, shape in shapes}
    torch.save({"epoch": 309, "state_dict_ema": {f"module.{key}": value for key, value in state.items()}}, path)
    return state


def test_a_published_checkpoint_loads_and_may_have_other_classes_and_images(tmp_path) -> None:
    state = published(tmp_path / "71.7_T2T_ViT_7.pth.tar")
    whole = t2t_vit("t2t_vit_7")
    assert load_checkpoint(whole, tmp_path / "71.7_T2T_ViT_7.pth.tar") == ()
    assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())
    other = t2t_vit("t2t_vit_7", num_classes=3, image_size=32)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(DataError, match=r"of another shape \(3\): head.bias"):
        load_checkpoint(other, tmp_path / "71.7_T2T_ViT_7.pth.tar")
    with pytest.raises(DataError, match=r"of another shape \(1\): pos_embed"):
        load_checkpoint(other, tmp_path / "71.7_T2T_ViT_7.pth.tar", may_differ=["head."])
    kept = load_checkpoint(other, tmp_path / "71.7_T2T_ViT_7.pth.tar", may_differ=("head.", "pos_embed"))
    assert kept == ("head.bias", "head.weight", "pos_embed")
    for key, value in other.state_dict().items():
        assert torch.equal(value, (before if key in kept else state)[key]), key


@pytest.mark.parametrize(
    "name", [pytest.param("t2t_vit_nano", marks=pytest.mark.slow), pytest.param("t2t_vit_7", marks=pytest.mark.slow)]
)
def test_a_published_checkpoint_converts_and_fine_tunes(tmp_path, photographs, name) -> None:
    state = published(tmp_path / "71.7_T2T_ViT.pth.tar", name)
    start = (f"model={name}", f"checkpoint={tmp_path / '71.7_T2T_ViT.pth.tar'}", "qk_scale=0.0625", *LIGHT)
    size = 8 if name == "t2t_vit_nano" else 32
    recipe = recipe_of("t2t_vit_7_imagenet", [f"data={photographs}", f"image_size={size}", *start])
    splits = load_images(photographs, image_size=size)
    exact = stl(STLConfig(basis="strassen", rank=49))  # an exact basis: the converted network is the loaded one
    converted, conversion = building.build(recipe, splits, Compared(exact, ""), 0)
    torch.manual_seed(0)
    dense, pixels = network(recipe, splits).double().eval(), torch.randn(2, 3, size, size).double()
    assert torch.equal(dense.blocks[1].mlp.fc2.weight, state["blocks.1.mlp.fc2.weight"].double())
    assert dense.config.qk_scale == 256**-0.5
    assert len(conversion.converted) == 4 * len(dense.blocks)
    torch.testing.assert_close(converted.double().eval()(pixels), dense(pixels), rtol=1e-4, atol=1e-5)
    more = ("init=approximate", "methods=stl[rank=24]")
    assert main(command("t2t_vit_7_imagenet", photographs, tmp_path / "out", *start, *more, size=size)) == 0
    (row,) = rows_of(tmp_path / "out")
    assert row["rank"] == 24 and np.isfinite([row["loss"], row["train_loss"]]).all()
    assert "starts from 71.7_T2T_ViT.pth.tar" in (tmp_path / "out" / "report.html").read_text()


def test_a_checkpoint_that_is_none_is_one_line_and_nothing_written(tmp_path, photographs, capsys) -> None:
    changes = (*LIGHT, "checkpoint=nowhere.pth")
    assert main(command("t2t_vit_7_imagenet", photographs, tmp_path / "out", *changes)) == 1
    assert "checkpoint='nowhere.pth': no such file; expected the weights of a t2t_vit_7" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_token_modules_layers_on_request(photographs) -> None:
    splits = load_images(photographs, image_size=8)
    layers = {}
    for scope in ("blocks", "all"):
        changes = [f"data={photographs}", "image_size=8", f"scope={scope}", *SMALL, *LIGHT]
        recipe = recipe_of("t2t_vit_7_imagenet", changes)
        check(recipe, splits)
        model, conversion = building.build(recipe, splits, Compared(stl(STLConfig(rank=24)), ""), 0)
        layers[scope] = {name for name, module in model.named_modules() if isinstance(module, STLLinear)}
        assert layers[scope] == set(conversion.converted)
    linear = {name for name, module in small().named_modules() if type(module) is nn.Linear}
    assert layers["blocks"] == {name for name in linear if name.startswith("blocks.")}
    assert layers["all"] == linear - {"head"}
