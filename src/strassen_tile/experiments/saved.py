"""Trained language models that `pretrain --save` left, made again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from strassen_tile.data.text import TextSplits, load_text
from strassen_tile.errors import DataError
from strassen_tile.experiments import language
from strassen_tile.experiments.settings import settings_of
from strassen_tile.experiments.text_recipe import TextRecipe
from strassen_tile.records import Row
from strassen_tile.report.groups import without_rate


def load_run(path: Path) -> tuple[nn.Module, TextRecipe, TextSplits, Row]:
    """The trained model of a run, its recipe and text, and what tells the run.

    Raises:
        DataError: the file is not one, or its text cannot be read.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as file:
            said = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        recipe = _recipe(said["recipe"])
        told: Row = {"method": said["method"], "variant": said["variant"], "seed": said["seed"]}
        wanted = told["method"], without_rate(str(told["variant"]))
        index = next(i for i, one in enumerate(recipe.roster()) if one.key == wanted)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise DataError(f"{path} has no weights of a run of pretrain: {error!r}") from error
    splits = load_text(recipe.data, tokenizer=recipe.tokenizer, limit=recipe.limit, context=recipe.context)
    model, _ = language.build(recipe, splits.vocabulary, recipe.roster()[index], 0)
    model.load_state_dict(load_file(path))
    return model.eval(), recipe, splits, told


def _recipe(said: dict[str, Any]) -> TextRecipe:
    known = settings_of(TextRecipe)
    values: Any = {
        key: tuple(value) if isinstance(value, list) else value for key, value in said.items() if key in known
    }
    return replace(TextRecipe(**values), save=False)
