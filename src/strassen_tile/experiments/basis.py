"""`strassen-tile basis`: what is known of bases, files in and out, the search."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from strassen_tile import bases
from strassen_tile.bases.names import own_rank
from strassen_tile.bases.search import Found, search
from strassen_tile.bases.text_files import sms_paths
from strassen_tile.basis import Basis
from strassen_tile.basis_record import FACTORS
from strassen_tile.errors import BasisError
from strassen_tile.experiments.measuring import make_writable

_HEADS = ("tile", "rank", "error", "products fewer", "parameters", "kappa", "growth", "name")


def run_list(options: argparse.Namespace) -> int:
    """`strassen-tile basis list`; its exit status."""
    wanted = None if options.tile is None else sorted(options.tile)
    table = Table(*_HEADS, title="Bases that ship with the package")
    for tile, rank in bases.shipped():
        if wanted is None or sorted(tile) == wanted:
            table.add_row(*map(Text, _facts(bases.approximate(tile, rank))))
    Console(markup=False, emoji=False).print(table)
    print(
        "error: expected relative squared error on Gaussian matrices. A tile serves every order of its sides.\n"
        "products fewer: of dense's; parameters: numbers of an encoded weight, as a multiple of dense's. kappa: rounding\n"
        "adds about kappa u² to the squared error, 1 for the naive algorithm; growth: its bound. A name serves wherever a\n"
        "basis is wanted.\n"
        "Exact ones for any tile and cubes of 2, 4, 8, …: naive, strassen. Of finite groups: group:NAME, such as group:D4xZ2^2."
    )
    return 0


def run_show(options: argparse.Namespace) -> int:
    """`strassen-tile basis show`; its exit status."""
    basis = bases.named(options.basis, options.tile, options.rank)
    table = Table(*_HEADS)
    table.add_row(*map(Text, _facts(basis)))
    Console(markup=False, emoji=False).print(table)
    if options.factors:
        for field in FACTORS:
            print(f"{field} {tuple(getattr(basis, field).shape)}")
            for number, rows in enumerate(getattr(basis, field).tolist(), 1):
                print(f"  {number}: " + "; ".join(" ".join(f"{value:.6g}" for value in row) for row in rows))
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """`strassen-tile basis verify`: a line a file; 1 if one is not what it claims to be."""
    wrong = 0
    for file in options.files:
        try:
            basis = bases.load(file)
        except BasisError as error:
            wrong = 1
            print(f"refused: {error}", file=sys.stderr)
        else:
            what = "exact" if basis.is_exact else f"relative squared error {basis.error:.6g}"
            p, q, s = basis.tile
            print(f"{file}: {p}×{q}×{s}, rank {basis.rank}, {what}, kappa {basis.kappa:.4g}")
    return wrong


def run_import(options: argparse.Namespace) -> int:
    """`strassen-tile basis import`; its exit status."""
    return _saved(bases.load(options.file), _as_json(options.out))


def run_export(options: argparse.Namespace) -> int:
    """`strassen-tile basis export`; its exit status."""
    return _saved(bases.named(options.basis, options.tile, options.rank), options.out)


def run_condition(options: argparse.Namespace) -> int:
    """`strassen-tile basis condition`; its exit status."""
    before = bases.named(options.basis, options.tile, options.rank)
    after = before.conditioned(starts=options.starts)
    print(
        f"kappa {before.kappa:.4g} → {after.kappa:.4g}, growth factor {before.growth_factor:.4g} → {after.growth_factor:.4g}"
    )
    return _saved(after, _as_json(options.out))


def run_search(options: argparse.Namespace) -> int:
    """`strassen-tile basis search`; its exit status, 1 where nothing was found within bounds."""
    out = _as_json(options.out)
    starts = [_start(spec, options) for spec in options.start]
    make_writable(out.parent)
    with Live(console=Console(), auto_refresh=False, transient=True) as live:

        def progress(found: Found) -> None:
            live.update(_course(found), refresh=True)

        found = search(
            options.tile,
            options.rank,
            rounds=options.rounds,
            minutes=options.minutes,
            seed=options.seed,
            starts=starts,
            file=out,
            progress=progress,
        )
    if found.basis is None:
        print(f"nothing within bounds after {found.rounds} rounds; more of them may find something", file=sys.stderr)
        return 1
    print(
        f"{out}: relative squared error {found.basis.error:.6g} after {found.rounds} rounds, kappa {found.basis.kappa:.4g}"
    )
    return 0


def _start(spec: str, options: argparse.Namespace) -> Basis:
    """A start by name, at the rank that is searched for where it has none of its own, or from a file as it is."""
    if Path(spec).is_file():
        return bases.load(spec)
    own = own_rank(spec, options.tile)
    return bases.named(spec, options.tile, options.rank if own is None else own)


def _course(found: Found) -> Table:
    table = Table("round", "error", title=f"{found.rounds} rounds")
    for at, error in found.history[-8:]:
        table.add_row(str(at), f"{error:.6f}")
    return table


def _facts(basis: Basis) -> list[str]:
    """The cells of `_HEADS`."""
    return [
        "×".join(map(str, basis.tile)),
        str(basis.rank),
        "exact" if basis.is_exact else f"{basis.error:.4f}" if basis.error >= 1e-3 else f"{basis.error:.1e}",
        f"{1 / basis.flop_ratio:.2f}×",
        f"{basis.param_ratio:.3g}×",
        f"{basis.kappa:.4g}",
        f"{basis.growth_factor:.4g}",
        basis.name,
    ]


def _as_json(out: Path) -> Path:
    if out.suffix.lower() != ".json":
        raise BasisError(f"--out must be a .json file; got {out}")
    return out


def _saved(basis: Basis, out: Path) -> int:
    bases.save(basis, out)
    print(*(sms_paths(out) if out.suffix.lower() == ".sms" else [out]), sep="\n")
    return 0
