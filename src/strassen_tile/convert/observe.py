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
        shares_rows: whether dimension −2 of its input holds rows of several samples; None where nothing showed it.
    """

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    is_output: bool = False
    shares_rows: bool | None = None


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


def run(model: nn.Module, example_inputs: object) -> object:
    """The model's output on a tensor, a tuple of positional arguments, or a mapping of keyword arguments.

    Random numbers that the model draws are the same in every run, and none are taken from the caller's.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
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
    """Run the model on the examples and, if they hold several samples, again with the first and the last one changed."""
    calls = {name: Calls() for name in layers}
    seen: dict[str, Tensor] = {}
    produced: dict[str, list[Tensor]] = {name: [] for name in layers}

    def record(name: str, x: Tensor, y: Tensor) -> None:
        calls[name].shapes.append(tuple(x.shape))
        produced[name].append(y)
        if name not in seen:
            seen[name] = x.detach().clone()

    with evaluating(model):
        with _watching(layers, record):
            output = run(model, example_inputs)
        returned = {_memory(t) for t in tensors(output)}
        for name, outputs in produced.items():
            calls[name].is_output = any(_memory(t) in returned for t in outputs if t.numel())
        reached: list[dict[str, Tensor]] = []
        several = _several_samples(model, example_inputs)
        if several is not example_inputs:
            seen = _first_inputs(model, layers, several)
        for changed in (_changed_sample(several, 0), _changed_sample(several, -1)):
            if changed is not None:
                again = _first_inputs(model, layers, changed)
                reached.append({n: _reached(x, again[n]) for n, x in seen.items() if _comparable(x, again.get(n))})
    for name in set.intersection(*map(set, reached)) if len(reached) == 2 else ():
        # Rows of one leading index are tiled together; do both samples reach one?
        calls[name].shares_rows = bool((reached[0][name] & reached[1][name]).any())
    return calls


def causal_layers(model: nn.Module, layers: Mapping[str, nn.Module], example_inputs: object) -> set[str]:
    """Names of the layers whose rows depend on integer tokens (B, N) of the examples, but the first row not on later ones.

    If one layer's first row does depend on later tokens, those tokens are read both ways and no layer is causal.
    """
    causal: set[str] = set()
    for tokens in _token_tensors(example_inputs):
        n = tokens.shape[1]
        changed = torch.cat([tokens[:, :1], _other_tokens(tokens)[:, 1:]], dim=1)
        records: list[list[tuple[str, Tensor]]] = [[], []]
        with evaluating(model):
            for record, ids in zip(records, (tokens, changed), strict=True):
                with _watching(layers, lambda name, x, y, record=record: record.append((name, x.detach().clone()))):
                    run(model, _replace(example_inputs, tokens, ids))
        pairs = [(name, a, b) for (name, a), (_, b) in zip(*records, strict=False) if a.shape == b.shape]
        pairs = [(name, a, b) for name, a, b in pairs if a.ndim == 3 and a.shape[1] == n and not torch.equal(a, b)]
        if all(torch.equal(a[:, :1], b[:, :1]) for _, a, b in pairs):
            causal.update(name for name, _, _ in pairs)
    return causal


def _first_inputs(model: nn.Module, layers: Mapping[str, nn.Module], example_inputs: object) -> dict[str, Tensor]:
    """What each layer is fed the first time it is called."""
    seen: dict[str, Tensor] = {}
    with _watching(layers, lambda name, x, y: name in seen or seen.update({name: x.detach().clone()})):
        run(model, example_inputs)
    return seen


def _memory(t: Tensor) -> tuple[int, int]:
    return t.untyped_storage()._cdata, t.numel()


def _comparable(before: Tensor, after: Tensor | None) -> bool:
    return after is not None and after.shape == before.shape and before.ndim >= 3 and not before.is_meta


def _reached(before: Tensor, after: Tensor) -> Tensor:
    """For every leading index of (…, N, K), whether anything changed there."""
    changed = (before != after) & ~(before.isnan() & after.isnan())
    reached: Tensor = changed.flatten(0, -3).flatten(1).any(dim=1)
    return reached


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
        integers = isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64) and not value.is_meta
        if integers and value.ndim == 2 and value.shape[1] > 1 and value.numel():
            yield value


def _other_tokens(tokens: Tensor) -> Tensor:
    """Another token in every place, each from the vocabulary: the next of those that occur, in a circle."""
    values: Tensor = tokens.unique()
    if len(values) == 1:
        return tokens - 1 if values[0] > 0 else tokens + 1
    return values[(torch.searchsorted(values, tokens.contiguous()) + 1) % len(values)]


def _several_samples(model: nn.Module, example_inputs: object) -> object:
    """The examples, a single sample twice; as they are if the model does not run on two."""
    batches = [t for t in tensors(example_inputs) if t.ndim >= 2]
    if not batches or any(t.shape[0] != 1 for t in batches):
        return example_inputs
    doubled = example_inputs
    for batch in batches:
        doubled = _replace(doubled, batch, torch.cat([batch, batch]))
    try:
        run(model, doubled)
    except Exception:  # a model may refuse two samples in any way; then one is all there is to look at
        return example_inputs
    return doubled


def _changed_sample(example_inputs: object, sample: int) -> object | None:
    """The examples with one sample changed throughout; None if there is only one, or no telling."""
    numbers = [t for t in tensors(example_inputs) if t.ndim >= 2 and t.dtype != torch.bool and not t.is_meta]
    numbers.sort(key=lambda t: not t.is_floating_point())
    target = next(_token_tensors(example_inputs), numbers[0] if numbers else None)
    if target is None or target.shape[0] < 2 or not target.numel():
        return None
    changed = target.clone()
    changed[sample] = changed[sample] * 0.5 + 1.0 if target.is_floating_point() else _other_tokens(target)[sample]
    return _replace(example_inputs, target, changed)


def _replace(value: object, old: Tensor, new: Tensor) -> object:
    if value is old:
        return new
    if isinstance(value, Mapping):
        return {key: _replace(item, old, new) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items: Any = [_replace(item, old, new) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
