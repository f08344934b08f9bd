"""In which settings a model is looked at: batch sizes, number format, and which of its modules are watched."""

from __future__ import annotations

import torch
from torch import nn

from strassen_tile.convert.influence import Watch
from strassen_tile.convert.places import leaves, repeated
from strassen_tile.convert.running import evaluating, mapped, run

_SAMPLES = 24  # of the enlarged batch: a multiple of any small group


def passing(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hand on what they are fed in its shape (norms, activations, dropout): rows are seen there too."""
    return {
        name: module
        for name, module in model.named_modules()
        if not module._modules and all(p.ndim < 2 for p in module._parameters.values() if p is not None) and name
    }


def settings(watch: Watch, example_inputs: object) -> list[tuple[object, bool]]:
    """The inputs to try, and whether only samples matter: as given (one sample twice), and many samples."""
    sized = [t for _, t in leaves(example_inputs) if t.ndim]
    found: list[tuple[object, bool]] = []
    doubled = None
    if sized and all(t.shape[0] == 1 for t in sized if t.ndim >= min(2, max(u.ndim for u in sized))):
        doubled = _runs(watch, repeated(example_inputs, 2))
    many = _runs(watch, repeated(example_inputs, _SAMPLES))
    found.append((example_inputs if doubled is None else doubled, False))
    return found if many is None else [*found, (many, True)]


def _runs(watch: Watch, inputs: object) -> object | None:
    try:
        if inputs is not None:
            watch.record(inputs)
    except Exception:  # a model may refuse other batch sizes in any way; then there are no such batches
        return None
    return inputs


def widened(model: nn.Module, example_inputs: object) -> object:
    """The inputs, and the model in place, in float64 or float32 where it runs in that: few bits would hide what is small."""
    as_given = [(p, p.data) for p in (*model.parameters(), *model.buffers())]

    def cast(dtype: torch.dtype) -> object:
        return mapped(example_inputs, lambda t: t.to(dtype) if t.is_floating_point() else t, lambda other: other)

    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        wide = cast(dtype)
        try:
            with evaluating(model):
                run(model, wide)
        except (RuntimeError, TypeError, ValueError):  # the model asks for its own dtype somewhere
            continue
        return wide
    for tensor, data in as_given:
        tensor.data = data
    return example_inputs
