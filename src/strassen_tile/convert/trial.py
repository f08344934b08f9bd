"""A trial of replacements on a copy of the model, before the model itself is touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from strassen_tile.convert.running import evaluating, guinea_pig, run
from strassen_tile.convert.select import Candidate, place_of
from strassen_tile.errors import ConversionError


def failures(
    model: nn.Module, replacements: Mapping[Candidate, nn.Module], example_inputs: object
) -> dict[Candidate, str]:
    """The candidates that the model does not run without, or still calls when something else stands in their place.

    Raises:
        ConversionError: it runs with each replaced alone, but not with all of them.
    """
    changed = {candidate: layer for candidate, layer in replacements.items() if layer is not candidate.layer}
    found: dict[Candidate, str] = {}
    while changed:
        error, bypassed = _run_with(model, changed, example_inputs)
        for candidate in bypassed:
            found[candidate] = (
                "is called past its name (through a list, or another reference): it would go on unchanged"
            )
            del changed[candidate]
        if error is None:
            return found
        if not bypassed:
            alone = {c: _run_with(model, {c: layer}, example_inputs)[0] for c, layer in changed.items()}
            bad = {c: why for c, why in alone.items() if why is not None}
            if not bad:
                raise ConversionError(
                    f"{type(model).__name__} does not run with its layers replaced, though with each one alone: "
                    f"{_said(error)}. Leave some out with filter_fn"
                ) from error
            for candidate, why in bad.items():
                found[candidate] = f"the model does not run with it replaced: {_said(why)}"
                del changed[candidate]
    return found


def _run_with(
    model: nn.Module, replacements: Mapping[Candidate, nn.Module], example_inputs: object
) -> tuple[Exception | None, list[Candidate]]:
    """What goes wrong in a run of a copy with the replacements in place, and the candidates it calls all the same."""
    called: list[Candidate] = []

    def note(candidate: Candidate) -> Callable[..., None]:
        return lambda *_: called.append(candidate)

    with guinea_pig(model) as double:
        handles: list[Any] = []
        for candidate in replacements:
            handles.append(double.get_submodule(candidate.name).register_forward_pre_hook(note(candidate)))
        for candidate, layer in replacements.items():
            for name in candidate.names:
                parent, child = place_of(double, name)
                parent._modules[child] = layer
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
