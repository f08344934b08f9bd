"""What a person sees while a command runs: live table, progress, and where the results are."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from strassen_tile.cost import machine
from strassen_tile.errors import ConfigError
from strassen_tile.experiments import language, loading, planning, runner, speed, vision
from strassen_tile.experiments.endings import MODELS
from strassen_tile.experiments.rates import Rates, Tuned, best_rates
from strassen_tile.experiments.recipe import Recipe, recipe_of
from strassen_tile.experiments.settings import settings_of
from strassen_tile.experiments.text_recipe import TextRecipe, text_recipe_of
from strassen_tile.files import make_folder
from strassen_tile.integrations.ranks import RankError, ranks
from strassen_tile.nn import STLConfig
from strassen_tile.records import Row, environment, write_rows
from strassen_tile.report import bench as bench_report
from strassen_tile.report import plan as plan_report
from strassen_tile.report import pretrain as pretrain_report
from strassen_tile.report.compare import columns, summarise, table_caption, write_report
from strassen_tile.report.pretrain_runs import summarise as pretrain_summarise
from strassen_tile.report.runs import progress_note
from strassen_tile.report.table import Column, ratio, rich_table, seconds

T = TypeVar("T", bound=Tuned)
DIVERGED = 3  # the exit status of a comparison that is finished, in which runs diverged


def run_compare(options: argparse.Namespace) -> int:
    """`strassen-tile compare`; its exit status."""
    recipe = recipe_of(options.recipe, options.changes, _given(options, Recipe))
    report = _Report("Dense, 2:4 and Strassen-Tile", columns, summarise, table_caption, write_report, progress_note)
    return _compared(recipe, vision.tuning, vision.comparison, report, options.out)


def run_pretrain(options: argparse.Namespace) -> int:
    """`strassen-tile pretrain`; its exit status."""
    recipe = text_recipe_of(options.recipe, options.changes, _given(options, TextRecipe))
    report = _Report(
        "Language models, dense and Strassen-Tile",
        pretrain_report.columns,
        pretrain_summarise,
        pretrain_report.caption,
        pretrain_report.write_report,
        lambda rows: "",
    )
    return _compared(recipe, language.tuning, language.comparison, report, options.out)


@dataclass(frozen=True)
class _Report:
    """How a kind of comparison is shown: heading of its page, columns, records, caption, page, and a last word."""

    heading: str
    columns: Callable[..., Sequence[Column]]
    summarise: Callable[[list[Row]], list[Row]]
    caption: Callable[[list[Row]], str]
    write: Callable[..., Path]
    note: Callable[[list[Row]], str]


def _given(options: argparse.Namespace, record: type) -> dict[str, object]:
    return {key: value for key, value in vars(options).items() if key in settings_of(record)}


def _compared(
    recipe: T,
    tuning: Callable[[T], runner.Comparison],
    comparison: Callable[[T, Rates], runner.Comparison],
    report: _Report,
    out: Path,
) -> int:
    """Choose rates and compare; the exit status. Of several processes the first shows what there is to see."""
    world = ranks()
    try:
        console = Console(markup=False, emoji=False, quiet=not world.is_main_process)
        rates: Rates = {}
        if recipe.lr_grid:
            trials = tuning(recipe)
            tried = _show(trials, replace(report, heading="Learning rates"), out / "tuning", console, recipe.jobs)
            for line in runner.diverged(trials.runs, out / "tuning", tried):  # which is an answer to what was asked
                console.print(line, soft_wrap=True)
            rates = best_rates(tried, recipe.lr_grid)
        compared = comparison(recipe, rates)
        rows = _show(compared, report, out, console, recipe.jobs)
    except RankError:
        return 1  # the first process has said why
    world.destroy_process_group()  # not after an error: others may be waiting in the group
    lines = runner.diverged(compared.runs, out, rows)
    if world.is_main_process:
        for line in lines:
            print(f"strassen-tile: {line}", file=sys.stderr)
    return DIVERGED if lines else 0


def _show(comparison: runner.Comparison, report: _Report, out: Path, console: Console, jobs: int) -> list[Row]:
    """Run a comparison, with what a person sees of it; its rows."""
    for remark in comparison.remarks:
        console.print(remark, soft_wrap=True)
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip
    runs, steps = bars.add_task("runs", total=None), bars.add_task("steps", total=None)
    with Live(bars, console=console, refresh_per_second=4) as live:

        def on_progress(at: runner.Progress) -> None:
            bars.update(runs, completed=at.run - 1, total=at.runs)
            bars.update(steps, description=at.label, completed=at.step, total=at.steps)

        def on_rows(rows: list[Row]) -> None:
            live.update(Group(rich_table(comparison.title, report.columns(state=True), report.summarise(rows)), bars))

        def on_end(rows: list[Row]) -> None:
            live.update("")
            notes = [*comparison.notes, *comparison.remarks, *filter(None, [report.note(rows)])]
            report.write(out, rows, f"{report.heading}: {comparison.title}", notes)

        rows = runner.run(comparison, out, on_rows=on_rows, on_progress=on_progress, on_end=on_end, jobs=jobs)
    summary = report.summarise(rows)
    console.print(rich_table(comparison.title, report.columns(), summary, report.caption(summary)))
    if note := report.note(rows):
        console.print(note, soft_wrap=True)
    console.print(f"{out / 'report.html'}\n{out / 'plot.png'}\n{out / 'rows.json'}", soft_wrap=True)
    if (out / MODELS).is_dir():
        console.print(str(out / MODELS), soft_wrap=True)
    return rows


def run_bench(options: argparse.Namespace) -> int:
    """`strassen-tile bench`."""
    console = Console(markup=False, emoji=False)
    shapes = speed.shapes_of(options.shapes)
    title = f"Speed on {options.device}, {options.threads or torch.get_num_threads()} threads"
    if options.threads is not None:
        cores = os.cpu_count() or 1
        if not 1 <= options.threads <= cores:
            raise ConfigError(
                f"--threads must be positive and at most {cores}, as many as there are cores; got {options.threads}"
            )
        torch.set_num_threads(options.threads)
    runs = [
        speed.bench(
            shapes,
            options.ranks,
            device=options.device,
            dtype=dtype,
            passes=options.passes,
            methods=options.methods,
            tile=options.tile,
            seconds=options.seconds,
        )
        for dtype in options.dtype
    ]
    make_writable(options.out)
    rows: list[Row] = []
    each = sum(
        speed.row_count(name, options.methods, options.ranks, options.tile) for name in dict.fromkeys(options.passes)
    )
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    task = bars.add_task("pairs", total=len(options.dtype) * len(shapes) * each)
    with Live(bars, console=console, refresh_per_second=2) as live:
        for row in itertools.chain.from_iterable(runs):
            rows.append(row)
            write_rows(options.out / "rows.json", rows)  # what was measured is kept if the next one fails
            bars.advance(task)
            live.update(Group(rich_table(title, bench_report.columns(), rows), bars))
        live.update("")
    console.print(rich_table(title, bench_report.columns(), rows))
    notes = speed.left_out(options.passes, options.methods)
    if (missed := bench_report.prediction_error(rows)) is not None:
        alike, of = bench_report.decisions(rows)
        notes.append(
            f"Median absolute error of the predicted times: {missed:.0%}. Whether STL pays was predicted as measured in "
            f"{alike} of {of} cases."
        )
    for note in notes:
        console.print(note)
    page = bench_report.write_report(options.out, rows, title, notes)
    console.print(f"{page}\n{options.out / 'plot.png'}\n{options.out / 'rows.json'}", soft_wrap=True)
    return 0


def run_plan(options: argparse.Namespace) -> int:
    """`strassen-tile plan`."""
    console = Console(markup=False, emoji=False)
    if not 0 <= options.min_speedup < math.inf or options.rows < 1:
        raise ConfigError(
            f"--rows must be positive and --min-speedup a number, finite and ≥ 0; got {options.rows}, {options.min_speedup}"
        )
    if (options.model is None) == (options.shapes is None):
        raise ConfigError("say what to plan for: a model (package.module:callable, or a folder), or --shapes NxKxM,…")
    if options.inputs is not None and options.model is None:
        raise ConfigError("--inputs are what a model is run on: name one, instead of --shapes")
    config = STLConfig(tile=options.tile, rank=options.rank, mixing=options.mixing)
    if options.shapes is not None:
        layers = planning.layers_of_shapes(speed.shapes_of(options.shapes))
        notes = []
    else:
        model = loading.load_model(options.model, options.arguments, to_run=options.inputs is not None)
        inputs = None if options.inputs is None else loading.example_inputs_of(model, options.inputs)
        layers = planning.layers_of(model, config, rows=options.rows, example_inputs=inputs)
        notes = planning.notes(model, config, inputs)
    if not layers:
        raise ConfigError("the model has no linear layers to plan for")
    make_writable(options.out)
    with console.status("measuring this machine (about three seconds, once)"):
        here = machine(options.device, speed.DTYPES[options.dtype], refresh=options.refresh)
    where = environment()
    rows: list[Row] = [
        {**row, **where}
        for row in planning.decide(layers, config, here, min_speedup=options.min_speedup, name=options.passes)
    ]
    title = f"Rank {config.rank} on {here.device}, {here.dtype}, {options.passes}"
    console.print(rich_table(title, plan_report.columns(), plan_report.grouped(rows)))
    dense, planned = plan_report.totals(rows)
    notes.insert(
        0, f"Linear layers together: dense {seconds(dense)}, as planned {seconds(planned)} ({ratio(dense / planned)})."
    )
    for note in notes:
        console.print(note)
    page = plan_report.write_report(options.out, rows, f"Which layers would pay: {title}", notes)
    console.print(f"{page}\n{options.out / 'plot.png'}\n{options.out / 'rows.json'}", soft_wrap=True)
    return 0


def make_writable(folder: Path) -> None:
    """The folder, made if missing; what keeps it from being written to is said before any work is done."""
    make_folder(folder)
    tempfile.TemporaryFile(dir=folder).close()
