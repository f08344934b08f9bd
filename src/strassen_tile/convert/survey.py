"""Which layers of a model a conversion would replace, and why not the others; the model is not changed."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parameter import is_lazy

from strassen_tile.convert.influence import Mixing
from strassen_tile.convert.interference import hazards
from strassen_tile.convert.observe import Calls, observe
from strassen_tile.convert.running import evaluating, guinea_pig, run, tensors
from strassen_tile.convert.select import Candidate, Filter, at, candidates, others, reasons
from strassen_tile.errors import ConversionError
from strassen_tile.nn import STLConfig

Pays = Callable[[nn.Linear, list[tuple[int, ...]]], str | None]  # of a layer and its input shapes: why it does not pay


@dataclass(frozen=True)
class Survey:
    """What a conversion would do to a model.

    Attributes:
        chosen: the layers to replace.
        skipped: name → why not, of all others.
        calls: name → what each layer was fed; None without example inputs.
        dangers: name → what its rows would see, of those skipped for that.
    """

    chosen: list[Candidate]
    skipped: dict[str, str]
    calls: Mapping[str, Calls] | None
    dangers: dict[str, str] = field(default_factory=dict)


def survey(
    model: nn.Module,
    *,
    example_inputs: object = None,
    filter_fn: Filter | None = None,
    mixing: Mixing | None = None,
    force_mixing: Sequence[str] = (),
    pays: Pays | None = None,
    effort: int = 1,
) -> Survey:
    """Which layers `swap` would replace, and why not the others. The model is not changed.

    Raises:
        ConversionError: the model is itself a linear layer, force_mixing matches none, or rows would mix and there are no
            example_inputs.
    """
    if example_inputs is not None and any(is_lazy(p) for p in model.parameters()):
        with evaluating(model):
            run(model, example_inputs)  # lazy layers take their sizes from the first call
    found = candidates(model)
    if any("" in candidate.names for candidate in found):
        raise ConversionError("the model is itself a linear layer; use STLLinear.from_linear on it")
    names = [candidate.name for candidate in found]
    force_mixing = (force_mixing,) if isinstance(force_mixing, str) else force_mixing
    if not isinstance(force_mixing, Collection) or not all(isinstance(pattern, str) for pattern in force_mixing):
        raise ConversionError(f"force_mixing takes names of layers, or patterns; got {force_mixing!r}")
    forced = [name for pattern in force_mixing for name in fnmatch.filter(names, pattern)]
    for pattern in force_mixing:
        if not fnmatch.filter(names, pattern):
            raise ConversionError(f"force_mixing: {pattern!r} matches no linear layer; there are {', '.join(names)}")
    calls: Mapping[str, Calls] | None = None
    if example_inputs is not None:
        with guinea_pig(model) as double:
            calls = observe(double, {name: at(double, name) for name in names}, example_inputs)
    skipped = reasons(model, found, filter_fn=filter_fn, calls=calls, mixes_rows=mixing is not None)
    skipped.update(others(model))
    chosen = [candidate for candidate in found if candidate.name not in skipped]
    if pays is not None and calls is not None:
        losses = {candidate.name: pays(candidate.layer, calls[candidate.name].shapes) for candidate in chosen}
        skipped.update({name: loss for name, loss in losses.items() if loss is not None})
    dangers: dict[str, str] = {}
    mixed = {} if mixing is None else {name: mixing for name in names if name not in skipped}
    if mixing is not None and mixed:
        if example_inputs is None:
            raise ConversionError(_no_evidence(model, mixing.rows))
        if any(t.is_meta for t in (*model.parameters(), *tensors(example_inputs))):
            raise ConversionError(
                "on the meta device nothing can be run to see where rows may mix; convert a small model of the same "
                "architecture with numbers, or use mixing='none'"
            )
        with guinea_pig(model) as double:
            layers = {name: at(double, name) for name in names}
            found_out = hazards(double, layers, mixed, example_inputs, forced=forced, effort=effort)
        dangers = {name: danger.reason for name, danger in found_out.items()}
        skipped.update(dangers)
    return Survey([candidate for candidate in found if candidate.name not in skipped], skipped, calls, dangers)


def mixing_of(config: STLConfig) -> Mixing | None:
    """How rows mix under a config; None if they do not."""
    return Mixing(config.pqs[0], config.mixing == "causal") if config.mixes_rows else None


def _no_evidence(model: nn.Module, rows: int) -> str:
    brings = getattr(model, "dummy_inputs", None) is not None
    return (
        f"this would mix the {rows} rows of a tile, and only a run shows where that lets no row see what it must not (later "
        "tokens, other samples): pass example_inputs, what the model is called with, best two samples or more"
        + (" (this model brings some: example_inputs=model.dummy_inputs)" if brings else "")
        + ". STLConfig(mixing='none') keeps rows apart and needs none"
    )
