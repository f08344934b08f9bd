"""Blocks that are an MLP, whoever wrote them: found by tracing what they do with their layers, not by what they are called."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from strassen_tile.nn import STLLinear
from strassen_tile.nn.adopt import adopt, release
from strassen_tile.nn.mlp import Roles
from strassen_tile.nn.steps import has_hooks

_IDENTITIES = (nn.Dropout, nn.Identity)  # in eval mode
_MODULES: Mapping[type[nn.Module], Callable[[Any], str | None]] = {
    nn.GELU: lambda m: _gelu(m.approximate),
    nn.ReLU: lambda m: "relu",
    nn.SiLU: lambda m: "silu",
}
_FUNCTIONS = {F.relu: "relu", torch.relu: "relu", F.silu: "silu", F.gelu: "gelu"}
_PRODUCTS = (operator.mul, torch.mul)


class _Applied(NamedTuple):
    """A layer, by the name of the child, or an activation, applied to a value."""

    what: str
    to: Any
    is_layer: bool


class _Product(NamedTuple):
    left: Any
    right: Any


class _UnknownError(Exception):
    """The block does something that no MLP does."""


def adopt_mlps(model: nn.Module, converted: Collection[nn.Module]) -> dict[str, Callable[[], None]]:
    """Let every block whose two or three linear children are all among `converted`, and which is an MLP, run in one step.

    Returns:
        Name of the block → what puts it back.
    """
    mine = {id(layer) for layer in converted}
    done: dict[str, Callable[[], None]] = {}
    for name, block in list(model.named_modules()):
        layers = {child: m for child, m in block._modules.items() if m is not None and id(m) in mine}
        if len(layers) in (2, 3) and all(isinstance(m, STLLinear) for m in layers.values()):
            roles = recognise(block, layers)
            if roles is not None and adopt(block, roles):
                done[name] = partial(release, block)
    return done


def recognise(block: nn.Module, layers: Mapping[str, nn.Module]) -> Roles | None:
    """How `block` composes `layers`, two or three of its children; None if it does anything but what an MLP does.

    A copy of the block is traced in eval mode, with its layers as they are but never run: whatever looks at shapes, dtypes
    or values, and whatever is neither layer, known activation, dropout nor the product of gate and up, ends the attempt.
    """
    if len({id(layer) for layer in layers.values()}) != len(layers) or not _is_plain(block, layers):
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            twin = copy.deepcopy(block, {id(layer): layer for layer in layers.values()})
            for module in twin.modules():
                if not any(module is layer for layer in layers.values()):
                    module.__dict__["training"] = False
            graphs = [_traced(twin, layers, autocast) for autocast in (False, True)]
        first, second = (_roles(_value(graph, twin, layers)) for graph in graphs)
    except Exception:  # a block may be anything; what cannot be copied or traced is not recognised
        return None
    return first if first == second else None


def _is_plain(block: nn.Module, layers: Mapping[str, nn.Module]) -> bool:
    """Whether the block has no numbers beside its layers', no hooks in it, leaves as other children, and one argument."""
    others = [m for child, m in block.named_children() if child not in layers]
    if block._parameters or block._buffers or any(next(_insides(m), None) is not None for m in others):
        return False
    if has_hooks(block) or any(has_hooks(m) for m in block.modules()):
        return False
    parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
    return len(parameters) == 1 and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def _insides(module: nn.Module) -> Iterator[object]:
    yield from module.parameters()
    yield from module.buffers()
    yield from module.children()


class _Traced(fx.Proxy):
    """Stands for a tensor, also where code asks whether it is one."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return Tensor


class _Tracer(fx.Tracer):
    """Takes layers and known modules as they are; every other call is followed."""

    def __init__(self, layers: Mapping[str, nn.Module], autocast: bool) -> None:
        super().__init__()
        self._layers, self._autocast = list(layers.values()), autocast

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return any(m is layer for layer in self._layers) or type(m) in (*_IDENTITIES, *_MODULES)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Traced(node, self)

    def create_arg(self, a: Any) -> Any:
        return (
            a.node if type(a) is _Traced else super().create_arg(a)
        )  # as the tensor it says it is, it would be looked into

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if any(torch.is_autocast_enabled(device) != self._autocast for device in ("cpu", "cuda")):
            raise _UnknownError("the block turns autocast on or off")
        return super().call_module(m, forward, args, kwargs)


def _traced(block: nn.Module, layers: Mapping[str, nn.Module], autocast: bool) -> fx.Graph:
    before = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    try:
        for device in before:
            torch.set_autocast_enabled(device, autocast)
        return _Tracer(layers, autocast).trace(block)
    finally:
        for device, enabled in before.items():
            torch.set_autocast_enabled(device, enabled)


def _value(graph: fx.Graph, block: nn.Module, layers: Mapping[str, nn.Module]) -> Any:
    """What the graph returns, as an expression of layers, activations and products. "x" is its argument."""
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = "x"
            continue
        if node.op == "output":
            return values[node.args[0]]
        if len(node.users) != 1:  # computed for its own sake, such as an activation in place, or used twice
            raise _UnknownError(node)
        given = [values[a] if isinstance(a, fx.Node) else a for a in node.args]
        values[node] = _applied(node, given, block, layers)
    raise _UnknownError("no output")


def _applied(node: fx.Node, given: list[Any], block: nn.Module, layers: Mapping[str, nn.Module]) -> Any:
    options = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if node.op == "call_module" and len(given) == 1 and not options:
        child = str(node.target)
        if child in layers:
            return _Applied(child, given[0], True)
        module = block.get_submodule(child)
        if type(module) in _IDENTITIES:
            return given[0]
        return _activated(_MODULES[type(module)](module), given[0])
    if node.op == "call_function" and node.target in _PRODUCTS and len(given) == 2 and not options:
        return _Product(*given)
    if node.op == "call_function" and node.target is F.gelu and len(given) == 1:
        return _activated(_gelu(str(options.get("approximate", "none"))), given[0])
    if node.op == "call_function" and node.target in _FUNCTIONS and len(given) == 1 and not options:
        return _activated(_FUNCTIONS[node.target], given[0])
    if node.op == "call_function" and node.target is F.dropout and options.get("training") is False:
        return given[0]
    if node.op == "call_method" and node.target == "relu" and len(given) == 1 and not options:
        return _activated("relu", given[0])
    raise _UnknownError(node)


def _activated(activation: str | None, value: Any) -> _Applied:
    if activation is None:
        raise _UnknownError(activation)
    return _Applied(activation, value, False)


def _gelu(approximate: str) -> str | None:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)


def _roles(value: Any) -> Roles | None:
    """Those of down(act(up(x))) or down(act(gate(x))·up(x)); None for any other expression."""
    if not (isinstance(value, _Applied) and value.is_layer):
        return None
    down, inner = value.what, value.to
    if not isinstance(inner, _Product):
        first = _first(inner)
        return None if first is None else Roles(first[0], down, None, first[1])
    left, right = _first(inner.left), _first(inner.right)
    if left is None or right is None or "none" not in (left[1], right[1]):
        return None
    gate, up = (left, right) if right[1] == "none" else (right, left)
    return Roles(up[0], down, gate[0], gate[1])


def _first(value: Any) -> tuple[str, str] | None:
    """(layer, activation) of act(layer(x)) or layer(x)."""
    activation = "none"
    if isinstance(value, _Applied) and not value.is_layer:
        activation, value = value.what, value.to
    if isinstance(value, _Applied) and value.is_layer and value.to == "x":
        return value.what, activation
    return None
