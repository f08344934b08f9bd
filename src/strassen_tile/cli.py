"""The console script: parse, run, print. What the commands do is in `experiments`."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from strassen_tile import __version__
from strassen_tile.errors import STLError
from strassen_tile.experiments import settings
from strassen_tile.experiments.recipe import Recipe
from strassen_tile.experiments.text_recipe import TextRecipe
from strassen_tile.files import parse_json

_REPORT = ("matplotlib", "numpy", "rich")
_TRAINING = (*_REPORT, "accelerate", "safetensors", "transformers")
_NEEDS = {"report": _REPORT, "vision": _TRAINING, "language": _TRAINING}
_OUT = "folder for rows.json, report.html and plot.png"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with an argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


_Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `strassen-tile`; the exit status: 0, 1 or 2 for a bad input (said in one line), 130 when interrupted.

    3: a comparison is finished, and runs of it diverged (a line each).
    """
    parser = _Parser(prog="strassen-tile", description="Strassen-Tile: cheaper products for deep networks.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_compare(commands)
    _add_pretrain(commands)
    _add_bench(commands)
    _add_plan(commands)
    given = sys.argv[1:] if arguments is None else list(arguments)
    for argument in given:  # bytes that are no text (in a path) could not be written to the rows and the page
        if "\0" in argument or argument != argument.encode(errors="replace").decode():
            parser.error(f"arguments must be text in UTF-8; got {settings.short(argument)}")
    options = parser.parse_args(given)
    try:
        _need(options.extra)
        from strassen_tile.experiments import commands as programs  # rich and matplotlib: only once there is work

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


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for argparse, which shows the messages of its own error alone."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except STLError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


_integer, _integers, _real, _names, _tile = map(
    _argument, (settings.integer, settings.integers, settings.real, settings.listed, settings.tile)
)


def _folder(text: str) -> Path:
    try:
        if text.strip():
            return Path(text).expanduser()
    except RuntimeError as error:  # a home that nobody has
        raise argparse.ArgumentTypeError(f"{error}; got {settings.short(text)}") from error
    raise argparse.ArgumentTypeError("the path of a folder is wanted, '.' for this one; got an empty one")


def _object(text: str) -> dict[str, object]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a JSON object is wanted; got {settings.short(text)}: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(
            f'a JSON object such as {{"image_size": 224}} is wanted; got {settings.short(text)}'
        )
    return found


def _inputs(text: str) -> object:
    try:
        found = text if text == "dummy" else parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"shapes as JSON are wanted, or dummy; got {settings.short(text)}: {error}"
        ) from error
    if not isinstance(found, str | dict | list):
        raise argparse.ArgumentTypeError(
            f"a JSON object or list of shapes is wanted, or dummy; got {settings.short(text)}"
        )
    return found


def _add_settings(command: _Parser, record: type) -> None:
    """An option for each field of the dataclass. One that is not given leaves no attribute: a recipe may say it."""
    for setting in settings.settings_of(record).values():
        default = "by recipe" if setting.default is MISSING else _shown(setting.default)
        more: dict[str, Any] = {"type": _argument(setting.parse), "metavar": "|".join(setting.choices) or None}
        if setting.is_switch:
            more = {"action": argparse.BooleanOptionalAction}
        command.add_argument(
            f"--{setting.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=f"{setting.help} (default: {default})".replace("%", "%%"),
            **more,
        )


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


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
    _add_settings(command, Recipe)
    add("--out", type=_folder, default=Path("out/compare"), help=f"{_OUT} (default: out/compare)")
    command.set_defaults(run="run_compare", extra="vision")


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
    _add_settings(command, TextRecipe)
    add("--out", type=_folder, default=Path("out/pretrain"), help=f"{_OUT} (default: out/pretrain)")
    command.set_defaults(run="run_pretrain", extra="language")


def _add_bench(commands: _Commands) -> None:
    command = commands.add_parser(
        "bench",
        help="time dense, STL and baselines on this machine",
        description="Time products in alternating pairs with the dense one, after checking each against float64.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    add("--dtype", type=_names, default=("float32",), help="of float32, bfloat16, float16")
    add("--shapes", default="squares", help="NxKxM,… or squares, small, vit-b, llama-7b, mlp")
    add("--ranks", type=_integers, default=(16, 24, 32), help="of the STL runs")
    add("--pass", dest="passes", type=_names, default=("forward", "step"), help="forward, step (forward and backward)")
    add("--methods", type=_names, default=("stl", "low-rank"), help="besides dense: of stl, low-rank, 2:4 (GPU)")
    add("--tile", type=_tile, default=(4, 4, 4), help="side, or p,q,s")
    add("--seconds", type=_real, default=4.0, help="for each pair")
    add("--threads", type=_integer, default=None, help="(default: torch's)")
    add("--out", type=_folder, default=Path("out/bench"), help=_OUT)
    command.set_defaults(run="run_bench", extra="report")


def _add_plan(commands: _Commands) -> None:
    command = commands.add_parser(
        "plan",
        help="say which layers of a model would pay on this machine",
        description="Predict dense and STL time of every linear layer from this machine's measured rates.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    add("model", nargs="?", default=None, help="package.module:callable, or the folder of a transformers model")
    add("--arguments", type=_object, default=None, help="what the callable is called with, as JSON")
    add("--shapes", default=None, help="NxKxM,… instead of a model")
    add("--rows", type=_integer, default=4096, help="rows each layer is fed, all samples together, without --inputs")
    add(
        "--inputs",
        type=_inputs,
        default=None,
        help='run the model on inputs of shapes as JSON: {"input_ids": [2, 128]}, [2, 3, 224, 224]; or "dummy" for its own',
    )
    add("--rank", type=_integer, default=None, help="of the STL layers (default: by tile)")
    add("--tile", type=_tile, default=(4, 4, 4), help="side, or p,q,s")
    add(
        "--mixing",
        choices=("sequence", "none", "causal"),
        default="sequence",
        help="which rows of a tile see each other",
    )
    add("--pass", dest="passes", choices=("forward", "step"), default="forward", help="inference or a training step")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where it would run")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model")
    add("--min-speedup", type=_real, default=1.05, help="convert from here on")
    add("--refresh", action="store_true", help="measure the machine again")
    add("--out", type=_folder, default=Path("out/plan"), help=_OUT)
    command.set_defaults(run="run_plan", extra="report")


if __name__ == "__main__":
    sys.exit(main())
