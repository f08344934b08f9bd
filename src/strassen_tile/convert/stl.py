"""`convert`: the linear layers of a model become STL layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from strassen_tile.convert.select import Filter
from strassen_tile.convert.survey import mixing_of
from strassen_tile.convert.swap import Conversion, swap
from strassen_tile.cost import machine
from strassen_tile.errors import ConversionError
from strassen_tile.nn import PaddingMask, STLConfig, STLLinear


def convert(
    model: nn.Module,
    config: STLConfig | None = None,
    *,
    example_inputs: object = None,
    filter_fn: Filter | None = None,
    force_mixing: Sequence[str] = (),
    min_speedup: float | None = None,
) -> Conversion:
    """Replace the linear layers of `model`, in place, by `STLLinear`. It creates no dependence that was not there.

    Left as they are, each with a reason: heads (layers that make the model's output), layers with tied weights or hooks,
    subclasses of `nn.Linear`, layers that are used other than by calling them under their name, and, where rows mix, layers fed
    2-D inputs and those in whose tiles rows would see what they do not see in the model as it is: other samples, later tokens,
    other windows. That is found by running copies of the model on `example_inputs`, some hundred times, with parts of them
    changed (docs/guarantees.md); so a config that mixes rows needs them. Best give two samples or more, as long as a few tiles.

    A model called with `attention_mask` or `src_key_padding_mask` (B, N) has its padding rows zeroed before they can reach real
    ones; `strassen_tile.padding(model, mask)` says which they are where neither is an argument.

    Args:
        model: any module that is not itself a linear layer.
        config: `STLConfig()` by default, which mixes rows. Whether Ŵ starts from the weight or from noise is in it.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments, run in eval mode.
        filter_fn: filter_fn(module, name) → whether to replace it; given, it decides about heads too.
        force_mixing: names of layers, or patterns such as "layers.*.mlp.*", whose rows may see other rows of their sample
            though the model does not let them. Rows of other samples never.
        min_speedup: leave layers that are predicted to gain less than this on this machine at the shapes of
            `example_inputs` (as `strassen-tile plan` does): of a training step if the model is in training mode, of a
            forward pass otherwise.

    Returns:
        A `Conversion`; `str()` of it is a table.

    Raises:
        ConversionError: nothing was converted, rows would mix and there are no example_inputs to show where they may,
            force_mixing matches nothing, or min_speedup was given without example_inputs. The model is then as it was.
    """
    config = STLConfig() if config is None else config
    _check_types(model, config, filter_fn)
    config.load_basis()  # a basis that does not exist is said before anything is touched
    if min_speedup is not None and example_inputs is None:
        raise ConversionError(
            "min_speedup needs example_inputs: how much a layer gains depends on how many rows it is fed"
        )
    padding = PaddingMask() if config.mixes_rows else None
    name = "step" if model.training else "forward"
    pays = None if min_speedup is None else partial(_pays, config=config, least=min_speedup, name=name)

    def replace(linear: nn.Linear) -> nn.Module:
        start = config if config.fits else STLConfig.from_dict({**config.to_dict(), "init": "random"})
        with torch.inference_mode(False):  # it is to be trained, wherever it is made
            layer = STLLinear.from_linear(linear, start)
        layer.config = config
        layer.padding = padding
        return layer

    conversion = swap(
        model,
        replace,
        example_inputs=example_inputs,
        filter_fn=filter_fn,
        mixing=mixing_of(config),
        force_mixing=force_mixing,
        pays=pays,
        attach=None if padding is None else padding.attach,
    )
    conversion.padding = padding
    if padding is not None:
        conversion._undo.extend(handle.remove for handle in padding.attach(model))
    return conversion


def _check_types(model: object, config: object, filter_fn: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConversionError(f"model must be a torch.nn.Module; got a {type(model).__name__}")
    if not isinstance(config, STLConfig):
        raise ConversionError(f"config must be an STLConfig; got {config!r}")
    if filter_fn is not None and not callable(filter_fn):
        raise ConversionError(f"filter_fn must be a function of (module, name); got {filter_fn!r}")


def _pays(
    linear: nn.Linear, shapes: list[tuple[int, ...]], *, config: STLConfig, least: float, name: str
) -> str | None:
    here = machine(linear.weight.device.type, linear.weight.dtype)
    rows = math.prod(shapes[0][:-1])
    speedup = here.speedup(rows, linear.in_features, linear.out_features, config.pqs, config.rank, name)
    return f"predicted {speedup:.2f}× on this machine, below {least:g}×" if speedup < least else None
