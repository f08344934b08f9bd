"""Trained language models that `pretrain --save` and `finetune --save` left, made again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from strassen_tile.data.text import TextSplits, load_text
from strassen_tile.errors import ConfigError, DataError
from strassen_tile.experiments import language
from strassen_tile.experiments.cheaper import build
from strassen_tile.experiments.entries import Compared
from strassen_tile.experiments.finetune_recipe import FinetuneRecipe
from strassen_tile.experiments.material import material
from strassen_tile.experiments.settings import settings_of
from strassen_tile.experiments.text_recipe import OnText, TextRecipe
from strassen_tile.records import Row
from strassen_tile.report.groups import without_rate

R = TypeVar("R", bound=OnText)


@dataclass(frozen=True)
class SavedModel:
    """A run's trained model.

    Attributes:
        model: in eval mode.
        recipe: what it was trained by.
        told: the fields that tell the run.
        tokenizer: of transformers; None for bytes.
    """

    model: nn.Module
    recipe: OnText
    told: Row
    tokenizer: Any


@dataclass(frozen=True)
class Saved(SavedModel):
    """A run's trained causal language model, and its text.

    Attributes:
        splits: its text.
        encode, decode: text to tokens, and back.
    """

    splits: TextSplits
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def load_run(path: Path) -> Saved:
    """The trained causal language model of a run.

    Raises:
        DataError: the file is not one, or its text cannot be read.
    """
    saved = load_model(path)
    recipe = saved.recipe
    if isinstance(recipe, FinetuneRecipe):
        splits = material(recipe).splits
        if splits is None:
            raise DataError(f"{path} is of an encoder; a causal language model is wanted")
    else:
        tokenizer = getattr(recipe, "tokenizer", "bytes")
        splits = load_text(recipe.data, tokenizer=tokenizer, limit=recipe.limit, context=recipe.context)
    made = saved.tokenizer
    encode, decode = (_bytes, _text) if made is None else (_encoder(made), made.decode)
    return Saved(**vars(saved), splits=splits, encode=encode, decode=decode)


def load_model(path: Path) -> SavedModel:
    """The trained model of a run.

    Raises:
        DataError: the file is not one, or the text cannot be read that a pretrained model was fitted to.
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
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise DataError(f"{path} has no weights of a run of pretrain or finetune: {error!r}") from error
    try:
        model, tokenizer = _untrained(recipe, one, int(said["seed"]), tensors)
    except ConfigError as error:
        raise _changed(path, said["recipe"], error) from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:  # names or shapes that do not match
        raise _changed(path, said["recipe"], error) from error
    return SavedModel(model.eval(), recipe, told, tokenizer)


def _untrained(recipe: OnText, one: Compared, seed: int, tensors: Mapping[str, Tensor]) -> tuple[nn.Module, Any]:
    """The network of a run, made as it was before it was trained, and its tokenizer."""
    if isinstance(recipe, FinetuneRecipe):
        return build(recipe, one, seed)[0], material(recipe).tokenizer
    assert isinstance(recipe, TextRecipe)
    model, _ = language.build(recipe, _vocabulary(recipe, one.width, tensors), one, 0)
    return model, None if recipe.tokenizer == "bytes" else _tokenizer(recipe.tokenizer)


def _changed(path: Path, recipe: Mapping[str, Any], error: Exception) -> DataError:
    return DataError(
        f"{path} is not of what {recipe.get('model')} on {recipe.get('data')} now gives: the model or the text has changed "
        f"since, or paths are meant from another folder ({' '.join(str(error).split())[:200]})"
    )


def _vocabulary(recipe: TextRecipe, width: int | None, tensors: Mapping[str, Tensor]) -> int:
    """Of the network whose weights these are."""
    with torch.device("meta"):
        model: Any = language.network(recipe, 1, width)
    embedding = model.get_input_embeddings().weight
    return next(len(tensors[name]) for name, weight in model.named_parameters() if weight is embedding)


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
