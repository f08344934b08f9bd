"""Running a model to look at it: no mode, buffer, random generator or input is left changed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_MOST_ROWS = 1 << 14  # of what a layer is fed, to fit it to
_LARGE = 20_000_000  # parameters: beyond, float64 would take minutes


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without gradients, and calling its layers rather than PyTorch's fused or compiled ones.

    Every submodule's mode is put back.
    """
    modes = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    # A model that is compiled has loaded dynamo; to load it for others would take seconds.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), eager:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def generators_kept(model: nn.Module) -> Iterator[None]:
    """Give torch's, numpy's and Python's random generators back as they were: every run inside draws the same numbers."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    numpy = sys.modules.get("numpy.random")
    python, numbers = random.getstate(), None if numpy is None else numpy.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(numbers)


def run(model: nn.Module, example_inputs: object) -> object:
    """The model's output on a tensor, a tuple of positional arguments, or a mapping of keyword arguments.

    Random numbers that the model draws are the same in every run, and none are taken from the caller's. The model gets copies:
    what it changes in place stays with it.
    """
    given: Any = copied(example_inputs)
    with generators_kept(model):
        if isinstance(given, Mapping):
            return model(**given)
        if isinstance(given, list | tuple):
            return model(*given)
        return model(given)


def inputs_of(model: nn.Module, layers: Sequence[nn.Module], inputs: object) -> dict[nn.Module, Tensor]:
    """What each of `layers` is fed, (…, N, K), when the model runs on `inputs`; up to `_MOST_ROWS` rows, of whole samples."""
    fed: dict[nn.Module, list[Tensor]] = {}

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else kwargs["input"]).detach()
        x = x if x.ndim == 2 else x.reshape(-1, *x.shape[-2:])
        rows = sum(part.shape[:-1].numel() for part in fed.get(layer, []))
        most = max(0, _MOST_ROWS - rows) // (1 if x.ndim == 2 else max(1, x.shape[1]))
        if most or not rows:
            fed.setdefault(layer, []).append(x[: max(1, most)].clone())

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        with evaluating(model):
            run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat([p for p in parts if p.shape[1:] == parts[0].shape[1:]]) for layer, parts in fed.items()}


def copied(value: object) -> object:
    """A copy of the inputs of a model: tensors cloned, nests rebuilt, anything else (a cache) copied deeply if it can be."""

    def other(item: Any) -> object:
        try:
            return copy.deepcopy(item)
        except Exception:  # locks, generators, tensors with a history: objects refuse in many ways
            return item

    return mapped(value, lambda t: t.detach().clone(), other)


def mapped(value: object, on_tensor: Callable[[Tensor], Tensor], on_other: Callable[[Any], object]) -> object:
    """The same nest of mappings, lists, tuples and dataclasses with its leaves put through `on_tensor` or `on_other`."""
    if isinstance(value, Tensor):
        return on_tensor(value)
    if isinstance(value, Mapping):
        return {key: mapped(item, on_tensor, on_other) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items: Any = [mapped(item, on_tensor, on_other) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        twin = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(twin, field.name, mapped(getattr(value, field.name), on_tensor, on_other))
        return twin
    return on_other(value)


def leaves(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of such a nest in order, each with the name its message uses."""
    if isinstance(value, Tensor):
        yield name, value
        return
    parts: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    for key, item in parts:
        yield from leaves(item, f"{name}.{key}" if name else str(key))


def tensors(value: object) -> Iterator[Tensor]:
    """Every tensor in such a nest (a model's output, or its inputs)."""
    return (tensor for _, tensor in leaves(value))


@contextmanager
def scratch_copy(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of the model to try things on; one that cannot be copied is lent itself, and is as it was afterwards."""
    try:
        twin = copy.deepcopy(model)
    except Exception:  # weights made from others, process groups, locks …: classes refuse copies in many ways
        twin = None
    if twin is not None and not _shared(model, twin):
        try:
            yield twin
        finally:  # a method bound to the copy (`nn/direct.py`) would keep all its tensors until a garbage collection
            for module in twin.modules():
                vars(module).pop("forward", None)
        return
    state = [(t, t.data, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    attributes = [(vars(module), {name: copy.copy(v) if isinstance(v, dict) else v for name, v in vars(module).items()})
                  for module in model.modules()]  # fmt: skip
    try:
        yield model
    finally:
        for now, before in attributes:
            for name in set(now) - set(before):
                del now[name]
            for name, value in before.items():
                if isinstance(value, dict) and isinstance(now.get(name), dict):
                    now[name].clear()
                    now[name].update(value)
                else:
                    now[name] = value
        for tensor, data, values in state:
            data.copy_(values)
            tensor.data = data  # it may have been given another dtype


def _shared(model: nn.Module, twin: nn.Module) -> bool:
    """Whether a copy holds parts of the model itself: classes may return themselves as their copies."""
    mine = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    return any(id(part) in mine for part in (*twin.modules(), *twin.parameters(), *twin.buffers()))


def widen(model: nn.Module, example_inputs: object) -> object:
    """The inputs, and the model in place, in float64 or float32 where it runs in that: few bits would hide what is small."""
    as_given = [(p, p.data) for p in (*model.parameters(), *model.buffers())]

    def cast(dtype: torch.dtype) -> object:
        return mapped(example_inputs, lambda t: t.to(dtype) if t.is_floating_point() else t, lambda other: other)

    large = sum(p.numel() for p in model.parameters()) > _LARGE
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
