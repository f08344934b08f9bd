"""What a comparison is made of: its runs, and what is the same for all of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import nn

from strassen_tile.convert import Conversion
from strassen_tile.records import Row

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
        saves: whether `train` leaves weights, to be kept; see `endings.finish`.
    """

    method: str
    rank: int | None
    variant: str
    seed: int
    epochs: int
    build: Callable[[], tuple[nn.Module, Conversion]]
    cost: Callable[[nn.Module, Conversion], Row]
    train: Train
    saves: bool = False

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
        held: those facts that all rows of a folder must share: digests of what the recipe names by a path, which may change.
        notes: paragraphs of the page: how the runs were made.
        remarks: paragraphs that are shown before training as well: what a user may not expect.
        left_out: likewise, of entries that diverged at every rate.
    """

    title: str
    runs: Sequence[Run]
    recipe: Mapping[str, object]
    earlier: Mapping[str, object] = field(default_factory=dict)
    may_change: frozenset[str] = frozenset()
    facts: Row = field(default_factory=dict)
    held: frozenset[str] = frozenset()
    notes: Sequence[str] = ()
    remarks: Sequence[str] = ()
    left_out: Sequence[str] = ()


@dataclass(frozen=True)
class Progress:
    """Where a comparison is: run `run` of `runs`, and `step` of `steps` in it."""

    label: str
    run: int
    runs: int
    step: int
    steps: int
