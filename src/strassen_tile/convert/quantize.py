"""STL layers to fp8, in place, for inference."""

from __future__ import annotations

from functools import partial

from torch import nn

from strassen_tile.convert.swap import Conversion
from strassen_tile.errors import ConversionError
from strassen_tile.nn import STLLinear, STLLinearFP8
from strassen_tile.nn.fusion import has_own_hooks


def quantize_fp8(model: nn.Module) -> Conversion:
    """Let the STL layers of `model`, in place, do their products in fp8 (e4m3). `undo()` puts the layers back.

    For inference on GPUs with fp8 (compute capability 8.9 or later), where its products are twice as fast as in bfloat16;
    it runs on CPUs too, slowly, to try what it does to a model's results. MLPs then run layer by layer.

    Raises:
        ConversionError: there is no STL layer, or the model is one itself.
    """
    layers = {name: module for name, module in model.named_modules(remove_duplicate=False) if type(module) is STLLinear}
    if "" in layers:
        raise ConversionError("the model is itself an STL layer; use STLLinearFP8 on it")
    skipped = {name: reason for name, layer in layers.items() if (reason := _reason(layer)) is not None}
    chosen = {name: layer for name, layer in layers.items() if name not in skipped}
    if not chosen:
        raise ConversionError(
            f"{type(model).__name__} has no STL layer that takes fp8; convert it first"
            + "".join(f"; {name}: {reason}" for name, reason in skipped.items())
        )
    made = {layer: STLLinearFP8(layer) for layer in dict.fromkeys(chosen.values())}  # one used twice stays one
    conversion = Conversion(converted={name: made[layer] for name, layer in chosen.items()}, skipped=skipped)
    for name, layer in chosen.items():
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, made[layer])
        conversion._undo.append(partial(setattr, owner, child, layer))
    return conversion


def _reason(layer: STLLinear) -> str | None:
    if layer.config.encoder_scope != "layer":
        return "it has an encoder for each column tile, for which there are no fp8 products"
    if layer.config.mixing == "causal" and layer.config.mixes_rows:
        return "rows of a causal tile would see later ones by the scale they share"
    return "it has hooks, which would be lost" if has_own_hooks(layer) else None
