"""Blocks that are an MLP, whoever wrote them: found by reading their forward, which is never run for it.

A forward that only assigns and returns calls of its own children and of known functions says all it does: nothing else can
happen in it, whatever the input. Everything it reads is then remembered, and compared again whenever the block runs.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from strassen_tile.nn import STLLinear
from strassen_tile.nn.adopt import Read, adopt, release
from strassen_tile.nn.mlp import Roles
from strassen_tile.nn.steps import has_hooks

_IDENTITIES = (nn.Dropout, nn.Identity)  # in eval mode
_FUNCTIONS: Mapping[Any, str] = {F.relu: "relu", torch.relu: "relu", F.silu: "silu", F.gelu: "gelu"}
_MODULES: Mapping[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu"}


class _Value(NamedTuple):
    """A layer, by the name of the child, or an activation, applied to another value."""

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
            found = recognise(block, layers)
            if found is not None and adopt(block, *found):
                done[name] = functools.partial(release, block)
    return done


def recognise(block: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[Roles, tuple[Read, ...]] | None:
    """How `block` composes `layers`, and all else that its forward reads; None if it is no MLP."""
    try:
        reader = _Reader(block, layers)
        roles = _roles(reader.returned())
    except Exception:  # a block may be anything; what cannot be read is not recognised
        return None
    used = {name for name in (roles or ())[:3] if name is not None}
    fits = roles is not None and used == set(layers) and len({id(m) for m in layers.values()}) == len(layers)
    return (roles, tuple(reader.reads)) if fits and roles is not None else None


@dataclass
class _Reader:
    """Reads the forward of one block."""

    block: nn.Module
    layers: Mapping[str, nn.Module]
    reads: list[Read] = field(default_factory=list)

    def returned(self) -> Any:
        """What the block returns, as an expression. "x" is its argument."""
        if has_hooks(self.block):
            raise _UnknownError("hooks")
        self.reads.append(Read(type(self.block), "forward", type(self.block).forward))
        if type(self.block).forward is nn.Sequential.forward:
            value: Any = "x"
            for name in self.block._modules:
                value = self._child(name, value)
            self.reads.append(Read(self.block, "__len__", len(self.block._modules)))
            return value
        argument, body, scope = _source(type(self.block).forward)
        values: dict[str, Any] = {argument: "x"}
        for statement in body:
            if isinstance(statement, ast.Return) and statement is body[-1] and statement.value is not None:
                value = self._expression(statement.value, values, scope)
                if any(left != "x" for left in values.values()):  # computed, and not used: in place, perhaps
                    raise _UnknownError(values)
                return value
            if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
                raise _UnknownError(ast.dump(statement))
            target = statement.targets[0]
            value = self._expression(statement.value, values, scope)
            if not isinstance(target, ast.Name) or values.get(target.id, "x") != "x":
                raise _UnknownError(ast.dump(target))
            values[target.id] = value
        raise _UnknownError("no return")

    def _expression(self, node: ast.expr, values: dict[str, Any], scope: Mapping[str, Any]) -> Any:
        if isinstance(node, ast.Name):
            return "x" if values[node.id] == "x" else values.pop(node.id)  # what is between is used once
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return _Product(self._expression(node.left, values, scope), self._expression(node.right, values, scope))
        if not isinstance(node, ast.Call) or len(node.args) != 1 or isinstance(node.args[0], ast.Starred):
            raise _UnknownError(ast.dump(node))
        value = self._expression(node.args[0], values, scope)
        if (
            isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "self"
        ):
            if node.keywords:
                raise _UnknownError(ast.dump(node))
            return self._child(node.func.attr, value)
        return _Value(_activation(_resolved(node.func, scope), _literals(node.keywords)), value, False)

    def _child(self, name: str, value: Any) -> Any:
        child = getattr(self.block, name)
        if self.layers.get(name) is not None and child is self.layers[name]:
            return _Value(name, value, True)  # another layer may stand there later: that is looked at then
        self.reads.append(Read(self.block, name, child))
        if isinstance(child, nn.Module) and has_hooks(child):
            raise _UnknownError("hooks")
        return value if type(child) in _IDENTITIES else _Value(self._activation_of(child), value, False)

    def _activation_of(self, child: Any) -> str:
        """That of a module or function called with one argument."""
        if not isinstance(child, nn.Module):
            return _activation(child, {})
        if type(child) is nn.GELU:
            self.reads.append(Read(child, "approximate", child.approximate))
            return _activation(F.gelu, {"approximate": child.approximate})
        if type(child) in _MODULES:
            return _MODULES[type(child)]
        self.reads.append(Read(type(child), "forward", type(child).forward))
        argument, body, scope = _source(type(child).forward)
        call = body[0].value if len(body) == 1 and isinstance(body[0], ast.Return) else None
        if not isinstance(call, ast.Call) or [ast.unparse(a) for a in call.args] != [argument] or child._modules:
            raise _UnknownError(type(child))
        options = _literals(call.keywords)
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "self":
            function = getattr(child, call.func.attr)
            self.reads.append(Read(child, call.func.attr, function))
            return _activation(function, options)
        return _activation(_resolved(call.func, scope), options)


def _is_what_runs(forward: types.FunctionType) -> bool:
    """Whether the source file still holds the code that runs: it may have been changed since it was loaded."""
    lines, _ = inspect.findsource(forward)
    module = compile("".join(lines), "", "exec", dont_inherit=True)
    codes, found = [module], []
    while codes:
        code = codes.pop()
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
        found.append((code.co_qualname, code.co_firstlineno, code.co_code, code.co_names, code.co_consts))
    running = forward.__code__
    return (running.co_qualname, running.co_firstlineno, running.co_code, running.co_names, running.co_consts) in found


@functools.cache
def _source(forward: Any) -> tuple[str, list[ast.stmt], Mapping[str, Any]]:
    """Of an undecorated method of one argument: the argument, the statements without a docstring, the names of its module."""
    if type(forward) is not types.FunctionType or forward.__closure__ or hasattr(forward, "__wrapped__"):
        raise _UnknownError(forward)
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list or definition.name != forward.__name__:
        raise _UnknownError(forward)
    arguments = definition.args
    names = [argument.arg for argument in arguments.args]
    extras = arguments.posonlyargs, arguments.kwonlyargs, arguments.defaults, arguments.vararg, arguments.kwarg
    if len(names) != 2 or names[0] != "self" or any(extras):
        raise _UnknownError(forward)
    if not _is_what_runs(forward):
        raise _UnknownError(forward)
    body = definition.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return names[1], body, forward.__globals__


def _resolved(node: ast.expr, scope: Mapping[str, Any]) -> Any:
    """The function that a name, or attributes of modules, stand for."""
    if isinstance(node, ast.Name):
        return scope[node.id]
    if isinstance(node, ast.Attribute):
        owner = _resolved(node.value, scope)
        if isinstance(owner, types.ModuleType):
            return getattr(owner, node.attr)
    raise _UnknownError(ast.dump(node))


def _literals(keywords: list[ast.keyword]) -> dict[str, Any]:
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in keywords}


def _activation(function: Any, options: dict[str, Any]) -> str:
    if type(function) is functools.partial and not function.args:
        function, options = function.func, {**function.keywords, **options}
    if function is F.gelu and options:
        return {"none": "gelu", "tanh": "gelu_tanh"}[options.pop("approximate")]
    if options:
        raise _UnknownError(options)
    return _FUNCTIONS[function]


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
