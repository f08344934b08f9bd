"""What a person sees while a command runs: live table, progress, and where the results are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from strassen_tile.experiments import finetuning, language, runner, vision
from strassen_tile.experiments.endings import MODELS
from strassen_tile.experiments.finetune_recipe import FinetuneRecipe, finetune_recipe_of
from strassen_tile.experiments.rates import Rates, Tuned, best_rates
from strassen_tile.experiments.recipe import Recipe, recipe_of
from strassen_tile.experiments.settings import settings_of
from strassen_tile.experiments.text_recipe import TextRecipe, text_recipe_of
from strassen_tile.integrations.ranks import RankError, ranks
from strassen_tile.records import Row
from strassen_tile.report import finetune as finetune_report
from strassen_tile.report import pretrain as pretrain_report
from strassen_tile.report.compare import columns, summarise, table_caption, write_report
from strassen_tile.report.pretrain_runs import summarise as pretrain_summarise
from strassen_tile.report.runs import progress_note
from strassen_tile.report.table import Column, rich_table

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


def run_finetune(options: argparse.Namespace) -> int:
    """`strassen-tile finetune`; its exit status."""
    recipe = finetune_recipe_of(options.recipe, options.changes, _given(options, FinetuneRecipe))
    report = _Report(
        "A pretrained model, dense and made cheaper",
        finetune_report.columns,
        finetune_report.summarise,
        finetune_report.caption,
        finetune_report.write_report,
        lambda rows: "",
    )
    return _compared(recipe, finetuning.tuning, finetuning.comparison, report, options.out)


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
    lines = [*compared.left_out, *runner.diverged(compared.runs, out, rows)]
    if world.is_main_process:
        for line in lines:
            print(f"strassen-tile: {line}", file=sys.stderr)
    return DIVERGED if lines else 0


def _show(comparison: runner.Comparison, report: _Report, out: Path, console: Console, jobs: int) -> list[Row]:
    """Run a comparison, with what a person sees of it; its rows."""
    for remark in (*comparison.remarks, *comparison.left_out):
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
            notes = [*comparison.notes, *comparison.remarks, *comparison.left_out, *filter(None, [report.note(rows)])]
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
