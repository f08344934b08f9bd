"""Runs what a comparison is made of: in order, from where they are, each once; whatever is trained.

An interrupted comparison goes on where it stopped, from the last checkpoint of the run it was in. Processes that
torchrun started train together; the first of them alone holds the folder, writes and reports.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from strassen_tile.convert import Conversion
from strassen_tile.errors import ConfigError
from strassen_tile.experiments.jobs import spread
from strassen_tile.experiments.log import RunLog, keep_recipe, locked
from strassen_tile.files import remove_unfinished
from strassen_tile.integrations.ranks import first, ranks
from strassen_tile.records import Row, environment

_UNSAFE = re.compile(r"[^A-Za-z0-9=.+_-]+")


class Train(Protocol):
    """Trains a model in place, from its last checkpoint in `folder` that has its record; see `train_images`."""

    def __call__(
        self,
        model: nn.Module,
        folder: Path,
        *,
        recorded: int,
        on_step: Callable[[int, int], None],
        on_epoch: Callable[[Row], None],
    ) -> None: ...


@dataclass(frozen=True)
class Run:
    """One training: what tells it from the others, and how it is done.

    Attributes:
        method: name of the method.
        rank: channels a tile; None for a method without them.
        variant: in what it differs from others of its method and seed, as text; "" where there is no other.
        seed: of weights, order and draws.
        epochs: after which it is finished. Training hands over a record for each.
        build: the converted model, with the weights of the seed.
        cost: fields of the model's cost, the same in all rows of the run.
        train: what trains it.
    """

    method: str
    rank: int | None
    variant: str
    seed: int
    epochs: int
    build: Callable[[], tuple[nn.Module, Conversion]]
    cost: Callable[[nn.Module, Conversion], Row]
    train: Train

    @property
    def identity(self) -> Row:
        """The fields that begin its rows."""
        return {"method": self.method, "rank": self.rank, "variant": self.variant, "seed": self.seed}

    @property
    def label(self) -> str:
        """How progress names it."""
        return f"{self.method} {self.variant}".strip() + f", seed {self.seed}"

    @property
    def folder(self) -> str:
        """A name for its folder, its own on any file system: "stl-r=24-0"."""
        plain = f"{self.method} {self.variant}".strip().replace(":", "").replace(" ", "-")
        safe = _UNSAFE.sub("-", plain)[:80]
        # What could not be kept in the name is told apart by a digest of it.
        mark = "" if safe == plain else f"-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"
        return f"{safe}{mark}-{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """What `run` takes.

    Attributes:
        title: of its table and page.
        runs: in the order they are run.
        recipe: what decides the results, kept in `recipe.json`.
        earlier: what a key of the recipe was where an older `recipe.json` does not say.
        may_change: keys of the recipe that only say which runs there are, or that change no result.
        facts: fields of every row: of the data, of the precision.
        notes: paragraphs of the page: how the runs were made.
        remarks: paragraphs that are shown before training as well: what a user may not expect.
    """

    title: str
    runs: Sequence[Run]
    recipe: Mapping[str, object]
    earlier: Mapping[str, object] = field(default_factory=dict)
    may_change: frozenset[str] = frozenset()
    facts: Row = field(default_factory=dict)
    notes: Sequence[str] = ()
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Progress:
    """Where a comparison is: run `run` of `runs`, and `step` of `steps` in it."""

    label: str
    run: int
    runs: int
    step: int
    steps: int


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
            f"jobs={jobs}: processes that torchrun started train together, one run at a time; leave jobs out"
        )
    # Before anything is written: a folder under version control would make the commit look dirty.
    fixed = {**comparison.facts, **environment(device=world.device.type, world_size=world.num_processes)}
    with contextlib.ExitStack() as held:
        # The first process has the log; the others a copy, which they do not look at.
        log = first(partial(_opened, comparison, folder, held))
        keeper = _Keeper(comparison.runs, log, fixed, on_rows, on_progress)
        tasks = [(index, first(partial(log.recorded, one.identity))) for index, one in enumerate(comparison.runs)]
        if jobs == 1:
            for task in tasks:
                _train(comparison.runs, folder, task, keeper.receive)
        else:
            fixed["threads"] = max(1, torch.get_num_threads() // jobs)
            spread(partial(_train, comparison.runs, folder), tasks, jobs, keeper.receive)
        first(lambda: on_end(log.rows))
        return first(lambda: log.rows)


def _opened(comparison: Comparison, folder: Path, held: contextlib.ExitStack) -> RunLog:
    """The rows in `folder`, which is this comparison's and this process's until `held` is left."""
    held.enter_context(locked(folder))
    remove_unfinished(folder)
    keep_recipe(folder, comparison.recipe, comparison.earlier, comparison.may_change)
    return RunLog(folder / "rows.json")


@dataclass
class _Keeper:
    """Where what runs send comes together: rows and progress, in the process that has the log."""

    runs: Sequence[Run]
    log: RunLog
    fixed: Row
    on_rows: Callable[[list[Row]], None]
    on_progress: Callable[[Progress], None]

    def receive(self, message: _Step | _Epoch | _Done) -> None:
        """Keep an epoch's record, pass on how far a run is, or clear up after it."""
        one = self.runs[message.run]
        if isinstance(message, _Step):
            self.on_progress(Progress(one.label, message.run + 1, len(self.runs), message.step, message.steps))
        elif isinstance(message, _Epoch):
            fields = {**one.identity, **message.cost, **self.fixed}
            self.on_rows(self.log.add(one.identity, fields, message.record))
        else:
            first(lambda: shutil.rmtree(_work_folder(self.log.path.parent, one), ignore_errors=True))


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
class _Done:
    run: int


def _work_folder(folder: Path, one: Run) -> Path:
    """The run's own: that of a finished run is removed with all that is in it."""
    return folder / "runs" / one.folder


def _train(
    runs: Sequence[Run], folder: Path, task: tuple[int, int], send: Callable[[_Step | _Epoch | _Done], None]
) -> None:
    """Train run number `task[0]` from where it is, with `task[1]` epochs recorded; nothing if it is finished."""
    (index, recorded), one = task, runs[task[0]]
    work = _work_folder(folder, one)
    if recorded < one.epochs:
        model, conversion = one.build()
        cost = one.cost(model, conversion)
        first(partial(_prepare, work))
        one.train(
            model,
            work,
            recorded=recorded,
            on_step=lambda step, steps: send(_Step(index, step, steps)),
            on_epoch=lambda record: send(_Epoch(index, cost, record)),
        )
    send(_Done(index))


def _prepare(work: Path) -> None:
    """Make the folder of a run, so that one that cannot be made is said now, or clear up after a run that was killed."""
    work.mkdir(parents=True, exist_ok=True)
    remove_unfinished(work)
