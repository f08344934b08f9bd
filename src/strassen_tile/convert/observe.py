"""What each layer of a model is fed, and whether it makes the output: found by running the model on example inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from strassen_tile.convert.running import evaluating, run, tensors


@dataclass
class Calls:
    """What happened to one layer while the examples ran.

    Attributes:
        shapes: of its input, a call each.
        is_output: whether the model's output is this layer's output, unchanged.
    """

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    is_output: bool = False


def observe(model: nn.Module, layers: Mapping[str, nn.Module], example_inputs: object) -> dict[str, Calls]:
    """Run the model once on the examples and note the calls of its layers."""
    calls = {name: Calls() for name in layers}
    produced: dict[str, list[Tensor]] = {name: [] for name in layers}

    def record(name: str, x: Tensor, y: Tensor) -> None:
        calls[name].shapes.append(tuple(x.shape))
        produced[name].append(y)

    with evaluating(model), _watching(layers, record):
        output = run(model, example_inputs)
    returned = {_memory(t) for t in tensors(output) if t.layout == torch.strided}
    for name, outputs in produced.items():
        calls[name].is_output = any(_memory(t) in returned for t in outputs if t.numel())
    return calls


def _memory(t: Tensor) -> tuple[int, int]:
    try:
        return t.untyped_storage()._cdata, t.numel()
    except NotImplementedError:  # of vmap, and other tensors without memory of their own
        return id(t), t.numel()


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
