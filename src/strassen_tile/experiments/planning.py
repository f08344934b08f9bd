"""Which layers of a model would pay on this machine: `strassen-tile plan`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strassen_tile.convert.observe import observe
from strassen_tile.convert.select import candidates, reasons
from strassen_tile.cost import Machine
from strassen_tile.errors import ConfigError
from strassen_tile.nn import STLConfig
from strassen_tile.report.rows import Row


def load_model(text: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """`package.module:callable` called with `arguments`, or the folder of a transformers model.

    Only the shapes of its layers matter, so a folder's weights are not read.

    Raises:
        ConfigError: it is neither, or does not make a module.
    """
    if Path(text).is_dir():
        from transformers import AutoConfig, AutoModel

        try:
            with torch.device("meta"):
                model: Any = AutoModel.from_config(AutoConfig.from_pretrained(text))
        except Exception as error:  # whatever a config can do wrong
            raise ConfigError(f"cannot make a model of the folder {text!r}: {_said(error)}") from error
    else:
        module, _, name = text.partition(":")
        try:
            model = importlib.import_module(module)
            for part in filter(None, name.split(".")):
                model = getattr(model, part)
            model = model(**arguments or {}) if not isinstance(model, nn.Module) and callable(model) else model
        except Exception as error:  # whatever the user's code raises
            raise ConfigError(
                f"cannot make a model of {text!r}: {_said(error)}. It is package.module:callable, or a folder"
            ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{text!r} is a {type(model).__name__}, not a torch module")
    return model


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"  # a KeyError alone says only its key


def plan(
    model: nn.Module,
    config: STLConfig,
    here: Machine,
    *,
    rows: int,
    min_speedup: float = 1.0,
    example_inputs: object = None,
    name: str = "forward",
) -> list[Row]:
    """One record a linear layer: layer, shape, decision ("convert" or "leave"), reason, predicted_speedup.

    Args:
        model: any module; on the meta device if only shapes matter.
        config: tile and rank.
        here: the machine's rates.
        rows: N each layer is fed, samples and all; replaced by what is seen where `example_inputs` are given.
        min_speedup: convert where the prediction is at least this.
        example_inputs: as for `convert`.
        name: "forward" or "step".
    """
    found = candidates(model)
    layers = {candidate.name: candidate.layer for candidate in found}
    calls = None if example_inputs is None else observe(model, layers, example_inputs)
    skipped: Mapping[str, str] = reasons(model, found, filter_fn=None, calls=calls, mixes_rows=config.mixes_rows)
    records: list[Row] = []
    for candidate in found:
        shapes = [] if calls is None else calls[candidate.name].shapes
        n = math.prod(shapes[0][:-1]) if shapes else rows
        k, m = candidate.layer.in_features, candidate.layer.out_features
        records.append(_record(candidate.name, (n, k, m), config, here, min_speedup, name, skipped.get(candidate.name)))
    return records


def plan_shapes(
    shapes: Sequence[tuple[int, int, int]], config: STLConfig, here: Machine, *, min_speedup: float, name: str
) -> list[Row]:
    """The same for shapes N×K×M given by the user."""
    return [_record(f"{n}x{k}x{m}", (n, k, m), config, here, min_speedup, name, None) for n, k, m in shapes]


def _record(
    layer: str, shape: tuple[int, int, int], config: STLConfig, here: Machine, least: float, name: str, skip: str | None
) -> Row:
    dense, stl = here.linear(*shape, config.pqs, config.rank, name)
    speedup = dense / stl
    if skip is not None:
        decision, reason = "leave", skip
    elif speedup < least:
        decision, reason = "leave", f"predicted {speedup:.2f}× is below {least:g}×"
    else:
        decision, reason = "convert", f"predicted {speedup:.2f}×"
    n, k, m = shape
    return {
        "layer": layer, "shape": f"{n}x{k}x{m}", "n": n, "k": k, "m": m, "tile": "x".join(map(str, config.pqs)),
        "rank": config.rank, "pass": name, "device": here.device, "dtype": here.dtype, "decision": decision,
        "reason": reason, "predicted_speedup": speedup, "predicted_dense_s": dense, "predicted_s": stl,
    }  # fmt: skip
