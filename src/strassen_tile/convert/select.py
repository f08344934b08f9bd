"""Selection: which layers of a model a conversion would replace, and why not the others. The model is not changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from strassen_tile.convert.layers import Candidate, candidates, heads, others, unfit
from strassen_tile.convert.leaks import Leak, find_leaks
from strassen_tile.convert.perturb import Mixing
from strassen_tile.convert.replace import modules_by_name
from strassen_tile.convert.running import evaluating, run, scratch_copy, tensors
from strassen_tile.errors import ConversionError
from strassen_tile.nn import PaddingMask, STLConfig
from strassen_tile.nn.token_mix import BEFORE, TAPS

Filter = Callable[[nn.Module, str], bool]
Pays = Callable[[nn.Linear, list[tuple[int, ...]]], str | None]  # of a layer and its input shapes: why it does not pay


@dataclass
class Calls:
    """What happened to one layer while the examples ran.

    Attributes:
        shapes: of its input, a call each.
        is_output: whether the model's output is this layer's output, unchanged.
    """

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    is_output: bool = False


@dataclass(frozen=True)
class Selection:
    """What a conversion would do to a model.

    Attributes:
        chosen: the layers to replace.
        skipped: name → why not, of all others.
        calls: name → what each layer was fed; None without example inputs.
        leaks: name → what its rows would see, of those skipped for that.
    """

    chosen: list[Candidate]
    skipped: dict[str, str]
    calls: Mapping[str, Calls] | None
    leaks: dict[str, Leak]


def select(
    model: nn.Module,
    *,
    example_inputs: object = None,
    filter_fn: Filter | None = None,
    mixing: Mapping[str, Mixing],
    excluded: Mapping[str, str] | None = None,
    force_mixing: Sequence[str] = (),
    pays: Pays | None = None,
    effort: int = 1,
) -> Selection:
    """Which layers to replace, and why not the others.

    Without example inputs nothing is run, and what shows only in a run stays unknown: leaks between rows, 2-D inputs, heads
    under unusual names.

    Args:
        mixing: name → how the rows of its replacement would mix; layers that are missing here keep rows apart.
        excluded: name → why the caller leaves it out.
        effort: how many times as many places of the inputs as usual are changed.

    Raises:
        ConversionError: the model is itself a linear layer, force_mixing matches none, or rows would mix and the model has no
            numbers to run.
    """
    materialise(model, example_inputs)
    found = candidates(model)
    if any("" in candidate.names for candidate in found):
        raise ConversionError("the model is itself a linear layer; use STLLinear.from_linear on it")
    force_mixing = (force_mixing,) if isinstance(force_mixing, str) else force_mixing
    if not isinstance(force_mixing, Collection) or not all(isinstance(pattern, str) for pattern in force_mixing):
        raise ConversionError(f"force_mixing takes names of layers, or patterns; got {force_mixing!r}")
    forced = _forced(force_mixing, found)
    calls = None
    if example_inputs is not None:
        with scratch_copy(model) as copy:
            modules = modules_by_name(copy)
            calls = observe(copy, {c.name: modules[c.name] for c in found}, example_inputs)
    skipped = unfit(model, found)
    named_heads = set() if filter_fn is not None else heads(model, found)
    for candidate in found:
        name = candidate.name
        if name in skipped:
            continue
        if filter_fn is not None and not filter_fn(candidate.layer, name):
            skipped[name] = "excluded by filter_fn"
        elif excluded and name in excluded:
            skipped[name] = excluded[name]
        elif name in named_heads or (filter_fn is None and calls is not None and calls[name].is_output):
            skipped[name] = "a head: it makes the model's output"
        elif calls is not None and (reason := _unlike_rows(calls[name].shapes, name in mixing)):
            skipped[name] = reason
        elif pays is not None and calls is not None and (loss := pays(candidate.layer, calls[name].shapes)):
            skipped[name] = loss
    skipped.update(others(model))
    leaks: dict[str, Leak] = {}
    mixed = {c.name: mixing[c.name] for c in found if c.name in mixing and c.name not in skipped}
    if mixed and example_inputs is not None:
        if any(t.is_meta for t in (*model.parameters(), *tensors(example_inputs))):
            raise ConversionError(
                "on the meta device nothing can be run to see where rows may mix; convert a small model of the same "
                "architecture with numbers, or use mixing='none'"
            )
        with scratch_copy(model) as copy:
            modules = modules_by_name(copy)
            layers = {c.name: modules[c.name] for c in found}
            leaks = find_leaks(copy, layers, mixed, example_inputs, forced=forced, effort=effort)
        skipped.update({name: leak.reason for name, leak in leaks.items()})
    return Selection([candidate for candidate in found if candidate.name not in skipped], skipped, calls, leaks)


def materialise(model: nn.Module, example_inputs: object) -> None:
    """Let lazy layers take their sizes, which they do from the first call."""
    if example_inputs is not None and any(is_lazy(p) for p in model.parameters()):
        with evaluating(model):
            run(model, example_inputs)


def mixing_of(config: STLConfig) -> Mixing | None:
    """How rows mix under a config; None if they do not."""
    if not config.mixes_rows:
        return None
    before = BEFORE[config.token_mix]
    after = 0 if config.token_mix == "none" else TAPS - 1 - before
    return Mixing(config.pqs[0], config.mixing == "causal" or not config.mixes_in_tiles, before, after)


def padding_of(configs: Iterable[STLConfig]) -> PaddingMask:
    """What layers of these configs are told of their rows by."""
    all_of = list(configs)
    return PaddingMask(any(c.mixes_in_tiles for c in all_of), any(c.sees_later_rows for c in all_of))


def matching(pattern: str, found: Sequence[Candidate], argument: str) -> list[Candidate]:
    """The layers of which a name matches the pattern. Raises ConversionError if there is none."""
    chosen = [c for c in found if any(fnmatchcase(name, pattern) for name in c.names)]
    if not chosen:
        names = ", ".join(candidate.name for candidate in found)
        raise ConversionError(f"{argument}: {pattern!r} matches no linear layer; there are {names or 'none'}")
    return chosen


def _forced(patterns: Collection[str], found: Sequence[Candidate]) -> set[str]:
    """The layers whose every name is asked for: one that is shared may be safe to mix in one place and not in another."""
    asked = {c.name: c for pattern in patterns for c in matching(pattern, found, "force_mixing")}
    for candidate in asked.values():
        others = [n for n in candidate.names if not any(fnmatchcase(n, pattern) for pattern in patterns)]
        if others:
            named = ", ".join(candidate.names)
            raise ConversionError(
                f"force_mixing: one layer is called {named}, and {others[0]} is not asked for; name all of them, or none"
            )
    return set(asked)


def observe(model: nn.Module, layers: Mapping[str, nn.Module], example_inputs: object) -> dict[str, Calls]:
    """Run the model once on the examples and note the calls of its layers."""
    calls = {name: Calls() for name in layers}
    produced: dict[str, list[Tensor]] = {name: [] for name in layers}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs.get("input")
            if isinstance(x, Tensor) and isinstance(output, Tensor):
                calls[name].shapes.append(tuple(x.shape))
                produced[name].append(output)

        return hook

    handles = [layer.register_forward_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with evaluating(model):
            output = run(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    returned = {_memory(t) for t in tensors(output) if t.layout == torch.strided}
    for name, outputs in produced.items():
        calls[name].is_output = any(_memory(t) in returned for t in outputs if t.numel())
    return calls


def _memory(t: Tensor) -> tuple[int, int]:
    try:
        return t.untyped_storage()._cdata, t.numel()
    except NotImplementedError:  # of vmap, and other tensors without memory of their own
        return id(t), t.numel()


def _unlike_rows(shapes: Sequence[tuple[int, ...]], mixes: bool) -> str | None:
    """Why a layer fed these shapes is left as it is."""
    if not shapes:
        return "not called on the example inputs"
    flat = next((shape for shape in shapes if len(shape) < 3), None)
    return f"fed a 2-D input {flat}, whose rows are a batch" if mixes and flat is not None else None
