"""What becomes of a run when it ends: its weights are kept, or it has diverged and that is said."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from strassen_tile.integrations.weights import WEIGHTS
from strassen_tile.records import Row

MODELS = "models"  # where in the folder of a comparison weights are kept


@dataclass(frozen=True)
class Place:
    """Where a run works and what it leaves.

    Attributes:
        folder: of the comparison.
        name: of the run, its own among those of the comparison.
    """

    folder: Path
    name: str

    @property
    def work(self) -> Path:
        """For checkpoints; that of a finished run is removed with all that is in it."""
        return self.folder / "runs" / self.name

    @property
    def weights(self) -> Path:
        """For the weights of the finished run."""
        return self.folder / MODELS / f"{self.name}.safetensors"


def finish(place: Place) -> None:
    """Keep the weights of a run that has all its rows, where it left any, and clear up; doing it again does nothing.

    Weights are written into the run's folder before its last row: one that has all rows and was killed has them there.

    Raises:
        OSError: the weights cannot be put in their place; they stay where they are.
    """
    if (written := place.work / WEIGHTS).exists():
        place.weights.parent.mkdir(exist_ok=True)
        written.replace(place.weights)
    shutil.rmtree(place.work, ignore_errors=True)


def leave(place: Place) -> None:
    """Of a run that has diverged: its last checkpoint stays, where it has one."""
    with contextlib.suppress(OSError):  # not empty
        place.work.rmdir()


def diverged_record(epochs: int, epoch: int, step: int) -> Row:
    """The record of a run that diverged in `epoch`, at `step`.

    It stands in place of all epochs the run did not come to, at the last of them, and has no measurements: a mean over
    seeds is then unknown, as it is at that epoch, and does not pass over the run.
    """
    return {"epoch": epochs, "diverged": True, "diverged_epoch": epoch, "diverged_step": step, "seconds": 0.0}


def diverged_line(label: str, place: Place, row: Row) -> str:
    """What is to be said of the run called `label`, whose row is of `diverged_record`: that it diverged, and the way out."""
    kept = sorted(place.work.glob("checkpoint-*"))
    return (
        f"{label}: diverged in epoch {row.get('diverged_epoch')}, at step {row.get('diverged_step')}: its loss or weights "
        f"were not finite; give a lower lr or more warmup{f'; its last good weights are in {kept[-1]}' if kept else ''}"
    )


def warn_of_missing(folder: Path, labels: Sequence[str]) -> None:
    """Say which finished runs have no weights in `folder`, though they are to be kept."""
    if labels:
        warnings.warn(
            f"{folder / MODELS} has no weights of {'; '.join(labels)}: finished without save, or moved since. To train such "
            f"a run again, give another --out",
            stacklevel=2,
        )
