"""A model, and inputs to run it on, from the words of a command line."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strassen_tile.errors import ConfigError

_MOST_NUMBERS = 1 << 28  # in an example input
_EXAMPLE = '{"input_ids": [2, 128]} or [2, 3, 224, 224]'


def load_model(text: str, arguments: Mapping[str, Any] | None = None, *, to_run: bool = False) -> nn.Module:
    """`package.module:callable` called with `arguments`, or the folder of a transformers model.

    A folder's weights are not read: for the shapes of layers none are needed, and to see what its rows see (`to_run`) random
    ones do.

    Raises:
        ConfigError: it is neither, or does not make a module.
    """
    if Path(text).is_dir():
        try:
            from transformers import AutoConfig, AutoModel
        except ImportError as error:
            raise ConfigError(
                f'reading the folder of a transformers model needs transformers ({error}): pip install "strassen-tile[vision]"'
            ) from error
        try:
            with torch.device("cpu" if to_run else "meta"):
                known = AutoConfig.from_pretrained(text, trust_remote_code=False)  # else it asks, and waits
                model: Any = AutoModel.from_config(known, trust_remote_code=False)
        except Exception as error:  # whatever a config can do wrong
            raise ConfigError(f"cannot make a model of the folder {text!r}: {said(error)}") from error
    else:
        module, _, name = text.partition(":")
        try:
            model = importlib.import_module(module)
            for part in filter(None, name.split(".")):
                model = getattr(model, part)
            model = model(**arguments or {}) if not isinstance(model, nn.Module) and callable(model) else model
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            raise ConfigError(
                f"cannot make a model of {text!r}: {said(error)}. It is package.module:callable, or a folder"
            ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{text!r} is a {type(model).__name__}, not a torch module")
    return model


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"  # a KeyError alone says only its key


def example_inputs_of(model: nn.Module, given: object) -> object:
    """What to run the model on.

    Args:
        model: its dtype is that of the numbers.
        given: "dummy" for the model's own `dummy_inputs`, a shape for a single tensor, or a dict of argument names to shapes:
            `{"input_ids": [2, 128]}`. Arguments whose names end in "ids", "idx" or "tokens" are integers (those that number
            positions count up, those of types are zero), masks let everything be seen, and all others are normal numbers.

    Raises:
        ConfigError: it is none of these, or the model has no `dummy_inputs`.
    """
    if given == "dummy":
        inputs: object = getattr(model, "dummy_inputs", None)
        if inputs is None:
            raise ConfigError(f"{type(model).__name__} has no dummy_inputs; give shapes, as in {_EXAMPLE}")
        return inputs
    if isinstance(given, Mapping) and given:
        return {str(name): _tensor(model, str(name), shape) for name, shape in given.items()}
    return _tensor(model, "", given)


def _tensor(model: nn.Module, name: str, shape: object) -> Tensor:
    fits = isinstance(shape, list | tuple) and all(type(size) is int and size > 0 for size in shape)
    if not isinstance(shape, list | tuple) or not fits or not shape or math.prod(shape) > _MOST_NUMBERS:
        raise ConfigError(
            f"inputs are shapes of positive sizes, as in {_EXAMPLE}; got {f'{name}: ' if name else ''}{shape!r}"
        )
    if "mask" in name:  # PyTorch's say what is hidden, transformers' what is not
        hides = name in ("mask", "src_mask", "tgt_mask", "memory_mask") or name.endswith("padding_mask")
        return torch.zeros(shape, dtype=torch.bool) if hides else torch.ones(shape, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    if name.endswith("position_ids"):
        return torch.arange(shape[-1]).expand(shape).clone()
    if name.endswith(("ids", "idx", "tokens")):
        return torch.randint(1 if "type" in name else _vocabulary(model), tuple(shape), generator=generator)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def _vocabulary(model: nn.Module) -> int:
    """How many tokens there are: of the embeddings that transformers' models name, or of the first table."""
    named: Any = None
    with contextlib.suppress(Exception):  # models without any have the method too, which then raises
        named = model.get_input_embeddings()  # type: ignore[operator]
    tables = [m for m in (named, *model.modules()) if isinstance(m, nn.Embedding)]
    return tables[0].num_embeddings if tables else 2
