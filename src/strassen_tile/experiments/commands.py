"""What a person sees while a command runs: live table, progress, and where the results are."""

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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from strassen_tile.cost import machine
from strassen_tile.errors import ConfigError
from strassen_tile.experiments import planning, speed, vision
from strassen_tile.experiments.recipe import Recipe, fastest_precision
from strassen_tile.files import make_folder
from strassen_tile.integrations.ranks import RankError, ranks
from strassen_tile.nn import STLConfig
from strassen_tile.records import Row, environment, write_rows
from strassen_tile.report import bench as bench_report
from strassen_tile.report import plan as plan_report
from strassen_tile.report.compare import columns, summarise, table_caption, write_report
from strassen_tile.report.table import ratio, rich_table, seconds

# A comparison's recipe where the command does not say: (model, epochs, batch size, augment) by data. Three epochs of
# 60 000 images are too few to overfit, and augmentation only slows them.
_DIGITS = ("t2t_vit_nano", 8, 32, True)
_SMALL = ("t2t_vit_micro", 3, 128, False)
_LARGE = ("t2t_vit_7", 100, 128, True)


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The options of `strassen-tile compare`, defaults filled in by the data.

    Raises:
        ConfigError: an option that no recipe could have.
    """
    if not math.isfinite(options.lr):
        raise ConfigError(f"--lr must be a finite number; got {options.lr}")
    if options.data == "digits":
        model, epochs, batch_size, augment = _DIGITS
    elif (options.image_size or 0) > 32 or not any(Path(options.data).glob("*ubyte*")):
        model, epochs, batch_size, augment = _LARGE
    else:
        model, epochs, batch_size, augment = _SMALL
    return Recipe(
        data=options.data,
        model=options.model or model,
        image_size=options.image_size,
        methods=options.methods,
        ranks=options.ranks,
        seeds=options.seeds,
        tile=options.tile,
        mixing=options.mixing,
        encoder_scope=options.encoder_scope,
        init=options.init,
        epochs=options.epochs if options.epochs is not None else epochs,
        batch_size=options.batch_size if options.batch_size is not None else batch_size,
        lr=options.lr,
        augment=options.augment if options.augment is not None else augment,
        limit=options.limit,
        precision=fastest_precision() if options.precision == "auto" else options.precision,
    )


def run_compare(options: argparse.Namespace) -> int:
    """`strassen-tile compare`. Of several processes the first shows what there is to see."""
    recipe = recipe_of(options)
    world = ranks()
    try:
        _compare(recipe, options.out, Console(markup=False, emoji=False, quiet=not world.is_main_process))
    except RankError:
        return 1  # the first process has said why
    world.destroy_process_group()  # not after an error: others may be waiting in the group
    return 0


def _compare(recipe: Recipe, out: Path, console: Console) -> None:
    title = f"{recipe.model} on {recipe.data}, {recipe.epochs} epochs"
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip
    runs, steps = bars.add_task("runs", total=None), bars.add_task("steps", total=None)
    with Live(bars, console=console, refresh_per_second=4) as live:

        def on_progress(at: vision.Progress) -> None:
            bars.update(runs, completed=at.run - 1, total=at.runs)
            bars.update(steps, description=at.label, completed=at.step, total=at.steps)

        def on_rows(rows: list[Row]) -> None:
            live.update(Group(rich_table(title, columns(state=True), summarise(rows)), bars))

        def on_end(rows: list[Row]) -> None:
            live.update("")
            write_report(out, rows, f"Dense, 2:4 and Strassen-Tile: {title}", _notes(recipe))

        rows = vision.compare(recipe, out, on_rows=on_rows, on_progress=on_progress, on_end=on_end)
    summary = summarise(rows)
    console.print(rich_table(title, columns(), summary, table_caption(summary)))
    console.print(f"{out / 'report.html'}\n{out / 'plot.png'}\n{out / 'rows.json'}", soft_wrap=True)


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
    _make_writable(options.out)
    rows: list[Row] = []
    each = sum(speed.row_count(name, options.methods, options.ranks, options.tile) for name in options.passes)
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
    config = STLConfig(tile=options.tile, rank=options.rank, mixing=options.mixing)
    if options.shapes is not None:
        layers = planning.layers_of_shapes(speed.shapes_of(options.shapes))
        notes = []
    else:
        model = planning.load_model(options.model, options.arguments)
        layers = planning.layers_of(model, config, rows=options.rows)
        notes = planning.notes(model, config)
    if not layers:
        raise ConfigError("the model has no linear layers to plan for")
    _make_writable(options.out)
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


def _make_writable(folder: Path) -> None:
    """The folder, made if missing; what keeps it from being written to is said before any work is done."""
    make_folder(folder)
    tempfile.TemporaryFile(dir=folder).close()


def _notes(recipe: Recipe) -> list[str]:
    schedule = (
        f"Every method trains the same {recipe.model} from the same start with the same recipe: AdamW at {recipe.lr:g}, "
        f"weight decay {recipe.weight_decay:g} (none on encoders, decoders, biases and norms), {recipe.warmup:.0%} "
        f"warm-up, cosine decay, label smoothing {recipe.label_smoothing:g}, batches of {recipe.batch_size} on all "
        f"devices together, {recipe.precision}, {recipe.epochs} epochs, {'' if recipe.augment else 'no '}augmentation, "
        f"seeds {', '.join(map(str, recipe.seeds))}."
    )
    converted = (
        "The linear layers of the transformer blocks are converted; the token module and the head are not. STL: tile "
        f"{'×'.join(map(str, recipe.tile))}, mixing {recipe.mixing}, encoder scope {recipe.encoder_scope}, start {recipe.init}."
    )
    return [schedule, converted]
