"""Which layers of a model would pay on this machine: `strassen-tile plan`."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strassen_tile.convert.observe import Calls
from strassen_tile.convert.select import Candidate, candidates, others, reasons
from strassen_tile.convert.survey import mixing_of, survey
from strassen_tile.cost import Machine
from strassen_tile.errors import ConfigError
from strassen_tile.nn import STLConfig
from strassen_tile.records import Row


def load_model(text: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """`package.module:callable` called with `arguments`, or the folder of a transformers model.

    Only the shapes of its layers matter, so a folder's weights are not read.

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
            with torch.device("meta"):
                known = AutoConfig.from_pretrained(text, trust_remote_code=False)  # else it asks, and waits
                model: Any = AutoModel.from_config(known, trust_remote_code=False)
        except Exception as error:  # whatever a config can do wrong
            raise ConfigError(f"cannot make a model of the folder {text!r}: {_said(error)}") from error
    else:
        module, _, name = text.partition(":")
        try:
            model = importlib.import_module(module)
            for part in filter(None, name.split(".")):
                model = getattr(model, part)
            model = model(**arguments or {}) if not isinstance(model, nn.Module) and callable(model) else model
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            raise ConfigError(
                f"cannot make a model of {text!r}: {_said(error)}. It is package.module:callable, or a folder"
            ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{text!r} is a {type(model).__name__}, not a torch module")
    return model


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"  # a KeyError alone says only its key


@dataclass(frozen=True)
class Layer:
    """A linear layer to plan for: what it is called, N×K×M, and why `convert` would leave it, if it would."""

    name: str
    shape: tuple[int, int, int]
    left: str | None = None


def selection(
    model: nn.Module, config: STLConfig, example_inputs: object = None
) -> tuple[list[Candidate], Mapping[str, str], Mapping[str, Calls] | None]:
    """The linear layers of `model`, why `convert` leaves some, and what they are fed: all that plan asks of it.

    Raises:
        ConfigError: `convert` would refuse the model.
    """
    found = candidates(model)
    if any("" in candidate.names for candidate in found):
        why = {"": "is the model itself: convert wants a model that holds it; there is STLLinear.from_linear"}
        return found, why, None
    if example_inputs is not None:
        seen = survey(model, example_inputs=example_inputs, mixing=mixing_of(config))
        return found, seen.skipped, seen.calls
    parts = _causal_parts(model) if config.mixing == "sequence" and config.mixes_rows else set()
    for candidate in found:
        if any(part in ("", candidate.name) or candidate.name.startswith(f"{part}.") for part in parts):
            raise ConfigError(
                f"{type(model).__name__} says that it is, or holds, a causal language model or decoder ({candidate.name} is in "
                "it), and with --mixing sequence a token would see later ones: convert refuses that. Plan with --mixing none "
                "or --mixing causal"
            )
    return found, reasons(model, found, filter_fn=None, calls=None, mixes_rows=config.mixes_rows), None


def _causal_parts(model: nn.Module) -> set[str]:
    """Names of the parts that say of themselves that a row must not see later ones: without a run, all there is to go by."""
    parts = set()
    for name, module in model.named_modules():
        decoder = getattr(getattr(module, "config", None), "is_decoder", False) is True
        if decoder or isinstance(module, nn.TransformerDecoder | nn.TransformerDecoderLayer):
            parts.add(name)
        elif getattr(module, "is_causal", False) is True:  # transformers' attention: the block around it
            parts.add(name.rpartition(".")[0])
    return parts


def layers_of(model: nn.Module, config: STLConfig, *, rows: int, example_inputs: object = None) -> list[Layer]:
    """The linear layers of `model`.

    Args:
        model: any module; on the meta device if only shapes matter.
        config: what they would be converted to.
        rows: N each layer is fed, samples and all; replaced by what is seen where `example_inputs` are given.
        example_inputs: as for `convert`.

    Raises:
        ConfigError: `convert` would refuse the model.
    """
    found, left, calls = selection(model, config, example_inputs)
    made = []
    for candidate in found:
        shapes = [] if calls is None else calls[candidate.name].shapes
        n = math.prod(shapes[0][:-1]) if shapes else rows
        shape = (n, candidate.layer.in_features, candidate.layer.out_features)
        made.append(Layer(candidate.name, shape, left.get(candidate.name)))
    return made


def layers_of_shapes(shapes: Sequence[tuple[int, int, int]]) -> list[Layer]:
    """The same for shapes N×K×M given by the user."""
    return [Layer("x".join(map(str, shape)), shape) for shape in shapes]


def notes(model: nn.Module, config: STLConfig) -> list[str]:
    """What a plan made without running the model does not say of its layers."""
    said = [f"Not planned for: {count} that {why}." for why, count in Counter(others(model).values()).items()]
    if config.mixes_rows:
        said.append(
            "The model was not run. convert, which is given example_inputs, also leaves layers whose rows must not mix (of "
            "several samples, causal, in windows), layers fed 2-D inputs, and heads under unusual names."
        )
    return said


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
    """`decide` for the layers of `layers_of`."""
    layers = layers_of(model, config, rows=rows, example_inputs=example_inputs)
    return decide(layers, config, here, min_speedup=min_speedup, name=name)


def decide(
    layers: Sequence[Layer], config: STLConfig, here: Machine, *, min_speedup: float = 1.0, name: str = "forward"
) -> list[Row]:
    """One record a layer: layer, shape, decision ("convert" or "leave"), reason, predicted_speedup.

    Args:
        layers: of `layers_of` or `layers_of_shapes`.
        config: tile and rank.
        here: the machine's rates.
        min_speedup: convert where the prediction is at least this.
        name: "forward" or "step".
    """
    return [_record(layer, config, here, min_speedup, name) for layer in layers]


def _record(layer: Layer, config: STLConfig, here: Machine, least: float, name: str) -> Row:
    n, k, m = layer.shape
    dense, stl = here.linear(n, k, m, config.pqs, config.rank, name)
    speedup = dense / stl
    if layer.left is not None:
        decision, reason = "leave", layer.left
    elif speedup < least:
        decision, reason = "leave", f"predicted {speedup:.2f}× is below {least:g}×"
    else:
        decision, reason = "convert", f"predicted {speedup:.2f}×"
    return {
        "layer": layer.name, "shape": f"{n}x{k}x{m}", "n": n, "k": k, "m": m, "tile": "x".join(map(str, config.pqs)),
        "rank": config.rank, "pass": name, "device": here.device, "dtype": here.dtype, "decision": decision,
        "reason": reason, "predicted_speedup": speedup, "predicted_dense_s": dense, "predicted_s": stl,
    }  # fmt: skip
