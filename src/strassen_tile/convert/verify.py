"""Whether a model with its row-mixing layers in place lets an output depend on more than the same model with rows apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from strassen_tile.convert.evidence import Evidence
from strassen_tile.convert.influence import SHAKES, Watch, shake
from strassen_tile.convert.interference import Hazard, Rule
from strassen_tile.convert.places import change, real_rows
from strassen_tile.convert.running import evaluating
from strassen_tile.convert.settings import passing, settings, widened
from strassen_tile.errors import ConversionError


def surprise(
    apart: nn.Module, mixed: nn.Module, example_inputs: object, *, effort: int = 1, only_padding: bool = False
) -> Hazard | None:
    """Why not: an output of `mixed` that changes with a place of the inputs with which that of `apart` never does.

    Both are copies, whose parameters are changed. The layers of `mixed` are the real ones, which zero the rows that the call's
    mask calls padding, so that places in the padding are tried too.

    Args:
        apart: the model with layers that keep rows apart.
        mixed: the same model with those that mix them.
        example_inputs: of either.
        effort: how many times as many places as usual.
        only_padding: whether only places in the padding are tried.
    """
    if only_padding and not real_rows(apart, example_inputs):
        return None
    inputs = widened(apart, example_inputs)
    widened(mixed, example_inputs)
    originals = {name: p.detach().clone() for name, p in apart.named_parameters()}
    starts = {name: p.detach().clone() for name, p in mixed.named_parameters()}
    with evaluating(apart), evaluating(mixed):
        linears: Mapping[str, nn.Module] = {name: m for name, m in apart.named_modules() if isinstance(m, nn.Linear)}
        watch = Watch(apart, {**passing(apart), **linears})
        for given, only_samples in settings(watch, inputs)[: 1 if only_padding else None]:
            evidence = Evidence(
                watch, originals, given, effort=effort, only_samples=only_samples, only_padding=only_padding
            )
            places = list(evidence.seen)
            real, masks = Watch(mixed, {}), real_rows(apart, given)
            for strength in SHAKES if places else ():
                shake(mixed, starts, strength, seed=0)
                base = real.base(given)
                if base.finite:
                    break
            for place in places:
                try:
                    now = real.changes(change(given, place, 0), base)
                except ConversionError:
                    raise
                except Exception:  # a value that the model does not take, or an input that its layers refuse
                    continue
                for at, changed in enumerate(now.outputs):
                    if not evidence.depends(place, at, _of_real_rows(changed, masks)):
                        return Rule(evidence).described(at, _of_real_rows(changed, masks), place)
    return None


def _of_real_rows(changed: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Of an output's elements, those that are not of rows which a mask calls padding: these nobody reads."""
    for real in masks:
        if changed.ndim >= 2 and changed.shape[:2] == real.shape:
            changed = changed & real.to(changed.device).view(*real.shape, *[1] * (changed.ndim - 2))
    return changed
