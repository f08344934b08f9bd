"""`check_mixing`: whether the row-mixing layers of a model, converted or built by hand, let something be seen that must not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from strassen_tile.convert.layers import candidates
from strassen_tile.convert.leaks import find_leaks
from strassen_tile.convert.perturb import Mixing
from strassen_tile.convert.replace import replace_modules
from strassen_tile.convert.running import scratch_copy
from strassen_tile.convert.select import mixing_of, select
from strassen_tile.convert.swap import grouped
from strassen_tile.convert.trial import new_dependence
from strassen_tile.errors import ConversionError
from strassen_tile.nn import STLConfig, STLLinearFP8
from strassen_tile.nn.base import TileLayer


@dataclass(frozen=True)
class MixingReport:
    """What `check_mixing` found. True if nothing is wrong.

    Attributes:
        safe: the layers whose rows meet nothing that the model, with rows apart, does not let them meet.
        unsafe: name → what a row, or an output, would see. "" stands for the model as a whole.
    """

    safe: list[str]
    unsafe: dict[str, str]

    def __bool__(self) -> bool:
        return not self.unsafe

    def __str__(self) -> str:
        head = f"{len(self.safe)} layers whose rows may mix, {len(self.unsafe)} whose rows must not"
        lines = [f"{name or 'the model'}: {why}" for name, why in grouped(self.unsafe)]
        return "\n".join([head, *lines])


def check_mixing(
    model: nn.Module, example_inputs: object, config: STLConfig | None = None, *, effort: int = 1
) -> MixingReport:
    """Whether rows mix in `model` that would not meet if its layers kept rows apart: the test that `convert` makes.

    Copies of the model are run with parts of the inputs changed, with its row-mixing layers (`STLLinear`, alone or in an
    `STLMLP`, and `baselines.MixedLinear`; check a model before `quantize_fp8`, whose layers round by tile row) and with layers
    in their place that keep rows apart. Nothing may depend on more with them than without.

        assert st.check_mixing(model, tokens)  # in a test of yours

    Args:
        model: left as it is. Without row-mixing layers, the question is which of its linear layers `convert` could give some.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments; two samples or more, a few tiles long.
        config: for a model without row-mixing layers: that of the conversion asked about; `STLConfig()` by default.
        effort: how many times as many places of the inputs are changed as usual. More find rarer dependences.

    Raises:
        ConversionError: there is nothing to check, the model holds layers in fp8 or cannot be copied, or its outputs cannot be
            compared from run to run.
    """
    if not isinstance(effort, int) or effort < 1:
        raise ConversionError(f"effort is a whole number from 1; got {effort!r}")
    layers = _row_mixing(model)
    if in_fp8 := [name for name, layer in layers.items() if isinstance(layer, STLLinearFP8)]:
        raise ConversionError(
            f"{in_fp8[0]} is in fp8, in which small changes are rounded away; check before quantize_fp8"
        )
    if not layers:
        return _ahead(model, example_inputs, config or STLConfig(), effort)
    mixing = {name: how for name, layer in layers.items() if (how := _mixing(layer)) is not None}
    with scratch_copy(model) as copy:
        _keep_apart(copy, layers)
        linears = {name: m for name, m in copy.named_modules() if isinstance(m, nn.Linear)}
        leaks = find_leaks(copy, linears, mixing, example_inputs, effort=effort)
    unsafe = {name: leak.reason for name, leak in leaks.items()}
    if not unsafe:
        with scratch_copy(model) as apart, scratch_copy(model) as mixed:
            if apart is mixed:
                raise ConversionError(
                    f"{type(model).__name__} cannot be copied, so it cannot be held against itself with rows apart; check it "
                    "before what keeps it from being copied (a lock, a process group) is put on it"
                )
            _keep_apart(apart, layers)
            leak = new_dependence(apart, mixed, example_inputs, effort=effort)
        if leak is not None:
            unsafe[""] = leak.reason
    return MixingReport([name for name in layers if name not in unsafe], unsafe)


def _row_mixing(model: nn.Module) -> dict[str, Any]:
    """The layers whose rows mix, outermost: what such a layer holds is part of it."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if _mixing(module) is not None and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def _mixing(layer: nn.Module) -> Mixing | None:
    if isinstance(layer, TileLayer):
        return mixing_of(layer.config)
    how = getattr(layer, "row_mixing", None)
    return how if isinstance(how, Mixing) else None


def _ahead(model: nn.Module, example_inputs: object, config: STLConfig, effort: int) -> MixingReport:
    """Which layers of a model without row-mixing ones could be given some."""
    how = mixing_of(config)
    if how is None:
        raise ConversionError("the model has no row-mixing layer, and the config does not mix rows: nothing to check")
    mixing = dict.fromkeys([candidate.name for candidate in candidates(model)], how)
    selection = select(model, example_inputs=example_inputs, mixing=mixing, effort=effort)
    return MixingReport(
        [candidate.name for candidate in selection.chosen], {n: leak.reason for n, leak in selection.leaks.items()}
    )


def _keep_apart(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Put dense layers of the same sizes where the row-mixing ones are."""
    made: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        like = next(t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point())
        dtype = like.dtype if like.dtype.itemsize > 1 else torch.float32
        made[name] = nn.Linear(layer.in_features, layer.out_features, device=like.device, dtype=dtype)
    replace_modules(model, made)
