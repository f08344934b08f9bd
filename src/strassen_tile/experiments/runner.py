"""Runs what a comparison is made of: in order, from where they are, each once; whatever is trained.

An interrupted comparison goes on where it stopped, from the last checkpoint of the run it was in. Processes that
torchrun started train together; the first of them alone holds the folder, writes and reports.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from strassen_tile.errors import ConfigError, DivergedError
from strassen_tile.experiments.comparison import Comparison, Progress, Run
from strassen_tile.experiments.endings import Place, diverged_line, diverged_record, finish, leave, warn_of_missing
from strassen_tile.experiments.jobs import spread, threads_of
from strassen_tile.experiments.log import RunLog, keep_recipe, locked
from strassen_tile.files import remove_unfinished
from strassen_tile.integrations.ranks import first, ranks
from strassen_tile.records import Row, environment
from strassen_tile.report.runs import run_of

__all__ = ["Comparison", "Progress", "Run", "diverged", "run"]


def run(
    comparison: Comparison,
    folder: Path,
    *,
    on_rows: Callable[[list[Row]], None] = lambda rows: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_end: Callable[[list[Row]], None] = lambda rows: None,
    jobs: int = 1,
) -> list[Row]:
    """Train every run; the rows, one an epoch, are in `folder`/rows.json from the moment they exist.

    A run that diverges ends with a row that says so (`endings.diverged_record`), and the next one begins.

    Args:
        comparison: what to run.
        folder: for rows and checkpoints. Runs already there, of the same recipe, are not run again.
        on_rows: called, in the first process, with all rows so far after every epoch.
        on_progress: called after every training step.
        on_end: called, in the first process, with all rows while the folder is still held against other comparisons.
        jobs: how many runs are trained at the same time, in processes of their own.

    Raises:
        ConfigError: the folder holds a comparison with another recipe, or another process works in it.
        DataError: the data, or what is in the folder, cannot be read.
        RankError: in processes other than the first, what stopped the first.
        JobError: a process that trained a run was killed.
    """
    names = [one.folder for one in comparison.runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"two runs of the comparison are the same: {', '.join(sorted(names))}")
    world = ranks()
    if jobs > 1 and world.num_processes > 1:
        raise ConfigError(
            f"jobs={jobs}: processes that torchrun started train together, one run at a time; give --jobs 1"
        )
    # Before anything is written: a folder under version control would make the commit look dirty.
    fixed = {**comparison.facts, **environment(device=world.device.type, world_size=world.num_processes)}
    with contextlib.ExitStack() as held:
        # The first process has the log; the others a copy, which they do not look at.
        log = first(partial(_opened, comparison, folder, held))
        keeper = _Keeper(comparison.runs, log, fixed, on_rows, on_progress)
        tasks = [(index, first(partial(_recorded, log, one))) for index, one in enumerate(comparison.runs)]
        if jobs == 1:
            for task in tasks:
                _train(comparison.runs, folder, task, keeper.receive)
        else:
            fixed["threads"] = threads_of(jobs)
            # What is finished needs no process, which takes seconds to start.
            for index, recorded in tasks:
                if recorded >= comparison.runs[index].epochs:
                    keeper.receive(_Done(index))
            left = [(index, recorded) for index, recorded in tasks if recorded < comparison.runs[index].epochs]
            spread(partial(_train, comparison.runs, folder), left, jobs, keeper.receive)
        first(partial(_warn, comparison.runs, log))
        first(lambda: on_end(log.rows))
        return first(lambda: log.rows)


def _opened(comparison: Comparison, folder: Path, held: contextlib.ExitStack) -> RunLog:
    """The rows in `folder`, which is this comparison's and this process's until `held` is left."""
    held.enter_context(locked(folder))
    remove_unfinished(folder)
    keep_recipe(folder, comparison.recipe, comparison.earlier, comparison.may_change)
    log = RunLog(folder / "rows.json", [one.identity for one in comparison.runs])
    log.check_facts({key: value for key, value in comparison.facts.items() if key in comparison.held})
    return log


@dataclass
class _Keeper:
    """Where what runs send comes together: rows and progress, in the process that has the log."""

    runs: Sequence[Run]
    log: RunLog
    fixed: Row
    on_rows: Callable[[list[Row]], None]
    on_progress: Callable[[Progress], None]

    def receive(self, message: _Message) -> None:
        """Keep an epoch's record, pass on how far a run is, or clear up after it."""
        one = self.runs[message.run]
        if isinstance(message, _Step):
            self.on_progress(Progress(one.label, message.run + 1, len(self.runs), message.step, message.steps))
        elif isinstance(message, _Epoch):
            fields = {**one.identity, **message.cost, **self.fixed}
            self.on_rows(self.log.add(one.identity, fields, message.record))
        elif isinstance(message, _Diverged):
            fields = {**one.identity, **message.cost, **self.fixed}
            record = diverged_record(one.epochs, message.epoch, message.step)
            first(lambda: self.on_rows(self.log.add(one.identity, fields, record)))
        else:
            place = Place(self.log.path.parent, one.folder)
            first(lambda: (leave if self.log.diverged(one.identity) else finish)(place))


@dataclass(frozen=True)
class _Step:
    run: int
    step: int
    steps: int


@dataclass(frozen=True)
class _Epoch:
    run: int
    cost: Row
    record: Row


@dataclass(frozen=True)
class _Diverged:
    run: int
    cost: Row
    epoch: int
    step: int


@dataclass(frozen=True)
class _Done:
    run: int


_Message = _Step | _Epoch | _Diverged | _Done


def _recorded(log: RunLog, one: Run) -> int:
    """How many epochs of a run need no training; all, where it diverged."""
    return one.epochs if log.diverged(one.identity) else log.recorded(one.identity)


def diverged(runs: Sequence[Run], folder: Path, rows: Sequence[Row]) -> list[str]:
    """A line for each of the runs that diverged, of the rows in `folder`."""
    found = {run_of(row): row for row in rows if row.get("diverged")}
    ended = [one for one in runs if run_of(one.identity) in found]
    return [diverged_line(one.label, Place(folder, one.folder), found[run_of(one.identity)]) for one in ended]


def _warn(runs: Sequence[Run], log: RunLog) -> None:
    """Say which finished runs should have left weights and have not."""
    folder = log.path.parent
    finished = [one for one in runs if one.saves and not log.diverged(one.identity)]
    warn_of_missing(folder, [one.label for one in finished if not Place(folder, one.folder).weights.exists()])


def _train(runs: Sequence[Run], folder: Path, task: tuple[int, int], send: Callable[[_Message], None]) -> None:
    """Train run number `task[0]` from where it is, with `task[1]` epochs recorded; nothing if it is finished."""
    (index, recorded), one = task, runs[task[0]]
    work = Place(folder, one.folder).work
    if recorded < one.epochs:
        model, conversion = one.build()
        cost = one.cost(model, conversion)
        first(partial(_prepare, work))
        try:
            one.train(
                model,
                work,
                recorded=recorded,
                on_step=lambda step, steps: send(_Step(index, step, steps)),
                on_epoch=lambda record: send(_Epoch(index, cost, record)),
            )
        except DivergedError as error:
            send(_Diverged(index, cost, error.epoch, error.step))
    send(_Done(index))


def _prepare(work: Path) -> None:
    """Make the folder of a run, so that one that cannot be made is said now, or clear up after a run that was killed."""
    work.mkdir(parents=True, exist_ok=True)
    remove_unfinished(work)
