"""The console script: parse, run, print. What the commands do is in `experiments`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from strassen_tile import __version__
from strassen_tile.errors import ShapeError, STLError
from strassen_tile.tiling import as_tile


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `strassen-tile`; the exit status: 0, 1 for a bad input (said in one line), 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="strassen-tile", description="Strassen-Tile: cheaper products for deep networks."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_compare(commands)
    _add_bench(commands)
    _add_plan(commands)
    options = parser.parse_args(arguments)
    try:
        from strassen_tile.experiments import commands as programs  # rich and matplotlib: only once there is work

        return int(getattr(programs, options.run)(options))
    except (STLError, ImportError, OSError) as error:
        print(f"strassen-tile: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("strassen-tile: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"whole numbers joined by commas are wanted; got {text!r}") from error


def _object(text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a JSON object is wanted; got {text!r}: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'a JSON object such as {{"image_size": 224}} is wanted; got {text!r}')
    return found


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _seeds(text: str) -> tuple[int, ...]:
    numbers = _integers(text)
    return tuple(range(numbers[0])) if len(numbers) == 1 and numbers[0] > 0 else numbers


def _tile(text: str) -> tuple[int, int, int]:
    numbers = _integers(text.replace("x", ","))
    try:
        return as_tile(numbers[0] if len(numbers) == 1 else numbers)
    except ShapeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "compare",
        help="train the same network dense, 2:4 and STL on images",
        description="Train the same network, with the same recipe and seeds, dense, 2:4 sparse and Strassen-Tile; show "
        "accuracy beside FLOPs. An interrupted command goes on when it is repeated.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    add("--data", default="digits", help="digits (bundled), or a folder: IDX files, or images by class")
    add("--model", default=None, help="T2T-ViT size (default: by image size)")
    add("--image-size", type=int, default=None, help="side in pixels (default: the data's)")
    add("--methods", type=_names, default=("dense", "2:4", "stl"), help="of dense, 2:4, stl, low-rank, dense+mix")
    add("--ranks", type=_integers, default=(16, 24, 32), help="of the STL runs")
    add("--seeds", type=_seeds, default=(0, 1), help="how many seeds, or a list of them")
    add("--epochs", type=int, default=None, help="(default: by data)")
    add("--batch-size", type=int, default=None, help="(default: by data)")
    add("--lr", type=float, default=1e-3, help="peak learning rate of AdamW")
    add("--init", choices=("random", "approximate"), default="random", help="where STL starts")
    add(
        "--mixing",
        choices=("sequence", "none", "causal"),
        default="sequence",
        help="which rows of a tile see each other",
    )
    add("--encoder-scope", choices=("layer", "tile"), default="layer", help="one encoder a layer, or one a column tile")
    add("--tile", type=_tile, default=(4, 4, 4), help="side, or p,q,s")
    add(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="shift and flip images (default: by data)",
    )
    add("--limit", type=int, default=None, help="train on that many images only")
    add("--out", type=Path, default=Path("out/compare"), help="folder for rows.json, report.html and plot.png")
    command.set_defaults(run="run_compare")


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "bench",
        help="time dense, STL and rivals on this machine",
        description="Time products in alternating pairs with the dense one, after checking each against float64.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    add("--dtype", type=_names, default=("float32",), help="of float32, bfloat16, float16")
    add("--shapes", default="squares", help="NxKxM,… or squares, small, vit-b, llama-7b, mlp")
    add("--ranks", type=_integers, default=(16, 24, 32), help="of the STL runs")
    add("--pass", dest="passes", type=_names, default=("forward", "step"), help="forward, step (forward and backward)")
    add("--methods", type=_names, default=("stl", "low-rank"), help="of stl, low-rank, 2:4 (GPU)")
    add("--tile", type=_tile, default=(4, 4, 4), help="side, or p,q,s")
    add("--seconds", type=float, default=4.0, help="for each pair")
    add("--threads", type=int, default=None, help="(default: torch's)")
    add("--out", type=Path, default=Path("out/bench"), help="folder for rows.json, report.html and plot.png")
    command.set_defaults(run="run_bench")


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    add("--rows", type=int, default=4096, help="rows each layer is fed, all samples together")
    add("--rank", type=int, default=24, help="of the STL layers")
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
    add("--min-speedup", type=float, default=1.05, help="convert from here on")
    add("--refresh", action="store_true", help="measure the machine again")
    add("--out", type=Path, default=Path("out/plan"), help="folder for rows.json, report.html and plot.png")
    command.set_defaults(run="run_plan")


if __name__ == "__main__":
    sys.exit(main())
