"""Which of Trainer's checkpoints are whole.

Trainer writes a checkpoint file by file into its final folder. Once all are there, `seal` adds one more that says what
they hold; a folder whose files are not as its seal says is none to go on from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from torch import nn

_SEAL = "complete.json"


def seal(checkpoint: Path, model: nn.Module, epoch: int) -> None:
    """Say that the checkpoint of `model` after `epoch` is complete.

    Raises:
        OSError: as the file system has it; what is then there of the seal is not valid.
    """
    # Not atomic, nor synced: JSON that is cut short is not JSON, and digests find out what a power cut has lost.
    (checkpoint / _SEAL).write_text(json.dumps(_contents(checkpoint, model, epoch)), encoding="utf-8")


def resumable(folder: Path, model: nn.Module, recorded: int) -> Path | None:
    """The latest complete checkpoint in `folder`, of this network and no later than epoch `recorded`.

    All others are removed: Trainer would write into them.
    """
    epochs = {path: _sealed_epoch(path, model) for path in folder.glob("checkpoint-*")}
    usable = [path for path, epoch in epochs.items() if epoch is not None and epoch <= recorded]
    latest = max(usable, key=lambda path: epochs[path] or 0, default=None)
    for path in epochs:
        if path != latest:
            shutil.rmtree(path)
    return latest


def _sealed_epoch(checkpoint: Path, model: nn.Module) -> int | None:
    """The epoch after which the checkpoint was made; None where it is not complete or of another network."""
    try:
        found = json.loads((checkpoint / _SEAL).read_text(encoding="utf-8"))
        epoch = found["epoch"]
    except (FileNotFoundError, ValueError, RecursionError, TypeError, KeyError):
        return None
    return epoch if type(epoch) is int and found == _contents(checkpoint, model, epoch) else None


def _contents(checkpoint: Path, model: nn.Module, epoch: int) -> dict[str, object]:
    digests = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != _SEAL:
            with path.open("rb") as file:
                digests[path.relative_to(checkpoint).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    network = {name: list(value.shape) for name, value in model.state_dict().items()}
    return {"epoch": epoch, "network": network, "files": digests}
