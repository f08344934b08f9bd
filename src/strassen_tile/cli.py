"""The console script: parse, run, print. What the commands do is in `experiments`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

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
    shapes_of_inputs,
    tile,
)
from strassen_tile.bases_cli import OUT, Commands, add_amm, add_basis
from strassen_tile.errors import STLError
from strassen_tile.experiments import settings
from strassen_tile.experiments.finetune_recipe import FinetuneRecipe
from strassen_tile.experiments.recipe import Recipe
from strassen_tile.experiments.text_recipe import TextRecipe

_REPORT = ("matplotlib", "numpy", "rich")
_TRAINING = (*_REPORT, "accelerate", "safetensors", "transformers")
_NEEDS = {"report": _REPORT, "vision": _TRAINING, "language": _TRAINING}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `strassen-tile`; the exit status: 0, 1 or 2 for a bad input (said in one line), 130 when interrupted.

    3: a comparison is finished, and runs of it diverged (a line each).
    """
    parser = Parser(prog="strassen-tile", description="Strassen-Tile: cheaper products for deep networks.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(goes_on=False)  # where it was interrupted, if it is repeated
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_comparisons(commands)
    _add_export(commands)
    _add_bench(commands)
    _add_plan(commands)
    add_basis(commands)
    add_amm(commands)
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
        said = "; the same command goes on from here" if options.goes_on else ""
        print(f"strassen-tile: interrupted{said}", file=sys.stderr)
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


def _add_comparison(
    commands: Commands, name: str, record: type, extra: str, said: str, description: str, recipes: str
) -> None:
    command = commands.add_parser(
        name,
        help=said,
        description=f"{description} An interrupted command goes on when it is repeated. Defaults are those of recipes that do "
        "not say otherwise.",
    )
    add = command.add_argument
    add("--recipe", help=recipes)
    add("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    add_settings(command, record)
    add("--out", type=folder, default=Path("out", name), help=f"{OUT} (default: out/{name})")
    command.set_defaults(module="commands", run=f"run_{name}", extra=extra, goes_on=True)


def _add_comparisons(commands: Commands) -> None:
    _add_comparison(
        commands,
        "compare",
        Recipe,
        "vision",
        "train the same network dense, 2:4 and STL on images",
        "Train the same network, with the same recipe and seeds, dense, 2:4 sparse and Strassen-Tile; show accuracy beside "
        "FLOPs.",
        "digits, fashion-mnist, imagefolder, t2t_vit_7_imagenet …, or a TOML with the options below (default: by data)",
    )
    _add_comparison(
        commands,
        "pretrain",
        TextRecipe,
        "language",
        "train the same language model dense and STL on text",
        "Train the same causal language model, with the same recipe and seeds, dense and made cheaper; show loss beside FLOPs "
        "and seconds.",
        "language, demo, or a TOML with the options below (default: language)",
    )
    _add_comparison(
        commands,
        "finetune",
        FinetuneRecipe,
        "language",
        "make a pretrained model cheaper and train it: 2:4, low rank, STL",
        "Make the same pretrained model cheaper in several ways, fit each to calibration text, and train all alike; show what "
        "it is worth before and after beside FLOPs.",
        "decoder, encoder, or a TOML with the options below (default: by model)",
    )


def _add_export(commands: Commands) -> None:
    command = commands.add_parser(
        "export",
        help="make a folder for from_pretrained of a saved run of pretrain or finetune",
        description="Write the trained model of a run, and its tokenizer, as a folder for transformers' from_pretrained: "
        "dense, 2:4 (as zeros) or STL, which needs `import strassen_tile`.",
    )
    add = command.add_argument
    add("weights", type=folder, help="a file of models/ that a command with --save left")
    add("--out", type=folder, required=True, help="the folder to make")
    command.set_defaults(module="exporting", run="run_export", extra="language")


def _add_bench(commands: Commands) -> None:
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
    add(
        "--methods",
        type=names,
        default=("stl", "low-rank"),
        help="besides dense: of stl, low-rank, 2:4 (GPU) and all of amm",
    )
    add("--tile", type=tile, default=(4, 4, 4), help="side, or p,q,s")
    add("--seconds", type=real, default=4.0, help="for each pair")
    add("--threads", type=integer, default=None, help="(default: torch's)")
    add("--out", type=folder, default=Path("out/bench"), help=OUT)
    command.set_defaults(module="measuring", run="run_bench", extra="report")


def _add_plan(commands: Commands) -> None:
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
    add("--out", type=folder, default=Path("out/plan"), help=OUT)
    command.set_defaults(module="measuring", run="run_plan", extra="report")


if __name__ == "__main__":
    sys.exit(main())
