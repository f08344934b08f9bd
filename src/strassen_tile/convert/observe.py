"""What each layer of a model is fed: found by running the model on example inputs, not guessed from names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Calls:
    """What happened to one layer while the examples ran.

    Attributes:
        shapes: of its input, a call each.
        is_output: whether the model's output is this layer's output, unchanged.
        shares_rows: whether dimension −2 of its input holds rows of several samples.
    """

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    is_output: bool = False
    shares_rows: bool = False


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients; every submodule's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def run(model: nn.Module, example_inputs: object) -> object:
    """The model's output on a tensor, a tuple of positional arguments, or a mapping of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, list | tuple):
        return model(*example_inputs)
    return model(example_inputs)


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


def observe(model: nn.Module, layers: Mapping[str, nn.Module], example_inputs: object) -> dict[str, Calls]:
    """Run the model on the examples and, if they hold several samples, once more with the first one changed."""
    calls = {name: Calls() for name in layers}
    seen: dict[str, Tensor] = {}
    produced: dict[str, list[Tensor]] = {name: [] for name in layers}

    def record(name: str, x: Tensor, y: Tensor) -> None:
        calls[name].shapes.append(tuple(x.shape))
        produced[name].append(y)
        seen.setdefault(name, x.detach().clone())

    with evaluating(model):
        with _watching(layers, record):
            output = run(model, example_inputs)
        returned = {(t.data_ptr(), t.numel()) for t in tensors(output)}
        for name, outputs in produced.items():
            calls[name].is_output = any((t.data_ptr(), t.numel()) in returned for t in outputs if t.numel())
        changed = _changed_first_sample(example_inputs)
        if changed is not None:
            again: dict[str, Tensor] = {}
            with _watching(layers, lambda name, x, y: again.setdefault(name, x.detach().clone())):
                run(model, changed)
            for name, before in seen.items():
                after = again.get(name)
                # The last leading index belongs to the last sample, which did not change — unless samples are not leading.
                if after is not None and before.ndim >= 3 and before.shape == after.shape and before.numel():
                    last = (before.flatten(0, -3)[-1], after.flatten(0, -3)[-1])
                    calls[name].shares_rows = not torch.equal(*last)
    return calls


def behaves_causally(model: nn.Module, layers: Mapping[str, nn.Module], example_inputs: object) -> bool:
    """Whether, for integer tokens (B, N), no layer's row depends on a later token: a causal language model."""
    tokens = next(_token_tensors(example_inputs), None)
    if tokens is None or tokens.shape[1] < 2:
        return False
    n = tokens.shape[1]
    changed = tokens.clone()
    changed[:, -1] = torch.where(tokens[:, -1] == tokens[:, 0], tokens[:, -1] ^ 1, tokens[:, 0])
    records: list[list[Tensor]] = [[], []]
    with evaluating(model):
        for record, ids in zip(records, (tokens, changed), strict=True):
            with _watching(layers, lambda name, x, y, record=record: record.append(x.detach().clone())):
                run(model, _replace(example_inputs, tokens, ids))
    pairs = [(a, b) for a, b in zip(*records, strict=False) if a.ndim == 3 and a.shape[1] == n and a.shape == b.shape]
    return bool(pairs) and all(torch.equal(a[:, :-1], b[:, :-1]) for a, b in pairs)


@contextmanager
def _watching(layers: Mapping[str, nn.Module], record: Any) -> Iterator[None]:
    def watch(name: str, layer: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs.get("input")
            if isinstance(x, Tensor) and isinstance(output, Tensor):
                record(name, x, output)

        return layer.register_forward_hook(hook, with_kwargs=True)

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _token_tensors(example_inputs: object) -> Iterator[Tensor]:
    if isinstance(example_inputs, Mapping):
        candidates = [v for k, v in example_inputs.items() if "mask" not in str(k) and "type" not in str(k)]
    else:
        candidates = list(tensors(example_inputs))
    for value in candidates:
        if isinstance(value, Tensor) and value.ndim == 2 and value.dtype in (torch.int32, torch.int64):
            yield value


def _changed_first_sample(example_inputs: object) -> object | None:
    """The examples with another first sample; None if there is only one, or no telling."""
    floats = (t for t in tensors(example_inputs) if t.is_floating_point() and t.ndim >= 2)
    target = next(_token_tensors(example_inputs), None)
    target = next(floats, None) if target is None else target
    if target is None or target.shape[0] < 2:
        return None
    changed = target.clone()
    changed[0] = changed[0] * 0.5 + 1.0 if target.is_floating_point() else changed[0].flip(0) ^ 1
    return _replace(example_inputs, target, changed)


def _replace(value: object, old: Tensor, new: Tensor) -> object:
    if value is old:
        return new
    if isinstance(value, Mapping):
        return {key: _replace(item, old, new) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_replace(item, old, new) for item in value])
    return value
