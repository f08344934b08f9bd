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

from torch import nn

from strassen_tile.convert import Conversion
from strassen_tile.errors import ConfigError
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
) -> list[Row]:
    """Train every run; the rows, one an epoch, are in `folder`/rows.json from the moment they exist.

    Args:
        comparison: what to run.
        folder: for rows and checkpoints. Runs already there, of the same recipe, are not run again.
        on_rows: called, in the first process, with all rows so far after every epoch.
        on_progress: called after every training step.
        on_end: called, in the first process, with all rows while the folder is still held against other comparisons.

    Raises:
        ConfigError: the folder holds a comparison with another recipe, or another process works in it.
        DataError: the data, or what is in the folder, cannot be read.
        RankError: in processes other than the first, what stopped the first.
    """
    names = [one.folder for one in comparison.runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"two runs of the comparison are the same: {', '.join(sorted(names))}")
    world = ranks()
    # Before anything is written: a folder under version control would make the commit look dirty.
    fixed = {**comparison.facts, **environment(device=world.device.type, world_size=world.num_processes)}
    with contextlib.ExitStack() as held:
        # The first process has the log; the others a copy, which they do not look at.
        log = first(partial(_opened, comparison, folder, held))
        for index, one in enumerate(comparison.runs):

            def on_step(step: int, steps: int, one: Run = one, index: int = index) -> None:
                on_progress(Progress(one.label, index + 1, len(names), step, steps))

            _train(one, log, fixed, on_step, on_rows)
        first(lambda: on_end(log.rows))
        return first(lambda: log.rows)


def _opened(comparison: Comparison, folder: Path, held: contextlib.ExitStack) -> RunLog:
    """The rows in `folder`, which is this comparison's and this process's until `held` is left."""
    held.enter_context(locked(folder))
    remove_unfinished(folder)
    keep_recipe(folder, comparison.recipe, comparison.earlier, comparison.may_change)
    return RunLog(folder / "rows.json")


def _train(
    one: Run, log: RunLog, fixed: Row, on_step: Callable[[int, int], None], on_rows: Callable[[list[Row]], None]
) -> None:
    """Train a run from where it is; nothing if it is finished."""
    # A folder of its own: that of a finished run is removed with all that is in it.
    work = log.path.parent / "runs" / one.folder
    recorded = first(lambda: log.recorded(one.identity))
    if recorded < one.epochs:
        model, conversion = one.build()
        fields = {**one.identity, **one.cost(model, conversion), **fixed}
        first(partial(_prepare, work))
        one.train(
            model,
            work,
            recorded=recorded,
            on_step=on_step,
            on_epoch=lambda record: on_rows(log.add(one.identity, fields, record)),
        )
    first(lambda: shutil.rmtree(work, ignore_errors=True))


def _prepare(work: Path) -> None:
    """Make the folder of a run, so that one that cannot be made is said now, or clear up after a run that was killed."""
    work.mkdir(parents=True, exist_ok=True)
    remove_unfinished(work)
