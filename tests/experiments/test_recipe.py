"""Recipes: files, what changes them, and the one line that says what is wrong with them."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from strassen_tile import cli
from strassen_tile.errors import ConfigError
from strassen_tile.experiments.recipe import RECIPES, Recipe, recipe_of
from strassen_tile.experiments.settings import as_text, settings_of

NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_the_recipes_that_ship_are_recipes() -> None:
    assert NAMES == [
        "demo",
        "digits",
        "fashion-mnist",
        "imagefolder",
        "matrix",
        "t2t_vit_14_imagenet",
        "t2t_vit_7_imagenet",
    ]
    for name in NAMES:
        recipe = recipe_of(name, ["data=x"])
        assert recipe.data == "x" and recipe.epochs > 0
    assert recipe_of("digits").data == recipe_of("demo").data == "digits"
    for name in NAMES[2:]:
        with pytest.raises(ConfigError, match=f"{name}.toml leaves data open; give --data"):
            recipe_of(name)


def test_without_a_name_the_data_decides(tmp_path) -> None:
    (tmp_path / "train-images-idx3-ubyte").touch()
    fashion, others = recipe_of("fashion-mnist", ["data=x"]), recipe_of("imagefolder", ["data=x"])
    assert recipe_of() == recipe_of("digits")
    assert recipe_of(options={"data": str(tmp_path)}).epochs == fashion.epochs != others.epochs
    assert recipe_of(changes=[f"data={tmp_path}", "image_size=64"]).epochs == others.epochs
    assert recipe_of(options={"data": str(tmp_path.parent)}).epochs == others.epochs


def test_options_and_set_go_before_the_file_and_the_file_before_defaults(tmp_path) -> None:
    path = written(
        tmp_path,
        'data = "digits"\nepochs = 7\nbatch_size = 32\nlr = 3e-4\nranks = [8]\nseeds = [3]\ntile = [2, 2, 2]\n'
        'methods = ["dense", "stl[rank=4,mixing=causal]"]\naugment = false\nmodel = "t2t_vit_micro"\n',
    )
    recipe = recipe_of(path)
    assert (recipe.epochs, recipe.lr, recipe.ranks, recipe.seeds, recipe.tile) == (7, 3e-4, (8,), (3,), (2, 2, 2))
    assert (recipe.augment, recipe.methods) == (False, ("dense", "stl[rank=4,mixing=causal]"))
    assert recipe.weight_decay == 0.05
    recipe = recipe_of(path, ["epochs=9", "augment=true", "seeds=2", "model=auto"], {"lr": 0.5})
    assert (recipe.epochs, recipe.augment, recipe.seeds, recipe.model, recipe.lr) == (9, True, (0, 1), "auto", 0.5)
    with pytest.raises(ConfigError, match="lr: given twice"):
        recipe_of(path, ["lr=1"], {"lr": 0.5})


def test_every_field_is_an_option_a_key_and_says_what_it_is(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    shown = capsys.readouterr().out
    for field in fields(Recipe):
        assert f"--{field.name.replace('_', '-')} " in shown.replace(",", " ").replace("\n", " ").replace("]", " ")
        assert field.metadata["help"]


def test_what_a_value_becomes_as_text_is_read_as_the_value() -> None:
    """Files, --set and options go through it."""
    recipe = recipe_of(changes=["seeds=5,", "methods=dense,stl[rank=8,tile=4]", "image_size=none", "limit=7"])
    for key, value in json.loads(json.dumps(asdict(recipe))).items():
        if value is not None:
            parsed = settings_of(Recipe)[key].parse(as_text(value))
            assert parsed == getattr(recipe, key) and type(parsed) is type(getattr(recipe, key)), key


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = ", "cannot be read as TOML"),
        ("epochs = 1\nepochs = 2", "cannot be read as TOML"),
        ("a = " + "[" * 5000, "cannot be read as TOML"),
        ("\0", "cannot be read as TOML"),
        ("ephocs = 3", "unknown key 'ephocs'; there are epochs, batch_size"),
        ("epochs = 2.5", "epochs: a whole number"),
        ("epochs = true", "epochs: a whole number"),
        ("augment = 1", "augment: true or false is wanted"),
        ("ranks = [[8]]", "ranks: text, a number"),
        ("ranks = {a = 1}", "ranks: text, a number"),
        ("lr = inf", "lr must be a positive finite number"),
        ("warmup = 1.5", "warmup must be from 0 to 1"),
        ("weight_decay = -1", "weight_decay must be"),
        ("workers = -1", "workers must be"),
        ('mixing = "some"', "mixing: one of sequence, none, causal"),
        ('methods = ["dens"]', "unknown methods dens"),
        ("epochs = 3", "mine.toml leaves batch_size, data open; give --batch-size, --data"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it_or_the_key(tmp_path, capsys, text, message) -> None:
    fixed = 'epochs = 1\nbatch_size = 8\ndata = "digits"\n'
    kept = [line for line in fixed.splitlines() if not text.startswith(line.split()[0])]
    path = written(tmp_path, text if "leaves" in message else "\n".join([*kept, text]))
    assert cli.main(["compare", "--recipe", path, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
