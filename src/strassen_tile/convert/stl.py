"""`convert`: linear layers become STL layers; `quantize_fp8`: those do their products in fp8."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from strassen_tile.convert.layers import Candidate, candidates
from strassen_tile.convert.replace import modules_by_name, replace_modules
from strassen_tile.convert.running import inputs_of
from strassen_tile.convert.select import Filter, matching, materialise, mixing_of, padding_of
from strassen_tile.convert.swap import Conversion, changed, grouped, swap
from strassen_tile.cost import machine
from strassen_tile.errors import ConversionError
from strassen_tile.nn import STLConfig, STLLinear, STLLinearFP8
from strassen_tile.nn.fusion import has_own_hooks


def convert(
    model: nn.Module,
    config: STLConfig | None = None,
    *,
    example_inputs: object = None,
    filter_fn: Filter | None = None,
    layer_configs: Mapping[str, STLConfig | None] | None = None,
    force_mixing: Sequence[str] = (),
    min_speedup: float | None = None,
    calibration: object = None,
    rounds: int = 10,
    dry_run: bool = False,
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
        layer_configs: name or pattern (as in a shell: `*` also stands for dots) → the config of the layers that match, or None
            to leave them dense; the first pattern that matches counts, and `config` is for the layers that none matches.
        force_mixing: names of layers, or patterns such as "layers.*.mlp.*", whose rows may see other rows of their sample
            though the model does not let them. Rows of other samples never. Of a layer with several names all are to be given.
        min_speedup: leave layers that are predicted to gain less than this on this machine at the shapes of
            `example_inputs` (as `strassen-tile plan` does): of a training step if the model is in training mode, of a
            forward pass otherwise.
        calibration: inputs, as example_inputs are given, on which each layer is fitted to what the dense one makes of what
            it is fed: Ŵ by least squares, and E and D in turn with it where they are trained. For configs that start from the
            weight (`STLConfig.fits`); rows of padding count like others, so best give none.
        rounds: of that; 0: Ŵ alone.
        dry_run: change nothing, and return what would be done; also where no layer would be converted.

    Returns:
        A `Conversion`; `str()` of it is a table.

    Raises:
        ConversionError: nothing was converted, rows would mix and there are no example_inputs to show where they may, a pattern
            matches no layer, min_speedup was given without example_inputs, or calibration for layers that start from noise.
            The model is then as it was.
    """
    config = STLConfig() if config is None else config
    _check_types(model, config, filter_fn)
    if min_speedup is not None and example_inputs is None:
        raise ConversionError(
            "min_speedup needs example_inputs: how much a layer gains depends on how many rows it is fed"
        )
    if dry_run and any(is_lazy(p) for p in model.parameters()):
        model = copy.deepcopy(model)  # to take their sizes is a change, too
    materialise(model, example_inputs)
    found = candidates(model)
    configs = _configs(found, config, layer_configs)
    for used in {config, *configs.values()}:
        used.load_basis()  # one that does not exist is said before anything is touched
    padding, threshold = padding_of(configs.values()), min_speedup or 0.0
    fed: dict[nn.Module, torch.Tensor] = {}
    if calibration is not None:
        if noise := next((c for c in configs.values() if not c.fits), None):
            raise ConversionError(
                f"calibration fits layers to the weights replaced, and init={noise.init!r} with basis={noise.basis!r} "
                'starts from noise: take init="fit", or give no calibration'
            )
        if not dry_run:
            fed = inputs_of(model, list(configs), calibration)

    def replace(linear: nn.Linear) -> nn.Module:
        chosen = configs[linear]
        as_it_is = chosen.fits or chosen.init == "spectral"
        start = chosen if as_it_is else STLConfig.from_dict({**chosen.to_dict(), "init": "random"})
        with torch.inference_mode(False):  # it is to be trained, wherever it is made
            layer = STLLinear.from_linear(linear, start, fed.pop(linear, None), rounds=rounds)
        layer.config = chosen
        layer.padding = padding if chosen.mixes_rows else None
        return layer

    def pays(linear: nn.Linear, shapes: Sequence[tuple[int, ...]]) -> str | None:
        chosen, rates = configs[linear], machine(linear.weight.device.type, linear.weight.dtype)
        kind, features = "step" if model.training else "forward", (linear.in_features, linear.out_features)
        times = [rates.linear(math.prod(shape[:-1]), *features, chosen.pqs, chosen.rank, kind) for shape in shapes]
        speedup = sum(dense for dense, _ in times) / sum(stl for _, stl in times)
        return f"predicted {speedup:.2f}× on this machine, below {threshold:g}×" if speedup < threshold else None

    conversion = swap(
        model,
        replace,
        example_inputs=example_inputs,
        filter_fn=filter_fn,
        mixing={c.name: how for c in found if c.layer in configs and (how := mixing_of(configs[c.layer]))},
        excluded={c.name: "excluded by layer_configs" for c in found if c.layer not in configs},
        force_mixing=force_mixing,
        pays=pays if threshold else None,
        attach=padding.attach,
        dry_run=dry_run,
    )
    if any(isinstance(m, STLLinear) and m.config.mixes_rows for m in conversion.converted.values()):
        conversion.padding = padding
        if not dry_run:
            conversion._undo.extend(handle.remove for handle in padding.attach(model))
    return conversion


def _check_types(model: object, config: object, filter_fn: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConversionError(f"model must be a torch.nn.Module; got a {type(model).__name__}")
    if not isinstance(config, STLConfig):
        raise ConversionError(f"config must be an STLConfig; got {config!r}")
    if filter_fn is not None and not callable(filter_fn):
        raise ConversionError(f"filter_fn must be a function of (module, name); got {filter_fn!r}")


def _configs(
    found: Sequence[Candidate], config: STLConfig, layer_configs: Mapping[str, STLConfig | None] | None
) -> dict[nn.Linear, STLConfig]:
    """Layer → its config; those to be left dense are missing."""
    wanted = {} if layer_configs is None else layer_configs
    if not isinstance(wanted, Mapping):
        raise ConversionError(f"layer_configs must be a dict of patterns to STLConfig or None; got {layer_configs!r}")
    first: dict[nn.Linear, STLConfig | None] = {}
    for pattern, chosen in wanted.items():
        if not isinstance(pattern, str) or not isinstance(chosen, STLConfig | None):
            raise ConversionError(f"layer_configs takes patterns to STLConfig or None; got {pattern!r}: {chosen!r}")
        layers = [candidate.layer for candidate in matching(pattern, found, "layer_configs")]
        if all(layer in first for layer in layers):
            raise ConversionError(
                f"layer_configs: earlier patterns match all that {pattern!r} matches; put it before them"
            )
        for layer in layers:
            first.setdefault(layer, chosen)
    everything = {candidate.layer: first.get(candidate.layer, config) for candidate in found}
    return {layer: chosen for layer, chosen in everything.items() if chosen is not None}


def quantize_fp8(model: nn.Module) -> Conversion:
    """Let the STL layers of `model`, in place, do their products in fp8 (e4m3). `undo()` puts the layers back.

    For inference on GPUs with fp8 (compute capability 8.9 or later), where its products are twice as fast as in bfloat16;
    it runs on CPUs too, slowly, to try what it does to a model's results. MLPs then run layer by layer.

    Raises:
        ConversionError: there is no STL layer, or the model is one itself.
    """
    layers = {name: module for name, module in modules_by_name(model).items() if type(module) is STLLinear}
    if "" in layers:
        raise ConversionError("the model is itself an STL layer; use STLLinearFP8 on it")
    skipped = {name: reason for name, layer in layers.items() if (reason := _not_in_fp8(layer)) is not None}
    chosen = {name: layer for name, layer in layers.items() if name not in skipped}
    if not chosen:
        raise ConversionError(
            f"{type(model).__name__} has no STL layer that takes fp8; convert it first"
            + "".join(f"; {label}: {reason}" for label, reason in grouped(skipped))
        )
    made = {layer: STLLinearFP8(layer) for layer in dict.fromkeys(chosen.values())}  # one used twice stays one
    converted: dict[str, nn.Module] = {name: made[layer] for name, layer in chosen.items()}
    conversion = Conversion(converted, skipped, _undo=[replace_modules(model, converted), partial(changed, model)])
    changed(model)
    return conversion


def _not_in_fp8(layer: STLLinear) -> str | None:
    if layer.config.encoder_scope != "layer":
        return "it has an encoder for each column tile, for which there are no fp8 products"
    if layer.config.mixing == "causal" and layer.config.mixes_in_tiles:
        return "rows of a causal tile would see later ones by the scale they share"
    return "it has hooks, which would be lost" if has_own_hooks(layer) else None
