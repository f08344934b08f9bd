"""A trial of replacements on a copy of the model, before the model itself is touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from strassen_tile.convert.interference import Hazard
from strassen_tile.convert.running import evaluating, guinea_pig, run
from strassen_tile.convert.select import Candidate, at, place_of
from strassen_tile.convert.verify import surprise
from strassen_tile.errors import ConversionError

Attach = Callable[[nn.Module], object]  # what else a conversion puts on a model


def failures(
    model: nn.Module,
    replacements: Mapping[Candidate, nn.Module],
    example_inputs: object,
    attach: Attach | None = None,
) -> dict[Candidate, str]:
    """The candidates that the model does not run without, or still calls when something else stands in their place, or
    through which padding would reach what it does not reach.

    Args:
        model: left as it is.
        replacements: candidate → what is to stand there.
        example_inputs: what the model is run on.
        attach: called on a copy with the replacements in place; for layers that zero padding rows.

    Raises:
        ConversionError: it runs with each replaced alone, but not with all of them.
    """
    changed = {candidate: layer for candidate, layer in replacements.items() if layer is not candidate.layer}
    found: dict[Candidate, str] = {}
    while changed:
        error, bypassed = _run_with(model, changed, example_inputs, attach)
        for candidate in bypassed:
            found[candidate] = (
                "is called past its name (through a list, or another reference): it would go on unchanged"
            )
            del changed[candidate]
        if error is None and not bypassed:
            break
        if error is not None and not bypassed:
            alone = {c: _run_with(model, {c: layer}, example_inputs, attach)[0] for c, layer in changed.items()}
            bad = {c: why for c, why in alone.items() if why is not None}
            if not bad:
                raise ConversionError(
                    f"{type(model).__name__} does not run with its layers replaced, though with each one alone: "
                    f"{_said(error)}. Leave some out with filter_fn"
                ) from error
            for candidate, why in bad.items():
                found[candidate] = f"the model does not run with it replaced: {_said(why)}"
                del changed[candidate]
    if attach is not None and changed:
        found.update(_padding_leaks(model, changed, example_inputs, attach))
    return found


def _padding_leaks(
    model: nn.Module, replacements: Mapping[Candidate, nn.Module], example_inputs: object, attach: Attach
) -> dict[Candidate, str]:
    """The layers through which padding reaches an output: those that no mask of the call tells which rows to zero."""

    def danger(some: Mapping[Candidate, nn.Module]) -> Hazard | None:
        with guinea_pig(model) as apart, guinea_pig(model) as double:
            _put(double, some)
            attach(double)
            with guinea_pig(double) as mixed:  # the layers themselves are not to be changed
                return surprise(apart, mixed, example_inputs, only_padding=True)

    found: dict[Candidate, str] = {}
    left = dict(replacements)
    while left and (whole := danger(left)) is not None:
        alone = {c: why for c, layer in left.items() if (why := danger({c: layer})) is not None}
        for candidate, why in (alone or {next(reversed(left)): whole}).items():
            found[candidate] = f"no mask of the call tells it which rows are padding: {why.reason}"
            del left[candidate]
    return found


def _put(model: nn.Module, replacements: Mapping[Candidate, nn.Module]) -> None:
    for candidate, layer in replacements.items():
        for name in candidate.names:
            parent, child = place_of(model, name)
            parent._modules[child] = layer


def _run_with(
    model: nn.Module,
    replacements: Mapping[Candidate, nn.Module],
    example_inputs: object,
    attach: Attach | None,
) -> tuple[Exception | None, list[Candidate]]:
    """What goes wrong in a run of a copy with the replacements in place, and the candidates it calls all the same."""
    called: list[Candidate] = []

    def note(candidate: Candidate) -> Callable[..., None]:
        return lambda *_: called.append(candidate)

    with guinea_pig(model) as double:
        handles: list[Any] = []
        for candidate in replacements:
            handles.append(at(double, candidate.name).register_forward_pre_hook(note(candidate)))
        _put(double, replacements)
        if attach is not None:
            attach(double)
        error: Exception | None = None
        try:
            with evaluating(double):
                run(double, example_inputs)
        except Exception as raised:  # whatever a model does when a layer of it is another
            error = raised
        finally:
            for handle in handles:
                handle.remove()
    return error, list(dict.fromkeys(called))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
