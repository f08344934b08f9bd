"""Running a model to look at it, so that nobody notices: no mode, buffer, random generator or input is left changed."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without gradients, and calling its layers rather than PyTorch's fused ones.

    Every submodule's mode is put back.
    """
    modes = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
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


def copied(value: object) -> object:
    """A copy of the inputs of a model: tensors cloned, nests rebuilt, anything else (a cache) copied deeply."""
    return mapped(value, lambda t: t.detach().clone(), copy.deepcopy)


def mapped(value: object, on_tensor: Callable[[Tensor], Tensor], on_other: Callable[[Any], object]) -> object:
    """The same nest of mappings, lists and tuples with its leaves put through `on_tensor` or `on_other`."""
    if isinstance(value, Tensor):
        return on_tensor(value)
    if isinstance(value, Mapping):
        return {key: mapped(item, on_tensor, on_other) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items: Any = [mapped(item, on_tensor, on_other) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return on_other(value)


def tensors(value: object) -> Iterator[Tensor]:
    """Every tensor in a nest of tuples, lists, mappings and dataclasses (a model's output, or its inputs)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        yield from tensors(vars(value))


@contextmanager
def guinea_pig(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of the model to try things on. One that cannot be copied is lent itself, and put back as it was."""
    try:
        double = copy.deepcopy(model)
    except Exception:  # weights made from others, process groups, locks …: classes refuse copies in many ways
        double = None
    if double is not None:
        yield double
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
