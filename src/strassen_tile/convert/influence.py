"""What depends on what in a model, found by running it: which rows of its layers' inputs, and which of its outputs, change.

A row is one of dimension −2 of what a linear layer is fed. Runs draw the same random numbers; they differ where they differ by
more than rounding does (products of other sizes round otherwise) and ten times more than two runs on the same input (a GPU's
atomic sums). Parameters are shaken on a copy, and activations that switch off are smoothed, so that neither a gate which starts
at zero nor a dead unit hides a dependence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from strassen_tile.convert.running import run, tensors
from strassen_tile.errors import ConversionError

_SWITCHES = {
    F.relu, torch.relu, Tensor.relu, F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid, F.threshold, torch.threshold,
}  # fmt: skip
_SWITCHES_IN_PLACE = {torch.relu_, Tensor.relu_, F.relu_, F.relu6, F.hardtanh_} - _SWITCHES
# Relative to the largest number of a tensor: differences that rounding makes.
_ROUNDING = {torch.float64: 2.0**-40, torch.float32: 2.0**-17}
SHAKES = (1.0, 0.1, 0.0)  # tried in turn until no number overflows
_UNEVEN_OUTPUTS = (
    "the shapes of the model's outputs depend on the values of its inputs or parameters, so that no two runs can be compared. "
    "Convert a part of the model whose shapes do not, or use mixing='none'"
)


class Call(NamedTuple):
    """One call of a layer: its name and which of its calls it was."""

    name: str
    at: int


class Row(NamedTuple):
    """A row of what a layer is fed in a call: `lead` counts the dimensions before −2 as one."""

    call: Call
    lead: int
    row: int


class Mixing(NamedTuple):
    """How the rows of a layer would mix: those of a tile, or of them only earlier ones into later ones."""

    rows: int
    causal: bool


@dataclass
class Record:
    """One run.

    Attributes:
        inputs: every call's input as (lead, rows, features), in the order of the calls.
        flat: the calls whose input has two dimensions or fewer: their rows are a batch.
        outputs: the tensors that the model returned.
    """

    inputs: dict[Call, Tensor] = field(default_factory=dict)
    flat: set[Call] = field(default_factory=set)
    outputs: list[Tensor] = field(default_factory=list)


@dataclass
class Changes:
    """Where two runs differ.

    Attributes:
        rows: call → bool (lead, rows); calls whose shape differs between the runs, or that only one has, are left out.
        outputs: a bool tensor for each output tensor.
        uneven: the calls left out.
    """

    rows: dict[Call, Tensor]
    outputs: list[Tensor]
    uneven: set[str] = field(default_factory=set)

    def joined(self, other: Changes) -> Changes:
        """What either found. Calls and outputs must be alike in shape in both to be compared at all."""
        if [t.shape for t in self.outputs] != [t.shape for t in other.outputs]:
            raise ConversionError(_UNEVEN_OUTPUTS)
        rows = {
            c: r | other.rows[c] for c, r in self.rows.items() if c in other.rows and other.rows[c].shape == r.shape
        }
        uneven = {call.name for call in (*self.rows, *other.rows) if call not in rows}
        outputs = [a | b for a, b in zip(self.outputs, other.outputs, strict=True)]
        return Changes(rows, outputs, uneven | self.uneven | other.uneven)


class Watch:
    """Runs a model, recording what some of its modules are fed and what it returns.

    Args:
        model: to run, in eval mode already.
        layers: what to watch, by name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.model, self.layers = model, layers
        self.runs = 0

    def record(
        self, inputs: object, *, disturbed: Row | None = None, mixed: Mapping[str, Mixing] | None = None
    ) -> Record:
        """One run, with noise added to a layer's output at the row `disturbed`, or with rows of the layers `mixed` mixed."""
        record, counts = Record(), dict.fromkeys(self.layers, 0)
        self.runs += 1

        def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return None
            call = Call(name, counts[name])
            counts[name] += 1
            record.inputs[call] = _rows(x).detach().clone()
            if x.ndim < 3:
                record.flat.add(call)
            if mixed is None or name not in mixed or x.ndim < 3:
                return None
            y = mix_rows(x, mixed[name])
            return ((y, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): y})

        def after(name: str, output: Any) -> Any:
            if disturbed is None or disturbed.call != (name, counts[name] - 1) or not isinstance(output, Tensor):
                return None
            if _rows(output).shape[:2] != record.inputs[disturbed.call].shape[:2]:
                return None
            disturbed_output = output.clone(memory_format=torch.contiguous_format)
            row = _rows(disturbed_output)[disturbed.lead, disturbed.row]
            row += torch.randn(row.shape, generator=torch.Generator().manual_seed(1)).to(row) * (1 + output.abs().max())
            return disturbed_output

        with self._hooks(before, after), _Smoothed():
            record.outputs = [t.detach().clone() for t in tensors(run(self.model, inputs))]
        return record

    @contextmanager
    def _hooks(self, before: Any, after: Any) -> Iterator[None]:
        handles = []
        for name, layer in self.layers.items():
            handles.append(
                layer.register_forward_pre_hook(
                    lambda module, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
                )
            )
            handles.append(layer.register_forward_hook(lambda module, args, output, name=name: after(name, output)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Smoothed(TorchFunctionMode):
    """ReLU and its kin replaced by SiLU: what they let through of some inputs it lets through of all."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SWITCHES:
            return F.silu(args[0] if args else kwargs["input"])
        if func in _SWITCHES_IN_PLACE:
            return args[0].copy_(F.silu(args[0]))
        return func(*args, **kwargs)


def differences(before: Record, after: Record, noise: Record) -> Changes:
    """Where two runs differ by more than `before` and its repetition `noise` do.

    Raises:
        ConversionError: they return tensors of other shapes.
    """
    if [t.shape for t in before.outputs] != [t.shape for t in after.outputs]:
        raise ConversionError(_UNEVEN_OUTPUTS)
    same = [call for call, x in before.inputs.items() if call in after.inputs and after.inputs[call].shape == x.shape]
    uneven = {call.name for call in (*before.inputs, *after.inputs) if call not in same}
    rows = {call: _differ(before.inputs[call], after.inputs[call], noise.inputs.get(call)).any(dim=-1) for call in same}
    outputs = [_differ(a, b, c) for a, b, c in zip(before.outputs, after.outputs, noise.outputs, strict=True)]
    return Changes(rows, outputs, uneven)


def mix_rows(x: Tensor, mixing: Mixing) -> Tensor:
    """X (…, N, K) with the rows of each tile mixed by one fixed generic matrix: which rows meet is all that matters here."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.rand(mixing.rows, mixing.rows, generator=generator, dtype=torch.float64) + 0.5
    matrix = (matrix.tril() if mixing.causal else matrix).to(x)
    parts = [matrix[: tile.shape[-2], : tile.shape[-2]] @ tile for tile in x.split(mixing.rows, dim=-2)]
    return torch.cat(parts, dim=-2) if parts else x


@torch.no_grad()
def shake(model: nn.Module, originals: Mapping[str, Tensor], strength: float, seed: int) -> None:
    """Set every parameter to its original plus noise of its own scale, or of a usual start's where that is larger."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        before = originals[name]
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        usual = before.shape[-1] ** -0.5 if before.ndim > 1 else 1.0
        scale = strength * max(0.5 * float(before.double().square().mean().sqrt()), 0.3 * usual)
        noise = torch.randn(before.shape, generator=generator, dtype=torch.float64) * scale
        parameter.copy_(before + noise.to(before))


def finite(record: Record) -> bool:
    """Whether nothing in a run overflowed."""
    return all(bool(t.isfinite().all()) for t in (*record.inputs.values(), *record.outputs))


def _rows(x: Tensor) -> Tensor:
    """X (…, N, K) as (lead, N, K); a vector is one row."""
    x = x if x.ndim > 1 else x.unsqueeze(0)
    return x.reshape(-1, *x.shape[-2:]) if x.numel() else x.reshape(0, *x.shape[-2:])


def _differ(before: Tensor, after: Tensor, repeated: Tensor | None) -> Tensor:
    if not (before.is_floating_point() or before.is_complex()):
        return before != after
    wide = torch.complex128 if before.is_complex() else torch.float64
    a, b = before.to(wide), after.to(wide)
    slack = _ROUNDING.get(before.dtype, 0.0) * a.abs().nan_to_num(0.0, 0.0, 0.0).amax() if a.numel() else 0.0
    if repeated is not None and repeated.shape == before.shape:
        slack = slack + 10 * (a - repeated.to(wide)).abs().nan_to_num(0.0).amax() if a.numel() else 0.0
    return ~((a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= slack))
