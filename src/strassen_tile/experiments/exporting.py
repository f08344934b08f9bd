"""A trained run of `pretrain` or `finetune` as the folder of a model, for plain `from_pretrained`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from strassen_tile.baselines import Sparse24Linear
from strassen_tile.convert import replace_modules
from strassen_tile.errors import DataError
from strassen_tile.experiments.saved import load_model


def run_export(options: argparse.Namespace) -> int:
    """`strassen-tile export`; its exit status."""
    export_run(options.weights, options.out)
    print(options.out)
    return 0


def export_run(path: Path, folder: Path) -> None:
    """Write a run's model to `folder`, with its tokenizer, where that is not bytes.

    STL layers are written as such, and need `import strassen_tile` ahead of `from_pretrained`; 2:4 becomes dense layers with
    zeros. The folder appears whole or not at all.

    Args:
        path: of the weights, `models/….safetensors` of a folder of `pretrain --save` or `finetune --save`.
        folder: that is not there yet, or is empty.

    Raises:
        DataError: there is no such run, or the folder has something in it.
        ConversionError: transformers has no layers for its method.
        OSError: it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is there already, and not empty; give another")
    saved = load_model(path)
    model: Any = saved.model
    _as_plain(model)
    if model.can_generate():
        model.config.use_cache = True  # in training it is off
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        model.save_pretrained(unfinished)
        if saved.tokenizer is not None:
            saved.tokenizer.save_pretrained(unfinished)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _as_plain(model: nn.Module) -> None:
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, Sparse24Linear)}
    replace_modules(model, {name: module.to_linear() for name, module in sparse.items()})
