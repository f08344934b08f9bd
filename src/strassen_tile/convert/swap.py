"""Swap layers of a model in place, say what was done, and undo it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from strassen_tile.convert.mlps import adopt_mlps
from strassen_tile.convert.observe import Calls, causal_layers, observe
from strassen_tile.convert.select import Candidate, Filter, candidates, causal_parts, others, reasons, within
from strassen_tile.cost import machine
from strassen_tile.errors import ConversionError
from strassen_tile.nn import PaddingMask, STLConfig, STLLinear, STLLinearFP8

Replace = Callable[[nn.Linear], nn.Module | str]  # a replacement, or the reason why there is none
Pays = Callable[[nn.Linear, list[tuple[int, ...]]], str | None]  # of a layer and its input shapes: why it does not pay


@dataclass
class Conversion:
    """What a conversion did to a model.

    Attributes:
        converted: name → the layer now there.
        skipped: name → why the linear layer of that name was left as it is.
        calls: name → input shapes seen on the example inputs; empty without them.
        mlps: names of the blocks that are an MLP of converted layers, and run in one step where `STLMLP` would.
        padding: the mask that row-mixing layers share; `with conversion.padding(mask): model(…)` for models that do
            not take `attention_mask`. None when rows do not mix.
    """

    converted: dict[str, nn.Module]
    skipped: dict[str, str]
    calls: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    mlps: list[str] = field(default_factory=list)
    padding: PaddingMask | None = None
    _undo: list[Callable[[], object]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the original layers back. What the new ones learned is dropped, unless they hold the originals' parameters."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        rows = [(name, _describe(layer), "") for name, layer in self.converted.items()]
        rows += [(name, "left as it is", reason) for name, reason in self.skipped.items()]
        widths = [max([len(row[column]) for row in rows] + [5]) for column in (0, 1)]
        head = f"{len(self.converted)} converted, {len(self.skipped)} left as they are"
        if self.mlps:
            head += f"; run as MLPs: {', '.join(name or 'the model itself' for name in self.mlps)}"
        lines = [f"{name:<{widths[0]}}  {what:<{widths[1]}}  {why}".rstrip() for name, what, why in rows]
        return "\n".join([head, *lines])


def convert(
    model: nn.Module,
    config: STLConfig | None = None,
    *,
    example_inputs: object = None,
    filter_fn: Filter | None = None,
    min_speedup: float | None = None,
) -> Conversion:
    """Replace the linear layers of `model`, in place, by `STLLinear`.

    Left as they are, each with a reason: heads (layers that make the model's output), layers with tied weights or hooks,
    subclasses of `nn.Linear`, and, where rows mix, layers fed 2-D inputs or rows of several samples. The last two, and
    heads under unusual names, are found by running `example_inputs`; best give two samples (one is tried twice).

    Blocks that are an MLP of replaced layers, two or a gated three, keep their class and names but become `STLMLP`s too:
    in inference on a GPU they run in one step. They are recognised by reading their source.

    A model called with `attention_mask` (B, N) has its padding rows zeroed before they can reach real rows.

    Args:
        model: any module that is not itself a linear layer.
        config: `STLConfig()` by default. Whether Ŵ starts from the weight or from noise of its scale is in it.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments, run in eval mode.
        filter_fn: filter_fn(module, name) → whether to replace it; given, it decides about heads too.
        min_speedup: leave layers that are predicted to gain less than this on this machine at the shapes of
            `example_inputs` (as `strassen-tile plan` does): of a training step if the model is in training mode, of a
            forward pass otherwise.

    Returns:
        A `Conversion`; `str()` of it is a table.

    Raises:
        ConversionError: nothing was converted, rows would mix in a causal language model or a decoder, or
            min_speedup was given without example_inputs.
    """
    config = config or STLConfig()
    config.load_basis()  # a basis that does not exist is said before anything is touched
    if config.mixing == "sequence" and config.mixes_rows:
        _refuse_causal(model, example_inputs, filter_fn)
    if min_speedup is not None and example_inputs is None:
        raise ConversionError(
            "min_speedup needs example_inputs: how much a layer gains depends on how many rows it is fed"
        )
    padding = PaddingMask() if config.mixes_rows else None
    name = "step" if model.training else "forward"
    pays = None if min_speedup is None else partial(_pays, config=config, least=min_speedup, name=name)

    def replace(linear: nn.Linear) -> nn.Module:
        start = config if config.fits else STLConfig.from_dict({**config.to_dict(), "init": "random"})
        layer = STLLinear.from_linear(linear, start)
        layer.config = config
        layer.padding = padding
        return layer

    conversion = swap(
        model, replace, example_inputs=example_inputs, filter_fn=filter_fn, mixes_rows=config.mixes_rows, pays=pays
    )
    conversion.padding = padding
    mlps = adopt_mlps(model, conversion.converted.values())
    conversion.mlps = list(mlps)
    conversion._undo.extend(mlps.values())
    if padding is not None:
        conversion._undo.extend(handle.remove for handle in padding.attach(model))
    return conversion


def swap(
    model: nn.Module,
    replace: Replace,
    *,
    example_inputs: object = None,
    filter_fn: Filter | None = None,
    mixes_rows: bool = False,
    pays: Pays | None = None,
) -> Conversion:
    """Replace the layers that `replace` has a replacement for; the engine of `convert` and of its rivals."""
    found = candidates(model)
    if any("" in candidate.names for candidate in found):
        raise ConversionError("the model is itself a linear layer; use STLLinear.from_linear on it")
    layers = {candidate.name: candidate.layer for candidate in found}
    calls: Mapping[str, Calls] | None = None if example_inputs is None else observe(model, layers, example_inputs)
    skipped = reasons(model, found, filter_fn=filter_fn, calls=calls, mixes_rows=mixes_rows)
    skipped.update(others(model))
    if pays is not None and calls is not None:
        chosen = [candidate for candidate in found if candidate.name not in skipped]
        losses = {candidate.name: pays(candidate.layer, calls[candidate.name].shapes) for candidate in chosen}
        skipped.update({name: loss for name, loss in losses.items() if loss is not None})
    replacements: list[tuple[Candidate, nn.Module]] = []
    for candidate in found:
        if candidate.name not in skipped:
            replacement = replace(candidate.layer)
            if isinstance(replacement, str):
                skipped[candidate.name] = replacement
            else:
                replacements.append((candidate, replacement))
    if not replacements:
        listing = "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "it has no nn.Linear"
        raise ConversionError(f"nothing to convert in {type(model).__name__}. {listing}")
    conversion = Conversion(
        converted={candidate.name: layer for candidate, layer in replacements},
        skipped=skipped,
        calls={name: call.shapes for name, call in (calls or {}).items()},
    )
    places = [(_place(model, name), *pair) for pair in replacements for name in pair[0].names]
    for (parent, child), candidate, replacement in places:
        setattr(parent, child, replacement)
        conversion._undo.append(partial(setattr, parent, child, candidate.layer))
    conversion._undo.extend(_leave_fast_path(model))
    return conversion


def _pays(
    linear: nn.Linear, shapes: list[tuple[int, ...]], *, config: STLConfig, least: float, name: str
) -> str | None:
    here = machine(linear.weight.device.type, linear.weight.dtype)
    rows = math.prod(shapes[0][:-1])
    speedup = here.speedup(rows, linear.in_features, linear.out_features, config.pqs, config.rank, name)
    return f"predicted {speedup:.2f}× on this machine, below {least:g}×" if speedup < least else None


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, child = name.rpartition(".")
    return model.get_submodule(parent), child


def _leave_fast_path(model: nn.Module) -> list[Callable[[], object]]:
    """PyTorch's encoder reads `linear1.weight` itself in eval mode; keep it from doing so where that is not all there is."""
    undo: list[Callable[[], object]] = []

    def change(module: nn.Module, name: str, value: object) -> None:
        undo.append(partial(setattr, module, name, getattr(module, name)))
        setattr(module, name, value)

    for module in model.modules():
        layers = module.layers if isinstance(module, nn.TransformerEncoder) else [module]
        for layer in layers:
            if isinstance(layer, nn.TransformerEncoderLayer):
                parts: tuple[nn.Module, ...] = (layer.linear1, layer.linear2)
                if any(type(part) is not nn.Linear for part in parts):
                    encoder = isinstance(module, nn.TransformerEncoder)
                    change(module, *(("use_nested_tensor", False) if encoder else ("activation_relu_or_gelu", 0)))
    return undo


def _refuse_causal(model: nn.Module, example_inputs: object, filter_fn: Filter | None) -> None:
    layers = {candidate.name: candidate.layer for candidate in candidates(model)}
    chosen = [name for name, layer in layers.items() if filter_fn is None or filter_fn(layer, name)]
    parts = causal_parts(model)
    causal = [name for name in chosen if within(name, parts)]
    if not causal and example_inputs is not None:
        parts = causal_layers(model, layers, example_inputs)
        causal = [name for name in chosen if name in parts]
    if causal:
        raise ConversionError(
            f"{type(model).__name__} is, or holds, a causal language model or decoder ({causal[0]} is in it), and "
            "mixing='sequence' would let a token see later ones in its tile. Use STLConfig(mixing='none') (rows apart) or "
            "mixing='causal' (rows see earlier ones), or leave its layers out with filter_fn"
        )


def _describe(layer: nn.Module) -> str:
    if isinstance(layer, STLLinear | STLLinearFP8):
        tile, kind = "×".join(map(str, layer.config.pqs)), "STL" if isinstance(layer, STLLinear) else "STL in fp8"
        return f"{kind} {layer.in_features}→{layer.out_features}, tile {tile}, rank {layer.config.rank}"
    return f"{type(layer).__name__} {getattr(layer, 'in_features', '?')}→{getattr(layer, 'out_features', '?')}"
