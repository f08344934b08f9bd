"""Whether a block is an MLP of STL layers, whoever wrote it: found by reading its forward, which is never run for it.

A forward that only assigns and returns calls of its own children and of known functions says all it does: nothing else can
happen in it, whatever the input. All it reads is then remembered, to be compared again whenever the block runs.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from strassen_tile.nn.mlp import Roles
from strassen_tile.nn.reads import Read, kept
from strassen_tile.nn.source import UnknownError, source_of
from strassen_tile.nn.steps import has_hooks

_FUNCTIONS = {"relu": F.relu, "torch.relu": torch.relu, "silu": F.silu, "gelu": F.gelu}
_MODULES: Mapping[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Dropout: "",
    nn.Identity: "",
}
# As they are before anybody patches them.
_FORWARDS = {kind: kind.__dict__["forward"] for kind in (*_MODULES, nn.Sequential)}
_MACHINERY = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattribute__", "__getattr__")


class _Value(NamedTuple):
    """A layer, by the name of the child, or an activation, applied to another value."""

    what: str
    to: Any
    is_layer: bool


class _Product(NamedTuple):
    left: Any
    right: Any


def recognise(block: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[Roles, tuple[Read, ...]] | None:
    """How `block` composes `layers`, two or three of its children, and all that its forward reads; None if it is no MLP."""
    try:
        reader = _Reader(block, layers)
        roles = _roles(reader.returned())
    except Exception:  # a block may be anything; what cannot be read is not recognised
        return None
    used = {name for name in (roles or ())[:3] if name is not None}
    fits = used == set(layers) and len({id(m) for m in layers.values()}) == len(layers)
    return (roles, tuple(reader.reads)) if fits and roles is not None else None


@dataclass
class _Reader:
    """Reads the forward of one block."""

    block: nn.Module
    layers: Mapping[str, nn.Module]
    reads: list[Read] = field(default_factory=list)

    def returned(self) -> Any:
        """What the block returns, as an expression. "x" is its argument."""
        kind = type(self.block)
        if has_hooks(self.block):
            raise UnknownError("hooks")
        self.reads.append(Read(None, "_modules", tuple(self.block._modules)))
        forward = self._forward_of(kind)
        if forward is _FORWARDS[nn.Sequential]:
            if inspect.getattr_static(kind, "__iter__") is not nn.Sequential.__dict__["__iter__"]:
                raise UnknownError(kind)
            value: Any = "x"
            for name in self.block._modules:
                value = self._child(name, value)
            return value
        argument, body, scope = source_of(forward.__code__, forward)
        values: dict[str, Any] = {argument: "x"}
        for statement in body:
            if isinstance(statement, ast.Return) and statement is body[-1] and statement.value is not None:
                value = self._expression(statement.value, values, scope)
                if any(left != "x" for left in values.values()):  # computed, and not used: in place, perhaps
                    raise UnknownError(values)
                return value
            if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
                raise UnknownError(ast.dump(statement))
            target = statement.targets[0]
            value = self._expression(statement.value, values, scope)
            if not isinstance(target, ast.Name) or target.id == "self" or values.get(target.id, "x") != "x":
                raise UnknownError(ast.dump(target))
            values[target.id] = value
        raise UnknownError("no return")

    def _forward_of(self, kind: type) -> Any:
        """The forward of a class, which is called as that of any module is."""
        own = kind.__mro__[: kind.__mro__.index(nn.Module)]
        if any(name in owner.__dict__ for owner in own for name in _MACHINERY):
            raise UnknownError(kind)
        forward = inspect.getattr_static(kind, "forward")
        owner = next(owner for owner in kind.__mro__ if "forward" in owner.__dict__)
        if owner in _FORWARDS and forward is not _FORWARDS[owner]:
            raise UnknownError(owner)
        if type(forward) is not types.FunctionType:
            raise UnknownError(forward)
        self.reads += [Read(owner, "forward", forward), Read(forward, "__code__", forward.__code__)]
        return forward

    def _expression(self, node: ast.expr, values: dict[str, Any], scope: dict[str, Any]) -> Any:
        if isinstance(node, ast.Name):
            return "x" if values[node.id] == "x" else values.pop(node.id)  # what is between is used once
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return _Product(self._expression(node.left, values, scope), self._expression(node.right, values, scope))
        if not isinstance(node, ast.Call) or len(node.args) != 1 or isinstance(node.args[0], ast.Starred):
            raise UnknownError(ast.dump(node))
        value = self._expression(node.args[0], values, scope)
        if (
            isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "self"
        ):
            if node.keywords:
                raise UnknownError(ast.dump(node))
            return self._child(node.func.attr, value)
        return _Value(_activation(self._resolved(node.func, scope), _literals(node.keywords)), value, False)

    def _child(self, name: str, value: Any) -> Any:
        child = self._attribute(None, self.block, name)
        if self.layers.get(name) is not None and child is self.layers[name]:
            return _Value(name, value, True)  # another layer may stand there later: that is looked at then
        if not isinstance(child, nn.Module):
            self.reads.append(Read(None, name, kept(child)))
            return _Value(_activation(child, {}), value, False)
        if has_hooks(child) or child._modules or child._parameters or child._buffers:
            raise UnknownError(child)
        self.reads += [Read(name, None, child), Read(name, "__class__", type(child))]
        activation = self._activation_of(name, child)
        return value if activation == "" else _Value(activation, value, False)

    def _activation_of(self, name: str, child: nn.Module) -> str:
        """That of a child called with one argument; "" if it is none in eval mode."""
        forward = self._forward_of(type(child))
        if type(child) in _MODULES:
            activation = _MODULES[type(child)]
            if type(child) is nn.GELU:
                self.reads.append(Read(name, "approximate", child.approximate))
                activation = _activation(F.gelu, {"approximate": child.approximate})
            if activation:
                function = activation.partition("_")[0]
                self.reads.append(Read(F.__dict__, function, _FUNCTIONS[function]))
            return activation
        argument, body, scope = source_of(forward.__code__, forward)
        call = body[0].value if len(body) == 1 and isinstance(body[0], ast.Return) else None
        if not isinstance(call, ast.Call) or [ast.unparse(a) for a in call.args] != [argument]:
            raise UnknownError(type(child))
        options = _literals(call.keywords)
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "self":
            function = self._attribute(name, child, call.func.attr)
            self.reads.append(Read(name, call.func.attr, kept(function)))
            return _activation(function, options)
        return _activation(self._resolved(call.func, scope), options)

    def _attribute(self, owner: str | None, module: nn.Module, name: str) -> Any:
        """What `self.name` is, looked up where nothing of the block's has a say."""
        if name.startswith("__") or any(name in kind.__dict__ for kind in type(module).__mro__):
            raise UnknownError(name)  # mangled, or of the class
        return module.__dict__[name] if name in module.__dict__ else module._modules[name]

    def _resolved(self, node: ast.expr, scope: dict[str, Any]) -> Any:
        """The function that a name, or attributes of modules, stand for."""
        owner: Any = scope
        if isinstance(node, ast.Attribute):
            owner = self._resolved(node.value, scope)
        elif not isinstance(node, ast.Name):
            raise UnknownError(ast.dump(node))
        name = node.attr if isinstance(node, ast.Attribute) else node.id
        names = owner.__dict__ if isinstance(owner, types.ModuleType) else owner
        if owner is not scope and not isinstance(owner, types.ModuleType):
            raise UnknownError(ast.dump(node))
        self.reads.append(Read(names, name, names[name]))
        return names[name]


def _literals(keywords: list[ast.keyword]) -> dict[str, Any]:
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in keywords}


def _activation(function: Any, options: dict[str, Any]) -> str:
    if type(function) is functools.partial and not function.args:
        function, options = function.func, {**function.keywords, **options}
    if function is F.gelu and set(options) == {"approximate"}:
        return {"none": "gelu", "tanh": "gelu_tanh"}[options["approximate"]]
    if options:
        raise UnknownError(options)
    return next(name.rpartition(".")[2] for name, known in _FUNCTIONS.items() if known is function)


def _roles(value: Any) -> Roles | None:
    """Those of down(act(up(x))) or down(act(gate(x))·up(x)); None for any other expression."""
    if not (isinstance(value, _Value) and value.is_layer):
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
    if isinstance(value, _Value) and not value.is_layer:
        activation, value = value.what, value.to
    if isinstance(value, _Value) and value.is_layer and value.to == "x":
        return value.what, activation
    return None
