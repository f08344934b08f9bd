"""What depends on what in a model, found by running it: which rows of its layers' inputs, and which of its outputs, change.

A row is one of dimension −2 of what a linear layer is fed. Runs draw the same random numbers; they differ where they differ by
more than rounding does (products of other sizes round otherwise) and ten times more than two runs on the same input (a GPU's
atomic sums). Parameters are perturbed on a copy, and activations that switch off are smoothed, so that neither a gate which
starts at zero nor a dead unit hides a dependence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from strassen_tile.convert.perturb import STRENGTHS, Mixing, SmoothSwitches, mix_rows, perturb_parameters
from strassen_tile.convert.running import run, tensors
from strassen_tile.errors import ConversionError

# Relative to the largest number of a tensor: differences that rounding makes.
_ROUNDING = {torch.float64: 2.0**-40, torch.float32: 2.0**-20}
_VARYING_OUTPUTS = (
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


@dataclass
class Base:
    """What runs are compared with.

    Attributes:
        inputs: every call's input as (lead, rows, features), in the order of the calls.
        flat: the calls whose input has two dimensions or fewer: their rows are a batch.
        outputs: the tensors that the model returned.
        noise: how far two runs on the same input differ, by call, and by the number of an output.
    """

    inputs: dict[Call, Tensor] = field(default_factory=dict)
    flat: set[Call] = field(default_factory=set)
    outputs: list[Tensor] = field(default_factory=list)
    noise: dict[Call | int, float] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether nothing overflowed."""
        return all(bool(t.isfinite().all()) for t in (*self.inputs.values(), *self.outputs))


@dataclass
class Changes:
    """Where a run differs from the base.

    Attributes:
        rows: call → bool (lead, rows); calls whose shape differs, or that only one has, are left out.
        outputs: a bool tensor for each output tensor.
        varying: the names of those left out.
    """

    rows: dict[Call, Tensor]
    outputs: list[Tensor]
    varying: set[str] = field(default_factory=set)

    def joined(self, other: Changes) -> Changes:
        """What either found. Calls and outputs must be alike in shape in both to be compared at all."""
        if [t.shape for t in self.outputs] != [t.shape for t in other.outputs]:
            raise ConversionError(_VARYING_OUTPUTS)
        rows = {
            c: r | other.rows[c] for c, r in self.rows.items() if c in other.rows and other.rows[c].shape == r.shape
        }
        varying = {call.name for call in (*self.rows, *other.rows) if call not in rows}
        outputs = [a | b for a, b in zip(self.outputs, other.outputs, strict=True)]
        return Changes(rows, outputs, varying | self.varying | other.varying)


class Watch:
    """Runs a model and sees what some of its modules are fed and what it returns.

    Args:
        model: to run, in eval mode already.
        layers: what to watch, by name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.model, self.layers = model, layers

    def base(self, inputs: object, *, mixed: Mapping[str, Mixing] | None = None) -> Base:
        """Two runs, the rows of the layers `mixed` mixed."""
        base = Base()

        def keep(call: Call, x: Tensor, flat: bool) -> None:
            base.inputs[call] = x.clone()
            if flat:
                base.flat.add(call)

        def again(call: Call, x: Tensor, flat: bool) -> None:
            base.noise[call] = _distance(base.inputs.get(call), x)

        base.outputs = [t.clone() for t in self._run(inputs, keep, mixed=mixed)]
        for at, output in enumerate(self._run(inputs, again, mixed=mixed)):
            base.noise[at] = _distance(base.outputs[at] if at < len(base.outputs) else None, output)
        return base

    def perturbed_base(self, inputs: object, originals: Mapping[str, Tensor], seed: int) -> Base:
        """The base after noise on the parameters, which the model keeps; weaker noise where numbers overflow.

        The first two seeds take the noise of a usual start, later ones twice that.
        """
        for strength in STRENGTHS if seed < 2 else (2.0, *STRENGTHS):
            perturb_parameters(self.model, originals, strength, seed)
            base = self.base(inputs)
            if base.finite:
                break
        return base

    def changes(
        self, inputs: object, base: Base, *, disturbed: Row | None = None, mixed: Mapping[str, Mixing] | None = None
    ) -> Changes:
        """Where a run differs from the base, with noise added to a layer's output at the row `disturbed` if there is one.

        Raises:
            ConversionError: it returns tensors of other shapes.
        """
        rows: dict[Call, Tensor] = {}
        seen: set[Call] = set()

        def compare(call: Call, x: Tensor, flat: bool) -> None:
            seen.add(call)
            before = base.inputs.get(call)
            if before is not None and before.shape == x.shape:
                rows[call] = _differ(before, x, base.noise.get(call, 0.0)).any(dim=-1)

        outputs = self._run(inputs, compare, disturbed=disturbed, base=base, mixed=mixed)
        if [t.shape for t in base.outputs] != [t.shape for t in outputs]:
            raise ConversionError(_VARYING_OUTPUTS)
        varying = {call.name for call in (*base.inputs, *seen) if call not in rows}
        pairs = zip(base.outputs, outputs, strict=True)
        return Changes(rows, [_differ(a, b, base.noise.get(at, 0.0)) for at, (a, b) in enumerate(pairs)], varying)

    def _run(
        self,
        inputs: object,
        see: Callable[[Call, Tensor, bool], None],
        *,
        disturbed: Row | None = None,
        base: Base | None = None,
        mixed: Mapping[str, Mixing] | None = None,
    ) -> list[Tensor]:
        counts = dict.fromkeys(self.layers, 0)

        def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
                return None
            call = Call(name, counts[name])
            counts[name] += 1
            see(call, _rows(x).detach(), x.ndim < 3)
            if mixed is None or name not in mixed or x.ndim < 3:
                return None
            y = mix_rows(x, mixed[name])
            return ((y, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): y})

        def after(name: str, output: Any) -> Any:
            if disturbed is None or base is None or disturbed.call != (name, counts[name] - 1):
                return None
            if not isinstance(output, Tensor) or _rows(output).shape[:2] != base.inputs[disturbed.call].shape[:2]:
                return None
            other = output.clone(memory_format=torch.contiguous_format)
            row = _rows(other)[disturbed.lead, disturbed.row]
            generator = torch.Generator(device="cpu").manual_seed(1)
            noise = torch.randn(row.shape, generator=generator, device="cpu").to(row)
            row += noise * (1 + output.abs().max())
            return other

        with self._hooks(before, after), SmoothSwitches():
            return [t.detach() for t in tensors(run(self.model, inputs)) if t.layout == torch.strided]

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


def without_matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hand on what they are fed in its shape (norms, activations, dropout): rows are seen there too."""
    return {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
        and not module._modules
        and all(p.ndim < 2 for p in module._parameters.values() if p is not None)
        and name
    }


def _rows(x: Tensor) -> Tensor:
    """X (…, N, K) as (lead, N, K); a vector is one row."""
    x = x if x.ndim > 1 else x.unsqueeze(0)
    return x.reshape(-1, *x.shape[-2:]) if x.numel() else x.reshape(0, *x.shape[-2:])


def _distance(before: Tensor | None, after: Tensor) -> float:
    """How far two runs on the same input differ; infinitely where they are not alike in shape."""
    if before is None or before.shape != after.shape:
        return float("inf")
    if torch.equal(before, after) or not after.numel():
        return 0.0
    return float((before.to(torch.complex128) - after.to(torch.complex128)).abs().nan_to_num(0.0).max())


def _differ(before: Tensor, after: Tensor, noise: float) -> Tensor:
    """Where they differ by more than rounding does and ten times more than two runs on the same input."""
    if not (before.is_floating_point() or before.is_complex()) or not before.numel():
        return before != after
    wide = torch.complex128 if before.is_complex() else torch.float64
    a, b = before.to(wide), after.to(wide)
    allowed = _ROUNDING.get(before.dtype, 0.0) * float(a.abs().nan_to_num(0.0, 0.0, 0.0).amax()) + 10 * noise
    return ~((a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= allowed))
