"""Text that every machine has: the prose of Python's standard library, its help topics and docstrings; or its code.

Modules are parsed or read, never imported. What it comes to differs between versions of Python: rows say which text they are
of.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import sysconfig
from pathlib import Path

from strassen_tile.errors import DataError

_INSTALLED = {"site-packages", "dist-packages", "__pycache__"}
_NOT_PROSE = {*_INSTALLED, "test", "tests", "idle_test"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_FEWEST = 100


@functools.cache
def standard_library() -> dict[str, str]:
    """Name of a module or help topic → its prose.

    Raises:
        DataError: this Python comes without the sources of its library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _NOT_PROSE.intersection(name.parts) and (text := _docstrings(path)):
            found[".".join(name.with_suffix("").parts)] = text
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions leave it out
        topics = {}
    found |= {f"help({name!r})": str(text) for name, text in sorted(topics.items())}
    if len(found) < _FEWEST:
        raise DataError(
            f"data=python: {root} has the prose of {len(found)} modules only (a Python without its sources?); give a folder of "
            "text, or hub:NAME"
        )
    return found


@functools.cache
def standard_library_code() -> dict[str, str]:
    """Name of a module → its source, tests included where this Python has them: some 30 MB, 12 without.

    Raises:
        DataError: this Python comes without the sources of its library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _INSTALLED.intersection(name.parts):
            with contextlib.suppress(OSError, UnicodeDecodeError):  # tests of other encodings
                found[".".join(name.with_suffix("").parts)] = path.read_text(encoding="utf-8")
    if len(found) < _FEWEST:
        raise DataError(
            f"data=python-code: {root} has the sources of {len(found)} modules only; give a folder of text, or hub:NAME"
        )
    return found


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # templates, and code of other versions
        return ""
    each = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, _DOCUMENTED))
    return "\n\n".join(filter(None, each))
