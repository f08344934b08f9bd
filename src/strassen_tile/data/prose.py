"""Text that every machine has: the English prose of Python's own standard library, its help topics and docstrings.

Modules are parsed, never imported. What it comes to differs between versions of Python: rows say which text they are of.
"""

from __future__ import annotations

import ast
import functools
import importlib
import sysconfig
from pathlib import Path

from strassen_tile.errors import DataError

_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idle_test"}
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


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # templates, and code of other versions
        return ""
    each = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, _DOCUMENTED))
    return "\n\n".join(filter(None, each))
