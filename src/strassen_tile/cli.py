"""The console script: parse, run, print. What the commands do is in `experiments`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from strassen_tile import __version__
from strassen_tile.arguments import (
    Parser,
    add_settings,
    folder,
    integer,
    integers,
    json_object,
    names,
    real,
    reals,
    shapes_of_inputs,
    tile,
)
from strassen_tile.baselines.approximations import APPROXIMATIONS
from strassen_tile.errors import STLError
from strassen_tile.experiments import settings
from strassen_tile.experiments.recipe import Recipe
from strassen_tile.experiments.text_recipe import TextRecipe

_REPORT = ("matplotlib", "numpy", "rich")
_TRAINING = (*_REPORT, "accelerate", "safetensors", "transformers")
_NEEDS = {"report": _REPORT, "vision": _TRAINING, "language": _TRAINING}
_OUT = "folder for rows.json, report.html and plot.png"


_Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `strassen-tile`; the exit status: 0, 1 or 2 for a bad input (said in one line), 130 when interrupted.

    3: a comparison is finished, and runs of it diverged (a line each).
    """
    parser = Parser(prog="strassen-tile", description="Strassen-Tile: cheaper products for deep networks.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_compare(commands)
    _add_pretrain(commands)
    _add_bench(commands)
    _add_plan(commands)
    _add_basis(commands)
    _add_amm(commands)
    given = sys.argv[1:] if arguments is None else list(arguments)
    for argument in given:  # bytes that are no text (in a path) could not be written to the rows and the page
        if "\0" in argument or argument != argument.encode(errors="replace").decode():
            parser.error(f"arguments must be text in UTF-8; got {settings.short(argument)}")
    options = parser.parse_args(given)
    try:
        _need(options.extra)
        # rich and matplotlib: only once there is work
        programs = importlib.import_module(f"strassen_tile.experiments.{options.module}")
        return int(getattr(programs, options.run)(options))
    except (STLError, ImportError, OSError) as error:
        print(f"strassen-tile: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("strassen-tile: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:  # torch's allocator has no type of its own for it on a CPU
        if not isinstance(error, MemoryError) and not re.search("allocate memory|out of memory", str(error)):
            raise
        said = str(error).partition("\n")[0]
        print(f"strassen-tile: this is too large for this machine's memory: {said or 'out of memory'}", file=sys.stderr)
        return 1


def _need(extra: str) -> None:
    """Raise ImportError, with the pip command, where a package of this extra is not installed."""
    for package in _NEEDS[extra]:
        try:
            missing = importlib.util.find_spec(package) is None
        except (ImportError, ValueError):
            missing = True
        if missing:
            raise ImportError(
                f'this command needs {package}, which is not installed: pip install "strassen-tile[{extra}]"'
            )


def _add_compare(commands: _Commands) -> None:
    command = commands.add_parser(
        "compare",
        help="train the same network dense, 2:4 and STL on images",
        description="Train the same network, with the same recipe and seeds, dense, 2:4 sparse and Strassen-Tile; show "
        "accuracy beside FLOPs. An interrupted command goes on when it is repeated. Defaults are those of recipes that "
        "do not say otherwise.",
    )
    add = command.add_argument
    add(
        "--recipe",
        help="digits, fashion-mnist, imagefolder, t2t_vit_7_imagenet …, or a TOML with the options below (default: by data)",
    )
    add("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    add_settings(command, Recipe)
    add("--out", type=folder, default=Path("out/compare"), help=f"{_OUT} (default: out/compare)")
    command.set_defaults(module="commands", run="run_compare", extra="vision")


def _add_pretrain(commands: _Commands) -> None:
    command = commands.add_parser(
        "pretrain",
        help="train the same language model dense and STL on text",
        description="Train the same causal language model, with the same recipe and seeds, dense and made cheaper; show loss "
        "beside FLOPs and seconds. An interrupted command goes on when it is repeated. Defaults are those of recipes that do "
        "not say otherwise.",
    )
    add = command.add_argument
    add("--recipe", help="language, demo, or a TOML with the options below (default: language)")
    add("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    add_settings(command, TextRecipe)
    add("--out", type=folder, default=Path("out/pretrain"), help=f"{_OUT} (default: out/pretrain)")
    command.set_defaults(module="commands", run="run_pretrain", extra="language")


def _add_bench(commands: _Commands) -> None:
    command = commands.add_parser(
        "bench",
        help="time dense, STL and baselines on this machine",
        description="Time products in alternating pairs with the dense one, after checking each against float64.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    add("--dtype", type=names, default=("float32",), help="of float32, bfloat16, float16")
    add("--shapes", default="squares", help="NxKxM,… or squares, small, vit-b, llama-7b, mlp")
    add("--ranks", type=integers, default=(16, 24, 32), help="of the STL runs")
    add("--pass", dest="passes", type=names, default=("forward", "step"), help="forward, step (forward and backward)")
    add("--methods", type=names, default=("stl", "low-rank"), help="besides dense: of stl, low-rank, 2:4 (GPU)")
    add("--tile", type=tile, default=(4, 4, 4), help="side, or p,q,s")
    add("--seconds", type=real, default=4.0, help="for each pair")
    add("--threads", type=integer, default=None, help="(default: torch's)")
    add("--out", type=folder, default=Path("out/bench"), help=_OUT)
    command.set_defaults(module="commands", run="run_bench", extra="report")


def _add_plan(commands: _Commands) -> None:
    command = commands.add_parser(
        "plan",
        help="say which layers of a model would pay on this machine",
        description="Predict dense and STL time of every linear layer from this machine's measured rates.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    add("model", nargs="?", default=None, help="package.module:callable, or the folder of a transformers model")
    add("--arguments", type=json_object, default=None, help="what the callable is called with, as JSON")
    add("--shapes", default=None, help="NxKxM,… instead of a model")
    add("--rows", type=integer, default=4096, help="rows each layer is fed, all samples together, without --inputs")
    add(
        "--inputs",
        type=shapes_of_inputs,
        default=None,
        help='run the model on inputs of shapes as JSON: {"input_ids": [2, 128]}, [2, 3, 224, 224]; or "dummy" for its own',
    )
    add("--rank", type=integer, default=None, help="of the STL layers (default: by tile)")
    add("--tile", type=tile, default=(4, 4, 4), help="side, or p,q,s")
    add(
        "--mixing",
        choices=("sequence", "none", "causal"),
        default="sequence",
        help="which rows of a tile see each other",
    )
    add("--pass", dest="passes", choices=("forward", "step"), default="forward", help="inference or a training step")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where it would run")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model")
    add("--min-speedup", type=real, default=1.05, help="convert from here on")
    add("--refresh", action="store_true", help="measure the machine again")
    add("--out", type=folder, default=Path("out/plan"), help=_OUT)
    command.set_defaults(module="commands", run="run_plan", extra="report")


def _add_amm(commands: _Commands) -> None:
    command = commands.add_parser(
        "amm",
        help="compare approximate products: error against FLOPs and seconds",
        description="Approximate products of Gaussian matrices, of real layers, or of your own matrices in every way there is "
        "to spend a budget of FLOPs; show error and cosine beside FLOPs and seconds.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    add(
        "--data",
        default="gaussian",
        help="gaussian, minilm, a .safetensors file with x (N, K) and w (K, M), or X.npy,W.npy",
    )
    add("--shapes", default="1024x1024x1024", help="NxKxM,… of Gaussian matrices")
    add("--budgets", type=reals, default=(0.25, 0.375, 0.5, 0.75), help="fractions of dense's FLOPs")
    add("--methods", type=names, default=tuple(APPROXIMATIONS), help="what is compared")
    add("--trials", type=integer, default=10, help="of what is drawn at random")
    add("--seconds", type=real, default=0.2, help="for each time beside dense's")
    add("--seed", type=integer, default=0, help="of Gaussian matrices")
    add("--out", type=folder, default=Path("out/amm"), help=_OUT)
    command.set_defaults(module="amm", run="run_amm", extra="report")


def _add_basis(commands: _Commands) -> None:
    command = commands.add_parser("basis", help="list, show, verify, search, condition, import and export bases")
    parts = command.add_subparsers(required=True, metavar="command")
    spec = "a name (naive, strassen, approximate, truncated, random:SEED, group:NAME), or a file"

    def part(name: str, said: str) -> Parser:
        one = parts.add_parser(name, help=said, description=said[:1].upper() + said[1:] + ".")
        one.set_defaults(module="basis", run=f"run_{name}", extra="report")
        return one

    def chosen(one: Parser) -> None:
        one.add_argument("basis", help=spec)
        one.add_argument("--tile", type=tile, default=None, help="side, or p,q,s (default: 4, of a file its own)")
        one.add_argument("--rank", type=integer, default=None, help="where the name does not say it (default: by tile)")

    listed = part("list", "the bases that ship with the package: tile, rank, error, kappa")
    listed.add_argument("--tile", type=tile, default=None, help="side, or p,q,s: of this one only")
    shown = part("show", "what is to be said of a basis, and its factors")
    chosen(shown)
    shown.add_argument("--factors", action="store_true", help="the coefficients, too")
    part("verify", "say of files whether they are what they claim to be").add_argument("files", nargs="+", type=folder)
    taken = part("import", "read a published algorithm in any format and write it as JSON")
    taken.add_argument("file", type=folder, help="JSON, NPZ, one of three SMS files, or coefficients")
    taken.add_argument("--out", type=folder, required=True, help="a .json file")
    given = part("export", "write a basis as .json, .sms (three files) or .txt (coefficients)")
    chosen(given)
    given.add_argument("--out", type=folder, required=True, help="the file; its suffix says the format")
    searched = part(
        "search", "search for the basis of least error; a search that was stopped goes on when it is repeated"
    )
    searched.add_argument("--tile", type=tile, default=(4, 4, 4), help="side, or p,q,s (default: 4)")
    searched.add_argument("--rank", type=integer, required=True, help="number of products")
    searched.add_argument("--minutes", type=real, default=None, help="how long at most")
    searched.add_argument(
        "--rounds", type=integer, default=None, help="how many rounds at most (default: by minutes, or 1)"
    )
    searched.add_argument("--seed", type=integer, default=0, help="of all that is drawn (default: 0)")
    searched.add_argument(
        "--start", action="append", default=[], help=f"tried first, of a rank beside or the same: {spec}"
    )
    searched.add_argument("--out", type=folder, required=True, help="a .json file")
    better = part("condition", "the equivalent exact basis that rounds best")
    chosen(better)
    better.add_argument("--starts", type=integer, default=4, help="of the descent (default: 4)")
    better.add_argument("--out", type=folder, required=True, help="a .json file")


if __name__ == "__main__":
    sys.exit(main())
