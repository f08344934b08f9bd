"""In which settings a model is looked at: batch sizes, number format, and which of its modules are watched."""

from __future__ import annotations

import torch
from torch import nn

from strassen_tile.convert.influence import Watch
from strassen_tile.convert.places import repeated
from strassen_tile.convert.running import evaluating, leaves, mapped, run

_SAMPLES, _MOST_NUMBERS = 24, 2**18  # of the enlarged batch: a multiple of any small group, or of most if that is large

_LARGE = 20_000_000  # parameters


def passing(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hand on what they are fed in its shape (norms, activations, dropout): rows are seen there too."""
    return {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
        and not module._modules
        and all(p.ndim < 2 for p in module._parameters.values() if p is not None)
        and name
    }


def settings(watch: Watch, example_inputs: object) -> list[tuple[object, bool]]:
    """The inputs to try, and whether only samples matter: as given (one sample twice), and many samples."""
    sized = [t for _, t in leaves(example_inputs) if t.ndim]
    given = example_inputs
    if sized and all(t.shape[0] == 1 for t in sized if t.ndim >= min(2, max(u.ndim for u in sized))):
        doubled = _runs(watch, repeated(example_inputs, 2))
        given = example_inputs if doubled is None else doubled
    found = [(given, False)]
    numbers = sum(t.numel() / max(1, t.shape[0]) for t in sized)
    for many in (
        repeated(example_inputs, _SAMPLES if numbers * _SAMPLES <= _MOST_NUMBERS else _SAMPLES // 2),
        repeated(example_inputs, 2, dim=1) if any(t.ndim > 2 and t.shape[1] == 1 for t in sized) else None,
    ):
        if _runs(watch, many) is not None:
            found.append((many, True))
    return found


def _runs(watch: Watch, inputs: object) -> object | None:
    try:
        if inputs is not None:
            run(watch.model, inputs)
    except Exception:  # a model may refuse other batch sizes in any way; then there are no such batches
        return None
    return inputs


def widened(model: nn.Module, example_inputs: object) -> object:
    """The inputs, and the model in place, in float64 or float32 where it runs in that: few bits would hide what is small."""
    as_given = [(p, p.data) for p in (*model.parameters(), *model.buffers())]

    def cast(dtype: torch.dtype) -> object:
        return mapped(example_inputs, lambda t: t.to(dtype) if t.is_floating_point() else t, lambda other: other)

    large = sum(p.numel() for p in model.parameters()) > _LARGE  # where float64 would take minutes
    for dtype in (torch.float32,) if large else (torch.float64, torch.float32):
        model.to(dtype)
        wide = cast(dtype)
        try:
            with evaluating(model):
                run(model, wide)
        except Exception:  # the model asks for its own dtype somewhere, or takes no such inputs: then it says so below
            continue
        return wide
    for tensor, data in as_given:
        tensor.data = data
    return example_inputs
