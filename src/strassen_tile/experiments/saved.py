"""Trained language models that `pretrain --save` and `finetune --save` left, made again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from strassen_tile.data.text import TextSplits, load_text
from strassen_tile.errors import DataError
from strassen_tile.experiments import language
from strassen_tile.experiments.cheaper import build
from strassen_tile.experiments.finetune_recipe import FinetuneRecipe
from strassen_tile.experiments.material import material
from strassen_tile.experiments.settings import settings_of
from strassen_tile.experiments.text_recipe import OnText, TextRecipe
from strassen_tile.records import Row
from strassen_tile.report.groups import without_rate

R = TypeVar("R", bound=OnText)


@dataclass(frozen=True)
class Saved:
    """A run's trained model.

    Attributes:
        model: in eval mode.
        recipe: what it was trained by.
        splits: its text.
        told: the fields that tell the run.
        encode, decode: text to tokens, and back.
    """

    model: nn.Module
    recipe: OnText
    splits: TextSplits
    told: Row
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def load_run(path: Path) -> Saved:
    """The trained causal language model of a run.

    Raises:
        DataError: the file is not one, or its text cannot be read.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as file:
            said = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        pretrained = "calibration" in said["recipe"]
        recipe = _recipe(FinetuneRecipe if pretrained else TextRecipe, said["recipe"])
        told: Row = {"method": said["method"], "variant": said["variant"], "seed": said["seed"]}
        wanted = told["method"], without_rate(str(told["variant"]))
        one = next(one for one in recipe.roster() if one.key == wanted)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise DataError(f"{path} has no weights of a run of pretrain or finetune: {error!r}") from error
    if isinstance(recipe, FinetuneRecipe):
        found = material(recipe)
        if found.splits is None:
            raise DataError(f"{path} is of an encoder; a causal language model is wanted")
        model, _ = build(recipe, one.method, int(said["seed"]))
        splits, tokenizer = found.splits, found.tokenizer
    else:
        assert isinstance(recipe, TextRecipe)
        splits = load_text(recipe.data, tokenizer=recipe.tokenizer, limit=recipe.limit, context=recipe.context)
        model, _ = language.build(recipe, splits.vocabulary, one, 0)
        tokenizer = None if recipe.tokenizer == "bytes" else _tokenizer(recipe.tokenizer)
    model.load_state_dict(load_file(path))
    encode, decode = (_bytes, _text) if tokenizer is None else (_encoder(tokenizer), tokenizer.decode)
    return Saved(model.eval(), recipe, splits, told, encode, decode)


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def _bytes(text: str) -> list[int]:
    return list(text.encode("utf-8"))


def _text(tokens: list[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


def _recipe(kind: type[R], said: dict[str, Any]) -> R:
    known = settings_of(kind)
    values: Any = {
        key: tuple(value) if isinstance(value, list) else value for key, value in said.items() if key in known
    }
    return replace(kind(**values), save=False)
