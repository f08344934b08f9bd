"""Models with replaced layers, run on copies: whether they run, call what was put there, and depend on nothing new."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from strassen_tile.convert.evidence import Evidence
from strassen_tile.convert.influence import Base, Watch, without_matrices
from strassen_tile.convert.leaks import Leak, Rule, culprits
from strassen_tile.convert.places import batches, real_rows, unfollowed
from strassen_tile.convert.replace import modules_by_name, replace_modules
from strassen_tile.convert.running import evaluating, run, scratch_copy, widen
from strassen_tile.errors import ConversionError
from strassen_tile.nn.base import TileLayer, follows_padding

Attach = Callable[[nn.Module], object]  # what else a conversion puts on a model


def failures(
    model: nn.Module, replacements: Mapping[str, nn.Module], example_inputs: object, attach: Attach | None = None
) -> dict[str, str]:
    """The layers that the model does not run without, or still calls when something else stands in their place, or through
    which padding would reach what it does not reach; with why.

    Args:
        model: left as it is.
        replacements: name → what is to stand there.
        example_inputs: what the model is run on.
        attach: called on a copy with the replacements in place; for layers that zero padding rows.

    Raises:
        ConversionError: it runs with each replaced alone, but not with all of them.
    """
    modules = modules_by_name(model)
    changed = {name: layer for name, layer in replacements.items() if layer is not modules[name]}
    found: dict[str, str] = {}
    while changed:
        error, bypassed = _run_with(model, changed, example_inputs, attach)
        failed = dict.fromkeys(
            bypassed, "is called past its name (through a list, or another reference): it would go on unchanged"
        )
        if error is not None and not bypassed:
            alone = {
                name: _run_with(model, {name: layer}, example_inputs, attach)[0] for name, layer in changed.items()
            }
            failed = {n: f"the model does not run with it replaced: {_said(why)}" for n, why in alone.items() if why}
            if not failed:
                raise ConversionError(
                    f"{type(model).__name__} does not run with its layers replaced, though with each one alone: "
                    f"{_said(error)}. Leave some out with filter_fn"
                ) from error
        if not failed:
            break
        found.update(failed)
        changed = {name: layer for name, layer in changed.items() if name not in failed}
    if attach is None:
        return found
    mixing = {name: layer for name, layer in changed.items() if follows_padding(layer)}
    if other := unfollowed(model, example_inputs):
        # Causal tiles stand on the right padding that they must not see; what comes before a row, a token mix would let it see.
        exposed = [name for name, layer in mixing.items() if not _only_causal_tiles(layer)]
        return found | dict.fromkeys(
            exposed,
            f"{other} says which rows are padding, and is not followed: leave it out of example_inputs, and hold the mask in "
            "`with strassen_tile.padding(model, mask)` for each call",
        )
    if not real_rows(model, example_inputs):
        return found

    def padding_leak(some: Mapping[str, nn.Module]) -> Leak | None:
        with scratch_copy(model) as apart, scratch_copy(model) as mixed:
            if apart is mixed:
                return Leak("the model cannot be copied, so it cannot be held against itself with rows apart", False)
            replace_modules(mixed, some)
            attach(mixed)
            with scratch_copy(mixed) as copy:  # the layers themselves are not to be changed
                return new_dependence(apart, copy, example_inputs, only_padding=True)

    reason = "no mask of the call tells it which rows are padding"
    return found | {name: f"{reason}: {leak.reason}" for name, leak in culprits(mixing, padding_leak).items()}


def _only_causal_tiles(layer: nn.Module) -> bool:
    return isinstance(layer, TileLayer) and layer.config.mixing == "causal" and layer.config.token_mix == "none"


def _run_with(
    model: nn.Module, replacements: Mapping[str, nn.Module], example_inputs: object, attach: Attach | None
) -> tuple[Exception | None, list[str]]:
    """What goes wrong in a run of a copy with the replacements in place, and the old layers that it calls all the same."""
    called: dict[str, None] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.update({name: None})

    with scratch_copy(model) as copy:
        modules = modules_by_name(copy)
        handles: list[Any] = [modules[name].register_forward_pre_hook(note(name)) for name in replacements]
        replace_modules(copy, replacements)
        if attach is not None:
            attach(copy)
        error: Exception | None = None
        try:
            with evaluating(copy):
                run(copy, example_inputs)
        except Exception as raised:  # whatever a model does when a layer of it is another
            error = raised
        finally:
            for handle in handles:
                handle.remove()
    return error, list(called)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def new_dependence(
    apart: nn.Module, mixed: nn.Module, example_inputs: object, *, effort: int = 1, only_padding: bool = False
) -> Leak | None:
    """An output of `mixed` that changes with a place of the inputs with which that of `apart` never does.

    Both are copies, whose parameters are changed. The layers of `mixed` are the real ones, which zero the rows that the call's
    mask calls padding, so that places in the padding are tried too.

    Args:
        apart: the model with layers that keep rows apart.
        mixed: the same model with those that mix them.
        example_inputs: of either.
        effort: how many times as many places as usual.
        only_padding: whether only places in the padding are tried.
    """
    inputs = widen(apart, example_inputs)
    widen(mixed, example_inputs)
    originals = {name: p.detach().clone() for name, p in apart.named_parameters()}
    starts = {name: p.detach().clone() for name, p in mixed.named_parameters()}
    with evaluating(apart), evaluating(mixed):
        linears: Mapping[str, nn.Module] = {name: m for name, m in apart.named_modules() if isinstance(m, nn.Linear)}
        watch, real = Watch(apart, {**without_matrices(apart), **linears}), Watch(mixed, {})
        for given, only_samples in batches(apart, inputs)[: 1 if only_padding else None]:
            evidence = Evidence(
                watch, originals, given, effort=effort, only_samples=only_samples, only_padding=only_padding
            )
            places, masks = list(evidence.seen), real_rows(apart, given)
            if not places:
                continue
            base = real.perturbed_base(given, starts, seed=0)
            leak = Rule(evidence).of_runs(places, partial(_changed, real, base, masks))
            if leak is not None:
                return leak
    return None


def _changed(watch: Watch, base: Base, masks: Sequence[Tensor], inputs: object) -> list[Tensor]:
    """Which elements of the outputs change, without those of rows that a mask calls padding: these nobody reads."""
    outputs = watch.changes(inputs, base).outputs
    for real in masks:
        outputs = [
            o & real.to(o.device).view(*real.shape, *[1] * (o.ndim - 2)) if o.shape[:2] == real.shape else o
            for o in outputs
        ]
    return outputs
