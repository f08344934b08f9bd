"""The arguments of the commands about bases and approximate products: `basis` and `amm`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

from strassen_tile.arguments import Parser, folder, integer, names, real, reals, tile
from strassen_tile.baselines.roster import APPROXIMATIONS

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
OUT = "folder for rows.json, report.html and plot.png"


def add_amm(commands: Commands) -> None:
    """The parser of `strassen-tile amm`."""
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
        help="gaussian, minilm, a .safetensors file with x (N, K) and w (K, M), or X.npy,W.npy: half of x's "
        "rows, drawn at random, are fitted to, and all figures are of the others",
    )
    add("--shapes", default="1024x1024x1024", help="NxKxM,… of Gaussian matrices")
    add("--budgets", type=reals, default=(0.25, 0.375, 0.5, 0.75), help="fractions of dense's FLOPs")
    add("--methods", type=names, default=APPROXIMATIONS, help="what is compared")
    add("--trials", type=integer, default=10, help="of what is drawn at random")
    add("--seconds", type=real, default=0.2, help="for each time beside dense's")
    add("--seed", type=integer, default=0, help="of Gaussian matrices")
    add("--out", type=folder, default=Path("out/amm"), help=OUT)
    command.set_defaults(module="amm", run="run_amm", extra="report")


def add_basis(commands: Commands) -> None:
    """The parsers of `strassen-tile basis`."""
    command = commands.add_parser("basis", help="list, show, verify, search, condition, import and export bases")
    parts = command.add_subparsers(required=True, metavar="command")
    spec = (
        "a name (as basis list has them, naive, strassen, approximate, truncated, random:SEED, group:NAME), or a file"
    )

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
    searched.set_defaults(goes_on=True)
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
