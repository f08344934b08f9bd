"""Which layers of a model would pay on this machine: `strassen-tile plan`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from strassen_tile.convert import convert
from strassen_tile.convert.layers import candidates, others
from strassen_tile.convert.running import leaves
from strassen_tile.convert.select import mixing_of, select
from strassen_tile.cost import Machine
from strassen_tile.errors import ConfigError, STLError, shape_text
from strassen_tile.experiments.loading import said
from strassen_tile.nn import STLConfig
from strassen_tile.records import Row


@dataclass(frozen=True)
class Layer:
    """A linear layer to plan for.

    Attributes:
        name: what the model calls it.
        rows: N, samples and all, of each call.
        features: K and M.
        skipped: why `convert` would leave it, if it would.
    """

    name: str
    rows: tuple[int, ...]
    features: tuple[int, int]
    skipped: str | None = None


def layers_of(model: nn.Module, config: STLConfig, *, rows: int, example_inputs: object = None) -> list[Layer]:
    """The linear layers of `model`, and what `convert` decides about them: in a dry run of it, or without running the model.

    Args:
        model: any module; on the meta device if only shapes matter.
        config: what they would be converted to.
        rows: N each layer is fed, samples and all; replaced by what is seen where `example_inputs` are given.
        example_inputs: as for `convert`.

    Raises:
        ConversionError: `convert` would refuse the model whatever it is run on.
        ConfigError: it says that it is causal, and the config mixes rows both ways; or it does not run on the example inputs.
    """
    if example_inputs is None:
        _refuse_causal(model, config)
        how = mixing_of(config)
        mixing = {} if how is None else dict.fromkeys([c.name for c in candidates(model)], how)
        skipped, calls = select(model, mixing=mixing).skipped, dict[str, list[tuple[int, ...]]]()
    else:
        try:
            done = convert(model, config, example_inputs=example_inputs, dry_run=True)
        except STLError:
            raise
        except Exception as error:  # whatever a model does with inputs that are none for it
            raise ConfigError(f"{type(model).__name__} does not run on these inputs: {said(error)}") from error
        skipped, calls = done.skipped, done.calls
    return [
        Layer(
            candidate.name,
            (rows,)
            if example_inputs is None
            else tuple(math.prod(shape[:-1]) for shape in calls.get(candidate.name, [])),
            (candidate.layer.in_features, candidate.layer.out_features),
            skipped.get(candidate.name),
        )
        for candidate in candidates(model)
    ]


def _refuse_causal(model: nn.Module, config: STLConfig) -> None:
    """Raise ConfigError for a model that says of itself that it is causal, if rows would mix both ways."""
    parts = _causal_parts(model) if config.sees_later_rows else set()
    for candidate in candidates(model):
        if any(part in ("", candidate.name) or candidate.name.startswith(f"{part}.") for part in parts):
            raise ConfigError(
                f"{type(model).__name__} says that it is, or holds, a causal language model or decoder ({candidate.name} is in "
                "it), and with --mixing sequence a token would see later ones: convert refuses that. Plan with --mixing none "
                "or --mixing causal, or give --inputs to see which layers are concerned"
            )


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


def layers_of_shapes(shapes: Sequence[tuple[int, int, int]]) -> list[Layer]:
    """The same for shapes N×K×M given by the user."""
    return [Layer("x".join(map(str, shape)), shape[:1], shape[1:]) for shape in shapes]


def notes(model: nn.Module, config: STLConfig, example_inputs: object = None) -> list[str]:
    """What the rows of a plan do not say."""
    said = [f"Not planned for: {count} that {why}." for why, count in Counter(others(model).values()).items()]
    if example_inputs is not None:
        shapes = ", ".join(f"{name} {shape_text(t.shape)}".lstrip() for name, t in leaves(example_inputs))
        said.append(f"N, and which rows may mix, are from runs on inputs of these shapes: {shapes}.")
    elif config.mixes_rows:
        said.append(
            "The model was not run. convert, which is given example_inputs, also leaves layers whose rows must not mix (of "
            "several samples, causal, in windows), layers fed 2-D inputs, and heads under unusual names: give --inputs to see."
        )
    return said


def plan(
    model: nn.Module,
    config: STLConfig,
    machine: Machine,
    *,
    rows: int,
    min_speedup: float = 1.0,
    example_inputs: object = None,
    name: str = "forward",
) -> list[Row]:
    """`decide` for the layers of `layers_of`."""
    layers = layers_of(model, config, rows=rows, example_inputs=example_inputs)
    return decide(layers, config, machine, min_speedup=min_speedup, name=name)


def decide(
    layers: Sequence[Layer], config: STLConfig, machine: Machine, *, min_speedup: float = 1.0, name: str = "forward"
) -> list[Row]:
    """One record a layer: layer, shape, decision ("convert" or "leave"), reason, predicted_speedup.

    Times are seconds of all calls of a layer together; `n` and `shape` are those of the first.

    Args:
        layers: of `layers_of` or `layers_of_shapes`.
        config: tile and rank.
        machine: its rates.
        min_speedup: convert where the prediction is at least this.
        name: "forward" or "step".
    """
    return [_record(layer, config, machine, min_speedup, name) for layer in layers]


def _record(layer: Layer, config: STLConfig, machine: Machine, min_speedup: float, name: str) -> Row:
    n, (k, m) = layer.rows[0] if layer.rows else 0, layer.features
    times = [machine.linear(rows, k, m, config.pqs, config.rank, name) for rows in layer.rows]
    dense, stl = sum(one for one, _ in times), sum(one for _, one in times)
    speedup = dense / stl if stl else 0.0  # a layer that is not called takes no time
    decision, reason = "convert", f"predicted {speedup:.2f}×"
    if layer.skipped is not None:
        decision, reason = "leave", layer.skipped
    elif speedup < min_speedup:
        decision, reason = "leave", f"predicted {speedup:.2f}× is below {min_speedup:g}×"
    return {
        "layer": layer.name, "shape": f"{n}x{k}x{m}", "n": n, "k": k, "m": m, "calls": len(layer.rows),
        "tile": "x".join(map(str, config.pqs)), "rank": config.rank, "pass": name, "device": machine.device,
        "dtype": machine.dtype, "decision": decision, "reason": reason, "predicted_speedup": speedup,
        "predicted_dense_s": dense, "predicted_s": stl,
    }  # fmt: skip
