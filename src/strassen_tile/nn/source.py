"""The source of a method, if it is short of surprises, and the code that runs."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from typing import Any


class UnknownError(Exception):
    """What is read does something that an MLP does not, or cannot be read."""


@functools.cache
def source_of(code: types.CodeType, forward: Any) -> tuple[str, list[ast.stmt], dict[str, Any]]:
    """Of an undecorated method of one argument: the argument, the statements without a docstring, the names of its module."""
    if type(forward) is not types.FunctionType or forward.__closure__ or hasattr(forward, "__wrapped__"):
        raise UnknownError(forward)
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list or definition.name != forward.__name__:
        raise UnknownError(forward)
    arguments = definition.args
    names = [argument.arg for argument in arguments.args]
    extras = arguments.posonlyargs, arguments.kwonlyargs, arguments.defaults, arguments.vararg, arguments.kwarg
    if len(names) != 2 or names[0] != "self" or any(extras) or not _is_what_runs(forward):
        raise UnknownError(forward)
    body = definition.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return names[1], body, forward.__globals__


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
