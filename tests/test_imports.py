"""The house rule of the design: imports go downwards, optional libraries stay in their packages, and importing is cheap."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import strassen_tile

PACKAGE = "strassen_tile"
ORDER = [
    "errors",
    "files",
    "records",
    "tiling",
    "algebra",
    "basis_record",
    "basis",
    "bases",
    "cost",
    "reference",
    "ops",
    "amm",
    "nn",
    "convert",
    "baselines",
    "models",
    "data",
]
ORDER += ["integrations", "report", "experiments", "arguments", "bases_cli", "cli"]
OPTIONAL = {"transformers", "accelerate", "datasets", "sklearn", "matplotlib"}
OPTIONAL_IN = {"integrations", "experiments", "data", "report"}
OPS_MAY_IMPORT = {"errors", "files", "tiling", "basis", "ops"}  # its oracle, `reference`, stands on bases and cost
TRITON = {
    f"ops/cuda/{name}.py" for name in ("kernels", "launch", "tap_kernels", "taps", "tiles", "tune")
}  # loaded when CUDA tensors come
HEAVY = {*OPTIONAL, "PIL", "rich", "scipy", "triton", "pandas"}


class Import(NamedTuple):
    target: str  # dotted; for `from a import b`, "a.b"
    line: int
    at_top: bool  # runs when the module is imported


def module_name(path: str) -> str:
    parts = [part for part in path.rpartition(".")[0].split("/") if part != "__init__"]
    return ".".join([PACKAGE, *parts])


def imports_of(path: str, source: str) -> list[Import]:
    """Every import in `source`, at any depth, relative ones and literal `import_module(...)` calls included."""
    found: list[Import] = []
    package = module_name(path).split(".")
    package = package if path.endswith("__init__.py") else package[:-1]

    def visit(node: ast.AST, at_top: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*stem, *([node.module] if node.module else [])])
            found.extend(Import(f"{base}.{alias.name}", node.lineno, at_top) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            literals = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            found.extend(Import(str(name), node.lineno, at_top) for name in literals)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            visit(child, at_top and not inside and not typing_only)

    visit(ast.parse(source), True)
    return found


def resolve(target: str, known: set[str]) -> str:
    """The module that holds `target`: the longest prefix of it that is one."""
    if target == f"{PACKAGE}.__version__":
        return f"{PACKAGE}._version"
    while target not in known and "." in target:
        target = target.rpartition(".")[0]
    return target


def violations(sources: Mapping[str, str]) -> Iterator[str]:
    """What breaks the rule in {path inside the package: source}; the package's own `__init__` is exempt."""
    known = {PACKAGE, f"{PACKAGE}._version", *map(module_name, sources)}
    graph: dict[str, set[str]] = {}
    for path, source in sources.items():
        part = path.split("/")[0].partition(".")[0]
        if part in ("__init__", "_version"):
            continue
        if part not in ORDER:
            yield f"{path}: {part} is not in the import order; give it a place in docs/architecture.md and ORDER"
            continue
        graph[module_name(path)] = set()
        for target, line, at_top in imports_of(path, source):
            where, top = f"{path}:{line}", target.split(".")[0]
            if top in OPTIONAL and part not in OPTIONAL_IN:
                yield f"{where} imports {top}; only {', '.join(sorted(OPTIONAL_IN))} may"
            if top == "triton" and at_top and path not in TRITON:
                yield f"{where} imports triton when it is imported; only {', '.join(sorted(TRITON))} may"
            if top != PACKAGE or (module := resolve(target, known)) == f"{PACKAGE}._version":
                continue
            graph[module_name(path)].add(module)
            other = target.partition(".")[2].split(".")[0]
            if other not in ORDER:
                yield f"{where} imports {target}, which is in no part; import it from where it is defined"
            elif ORDER.index(other) > ORDER.index(part):
                yield f"{where}: {part} imports {other}, which comes later"
            elif part == "ops" and other not in OPS_MAY_IMPORT:
                yield f"{where}: ops imports {other}; it may import only {', '.join(sorted(OPS_MAY_IMPORT - {'ops'}))}"
    graph.pop(PACKAGE, None)
    try:
        TopologicalSorter({module: {m for m in found if m != PACKAGE} for module, found in graph.items()}).prepare()
    except CycleError as error:
        yield "import cycle: " + " → ".join(error.args[1])


def test_package_keeps_the_import_order() -> None:
    """A module that reaches up or sideways ties the operator to what is built on it, or the oracle to what it checks."""
    root = Path(strassen_tile.__file__).parent
    files = [*root.rglob("*.py"), *root.rglob("*.pyi")]  # a compiled module has a stub
    sources = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in files}
    assert {"basis.py", "ops/functional.py", "cli.py"} <= set(sources)
    assert not list(violations(sources))


PLANTED = {
    "upwards": ({"tiling.py": "from strassen_tile.basis import Basis"}, "comes later"),
    "upwards inside a function": (
        {"nn/linear.py": "def f():\n    import strassen_tile.baselines.dense"},
        "comes later",
    ),
    "upwards, relative": ({"nn/linear.py": "from ..convert import swap", "convert/swap.py": ""}, "comes later"),
    "upwards for types": ({"ops/x.py": "if TYPE_CHECKING:\n    from strassen_tile.nn import STLLinear"}, "comes later"),
    "upwards by name": ({"cost.py": "import importlib\nimportlib.import_module('strassen_tile.nn')"}, "comes later"),
    "module from the root": ({"cost.py": "from strassen_tile import nn", "nn/__init__.py": ""}, "comes later"),
    "name from the root": ({"nn/linear.py": "from strassen_tile import Basis"}, "in no part"),
    "the root itself": ({"baselines/dense.py": "import strassen_tile as st"}, "in no part"),
    "reference to ops": ({"reference.py": "from strassen_tile.ops import stl_linear"}, "comes later"),
    "ops to reference": (
        {"ops/cpu.py": "from strassen_tile import reference", "reference.py": ""},
        "ops imports refer",
    ),
    "ops to bases": ({"ops/cpu.py": "from strassen_tile.bases import naive", "bases/__init__.py": ""}, "ops imports b"),
    "unknown part": ({"attic.py": ""}, "not in the import order"),
    "from an unknown part": ({"cli.py": "from strassen_tile.attic import x", "attic.py": ""}, "in no part"),
    "cycle in a part": ({"nn/a.py": "from strassen_tile.nn import b", "nn/b.py": "from . import a"}, "import cycle"),
    "cycle by a package": ({"nn/__init__.py": "from .a import A", "nn/a.py": "from . import A"}, "import cycle"),
    "optional": ({"nn/linear.py": "def f():\n    from sklearn.datasets import load_digits"}, "imports sklearn"),
    "optional by name": ({"cli.py": "__import__('matplotlib.pyplot')"}, "imports matplotlib"),
    "triton at the top": ({"ops/cpu.py": "try:\n    import triton\nexcept ImportError: ..."}, "imports triton"),
    "triton outside ops": ({"baselines/dense.py": "class A:\n    import triton.language as tl"}, "imports triton"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_checker_catches_a_planted_violation(case: str) -> None:
    """A checker that lets this through would guard nothing."""
    sources, message = PLANTED[case]
    assert any(message in found for found in violations(sources)), list(violations(sources))


def test_checker_lets_through_what_is_allowed() -> None:
    """A checker that cries wolf would be switched off."""
    allowed = {
        "__init__.py": "from strassen_tile import reference\nfrom strassen_tile.ops import stl_linear",
        "errors.py": "import transformers_like_name\nfrom strassen_tile._version import __version__",
        "reference.py": "from strassen_tile.bases import naive",
        "bases/__init__.py": "from strassen_tile.errors import STLError",
        "ops/cuda/kernels.py": "import triton",
        "ops/cuda/passes.py": "def f():\n    import triton\n    from strassen_tile.ops.cuda import kernels",
        "ops/cuda/__init__.py": "",
        "ops/cpu/__init__.py": "",
        "ops/__init__.py": "from strassen_tile.ops.cpu.tiles import run",
        "ops/cpu/tiles.py": "from strassen_tile.ops.cpu import _kernels",
        "ops/cpu/_kernels.pyi": "from torch import Tensor",
        "data/text.py": "def f():\n    import datasets",
        "cli.py": "from strassen_tile import __version__\nfrom strassen_tile.errors import STLError",
    }
    assert not list(violations(allowed))


PROBE = """
import json, sys, torch, torch.utils.flop_counter  # torch's own, but it imports triton where that is installed
def wake(): cuda.append("initialised"); raise RuntimeError("CUDA is not to be woken")
torch.cuda._lazy_init = wake
report = []
for statement in sys.argv[1:]:
    before, cuda = set(sys.modules), []
    exec(statement)
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    triton = {"strassen_tile.ops.cuda." + name for name in ("kernels", "launch", "tiles", "tune")}
    ours = sorted(triton & set(sys.modules))
    report.append([sorted(new), cuda or torch.cuda.is_initialized(), ours])
print(json.dumps(report))
"""
CONTROL = "import pandas\ntry: torch.cuda.current_device()\nexcept RuntimeError: pass"


def test_importing_the_package_is_light(tmp_path: Path) -> None:
    """Every user would pay seconds for a library they do not use; a CUDA context would break forked workers."""
    (tmp_path / "pandas.py").touch()  # the control needs something heavy to import, installed or not
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", PROBE, "import strassen_tile", CONTROL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (loaded, cuda, kernels), (control_loaded, control_cuda, _) = json.loads(done.stdout)
    assert HEAVY & set(control_loaded) and control_cuda, "the probe itself sees nothing"
    assert PACKAGE in loaded
    assert not HEAVY & set(loaded)
    assert not cuda
    assert not kernels  # those wake triton; whether it was there before us, the probe cannot tell any more
