"""Several processes, one experiment: what the first of them does for all.

A process trains on one device. `torchrun --nproc_per_node 4 …` starts four that train together; only the first holds
the folder, writes and prints. What it finds, and what goes wrong there, reaches the others through `first`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

import torch

from strassen_tile.errors import ConfigError, STLError

if TYPE_CHECKING:  # accelerate is wanted once something is trained; the commands that only measure do without it
    from accelerate import PartialState

T = TypeVar("T")


class RankError(STLError):
    """The first process failed, and has said why; this one ends with it."""


def ranks() -> PartialState:
    """This process among those that torchrun started, which it joins when first asked; alone otherwise.

    Raises:
        ConfigError: more processes on this machine than it has GPUs.
    """
    from accelerate import PartialState

    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local} of this machine finds {torch.cuda.device_count()} GPUs; start one process for each"
        )
    return PartialState(cpu=not cuda)


def share(batch_size: int) -> int:
    """How many samples of a batch fall to each process.

    Raises:
        ConfigError: the batch does not divide among them.
    """
    processes: int = ranks().num_processes
    if batch_size % processes:
        raise ConfigError(
            f"batch_size={batch_size} is of all {processes} processes together and does not divide among them"
        )
    return batch_size // processes


def first(action: Callable[[], T]) -> T:
    """Run `action` in the first process only; all processes get its result, which must be picklable.

    All processes have to call this. Where `action` fails, no process goes on to wait for one that has ended.

    Raises:
        Exception: in the first process, as `action` raised it.
        RankError: in the others.
    """
    from accelerate.utils import broadcast_object_list

    told: list[object] = [None, None]
    if ranks().is_main_process:
        try:
            told[0] = action()
        except Exception as error:
            broadcast_object_list([None, str(error)])
            raise
    broadcast_object_list(told)
    if told[1] is not None:
        raise RankError(f"the first process stopped: {told[1]}")
    return cast(T, told[0])
