"""Commands that measure this machine, or plan for it: `bench` and `plan`, as a person sees them."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import tempfile
from pathlib import Path

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from strassen_tile.cost import machine
from strassen_tile.errors import ConfigError
from strassen_tile.experiments import loading, planning, speed
from strassen_tile.files import make_folder
from strassen_tile.nn import STLConfig
from strassen_tile.records import Row, environment, write_rows
from strassen_tile.report import bench as bench_report
from strassen_tile.report import plan as plan_report
from strassen_tile.report.table import ratio, rich_table, seconds


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
    asked = shapes, options.ranks, options.passes, options.methods, options.tile
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    task = bars.add_task("pairs", total=len(options.dtype) * speed.row_count(*asked))
    with Live(bars, console=console, refresh_per_second=2) as live:
        for row in itertools.chain.from_iterable(runs):
            rows.append(row)
            write_rows(options.out / "rows.json", rows)  # what was measured is kept if the next one fails
            bars.advance(task)
            live.update(Group(rich_table(title, bench_report.columns(), rows), bars))
        live.update("")
    console.print(rich_table(title, bench_report.columns(), rows))
    notes = speed.left_out(*asked)
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
