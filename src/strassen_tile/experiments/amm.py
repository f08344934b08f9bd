"""`strassen-tile amm`: what a person sees while products are approximated."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.live import Live
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from strassen_tile.errors import ConfigError
from strassen_tile.experiments import approximation, real_layers
from strassen_tile.experiments.approximation import Problem
from strassen_tile.experiments.measuring import make_writable
from strassen_tile.experiments.speed import shapes_of
from strassen_tile.records import Row, write_rows
from strassen_tile.report import amm as report
from strassen_tile.report.table import rich_table

TITLE = "Approximate products"


def run_amm(options: argparse.Namespace) -> int:
    """`strassen-tile amm`; its exit status."""
    problems = _problems(options)
    found = approximation.measure(
        problems, options.methods, options.budgets, trials=options.trials, seconds=options.seconds
    )
    make_writable(options.out)
    rows: list[Row] = []
    console = Console(markup=False, emoji=False)
    bars = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console)
    task = bars.add_task("")
    with Live(bars, console=console, refresh_per_second=2) as live:
        for row in found:
            rows.append(row)
            write_rows(options.out / "rows.json", rows)  # what was measured is kept if the next one fails
            bars.update(task, description=f"{row['data']}: {row['method']} at {row['budget']}, {len(rows)} measured")
        live.update("")
    missing = approximation.left_out(problems, options.methods, options.budgets, rows)
    if not rows:
        raise ConfigError(
            f"nothing was measured, for no budget pays for anything: {', '.join(missing):.400}; raise --budgets"
        )
    if missing:
        console.print(
            f"Left out, for the budget pays for nothing at these sizes: {', '.join(missing)}.", soft_wrap=True
        )
    console.print(rich_table(TITLE, report.columns(), rows))
    page = report.write_report(options.out, rows, TITLE)
    console.print(f"{page}\n{options.out / 'plot.png'}\n{options.out / 'rows.json'}", soft_wrap=True)
    return 0


def _problems(options: argparse.Namespace) -> list[Problem]:
    if options.data == "gaussian":
        return [approximation.gaussian(n, k, m, options.seed) for n, k, m in shapes_of(options.shapes)]
    if options.data == "minilm":
        return real_layers.minilm()
    return [approximation.read_pair(options.data)]
