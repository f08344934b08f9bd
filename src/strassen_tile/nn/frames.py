"""What the frames that run tell: which checkpoint runs a layer again, and whether compiled code does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.utils import checkpoint


class Found(NamedTuple):
    """A checkpoint, found by a frame."""

    kept: Any  # what torch keeps for the checkpoint until its backward pass is over
    again: bool  # whether it runs again


def checkpoint_of(frame: FrameType) -> Found | None:
    """The checkpoint whose function `frame` runs, for the first time or again."""
    code = frame.f_code
    if code.co_filename != checkpoint.__file__:
        return None
    if code.co_name in ("forward", "backward"):  # of CheckpointFunction, reentrant
        kept = frame.f_locals.get("ctx")
    elif code.co_name == "unpack_hook":
        kept = frame.f_locals.get("frame")
    elif code.co_name == "checkpoint" and "gen" in frame.f_locals:
        kept = frame.f_locals["gen"].gi_frame.f_locals.get("new_frame")
    else:
        return None
    return None if kept is None else Found(kept, code.co_name in ("backward", "unpack_hook"))


def frames(frame: FrameType | None = None) -> Iterator[FrameType]:
    """`frame` and those that wait for it; by default of the caller."""
    frame = frame or sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def in_compiled() -> bool:
    """Whether code that `torch.compile` made runs."""
    from torch._dynamo.convert_frame import output_codes  # slow to import, and loaded where something is compiled

    return any(frame.f_code in output_codes for frame in frames())


def in_backward() -> bool:
    """Whether this thread runs a backward pass."""
    return torch._C._current_graph_task_id() != -1


def run_as_it_stands(function: Callable[..., object]) -> None:
    """Keep `torch.compile` from making a graph of `function` alone; called in a graph, it is part of that.

    It runs the hooks of a compiled model outside its graph, and would compile each, anew for every model.
    """
    dynamo = torch._C._dynamo.eval_frame
    skip = dynamo._FrameAction.SKIP
    dynamo.set_code_exec_strategy(function.__code__, dynamo._FrameExecStrategy(skip, skip))
