"""Which call a layer runs in, and which rows are real in it: a stack for each thread, `with`s for each task.

A call of a model is synchronous, so the calls in progress are a stack of their thread. A `with` may hold over an `await`, so
what it says is kept in the context of its task. Two things go wrong with a stack that hooks keep, and both are seen by looking
at the frames that run. A call that was broken off (Ctrl-C) leaves its entry behind, but not its frame. A checkpointed layer
runs again when its call is long over, but under a frame that knows which checkpoint it runs for: so the mask of a call is
kept with each checkpoint inside it, and is gone with it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from strassen_tile.errors import ShapeError
from strassen_tile.nn.frames import checkpoint_of, frames, in_backward, in_compiled
from strassen_tile.nn.past import Kept, Key

UNCLEAR = (
    "a row-mixing layer was reached in a call with padding, and it cannot be told which of its rows are padding ({why}): call "
    "it, and backward(), inside `with strassen_tile.padding(model, mask)`, keep it dense (filter_fn), or use mixing='none'"
)
_RECORD = "_strassen_tile_rows"  # on what torch keeps for a checkpoint: key → the rows of the call around it


@dataclass(eq=False)
class Call:
    """A call in progress, or a `with` inside one.

    Attributes:
        key: of the `PaddingMask` that follows it.
        module: what was called; None for a `with`.
        real: (B, N), True for real rows, or the number of the document that a row is of, from 1 on, and 0 for padding; None
            where nothing is padding and each sample is one document.
        held: what a `with` around it says.
        past: rows of the sequence that a cache holds already.
        unclear: why it cannot be told which rows are real; "" if it can.
        traced: whether it was entered while a graph was traced, which sees it as it is then.
        frame: while which the call lasts; None if a compiled one.
        cache: that it was given; None without.
        kept: the last rows that layers were fed in it, for the cache.
        ran: how often layers ran in it.
    """

    key: str
    module: nn.Module | None
    real: Tensor | None
    held: Tensor | None
    past: int
    unclear: str
    traced: bool
    frame: FrameType | None
    cache: object = None
    kept: dict[Key, Kept] = field(default_factory=dict)
    ran: dict[str, int] = field(default_factory=dict)


class _Calls(threading.local):
    def __init__(self) -> None:  # runs in every thread
        self.stack: list[Call] = []
        _stacks[threading.get_ident()] = self.stack


_stacks: dict[int, list[Call]] = {}  # of every thread
_thread = _Calls()
_held: ContextVar[Mapping[str, tuple[Tensor, ...]]] = ContextVar("strassen_tile_held")


def push(call: Call) -> None:
    """Enter `call` in this thread."""
    _thread.stack.append(call)


def pop(key: str, module: nn.Module) -> Call | None:
    """Leave the innermost call of `module`, and all inside it; None if it was never entered."""
    stack = _thread.stack
    if not any(call.key == key and call.module is module for call in stack):
        return None
    while True:
        call = stack.pop()
        if call.key == key and call.module is module:
            return call


def remove(call: Call) -> None:
    """Leave `call` alone."""
    _thread.stack[:] = [other for other in _thread.stack if other is not call]


def top(key: str) -> Call | None:
    """The innermost call."""
    for call in reversed(_thread.stack):
        if call.key == key:
            return call
    return None


def live(key: str) -> Call | None:
    """The innermost call, once those that were broken off are dropped. Not while tracing."""
    stack = _thread.stack
    if stack:
        running = {id(frame) for frame in frames()}  # a list of them, held by one, would keep what each holds
        compiled = any(call.frame is None for call in stack) and in_compiled()
        stack[:] = [call for call in stack if (compiled if call.frame is None else id(call.frame) in running)]
    return top(key)


def called(module: nn.Module) -> bool:
    """Whether a call of `module` is in progress that was entered through its hooks."""
    if not torch.compiler.is_dynamo_compiling():
        live("")  # drops those that were broken off
    return any(call.module is module for call in _thread.stack)


def held(key: str) -> Tensor | None:
    """What a `with` around all calls of this task says: the one opened last of those still open."""
    return next(reversed(_held.get({}).get(key, ())), None)


def hold(key: str, real: Tensor) -> None:
    """Say it, to this task and those it starts."""
    said = _held.get({})
    _held.set({**said, key: (*said.get(key, ()), real)})


def let_go(key: str, real: Tensor) -> None:
    """Take back what `hold` said of this very tensor: with generators, what is opened last need not close first."""
    said = _held.get({})
    left = tuple(other for other in said.get(key, ()) if other is not real)
    others = {other: rows for other, rows in said.items() if other != key}
    _held.set({**others, key: left} if left else others)


def anchor(key: str) -> FrameType | None:
    """The frame that a `with` opened here lies in: of the innermost call, or of a checkpoint inside it; None outside both."""
    call = live(key)
    for frame in frames():
        if (call is not None and frame is call.frame) or checkpoint_of(frame) is not None:
            return frame
    return None


def resolve(key: str, traced: bool) -> Tensor | None:
    """The real rows (B, N) of what runs now; None where nothing is padding. Not while tracing.

    Args:
        key: of the `PaddingMask`.
        traced: whether layers may have run in a compiled graph, which tells no checkpoint of its mask.

    Raises:
        ShapeError: it cannot be told.
    """
    call = top(key)
    checkpoints: list[Any] = []  # between the layer and its call
    for frame in frames():
        if call is not None and frame is call.frame:
            real = rows(call)
            break
        found = checkpoint_of(frame)
        if found is not None and found.again:
            recorded = vars(found.kept).get(_RECORD, {})
            real = recorded.get(key, held(key))
            if real is None and traced and key not in recorded:
                raise ShapeError(UNCLEAR.format(why="a checkpoint around compiled code runs again"))
            break
        if found is not None:
            checkpoints.append(found.kept)
    else:  # in no call, or not in the one on top, which was broken off: see what is left
        call = live(key)
        if call is not None and call.frame is not None:
            return resolve(key, traced)
        real = held(key) if call is None else rows(call)
        if real is None and call is None and in_backward():
            raise ShapeError(UNCLEAR.format(why="it runs in a backward pass, but not by torch.utils.checkpoint"))
        if real is None and call is None and _elsewhere(key):
            raise ShapeError(
                UNCLEAR.format(why="it runs in no call here, while another thread calls its model with padding")
            )
    for kept in checkpoints:
        vars(kept).setdefault(_RECORD, {})[key] = real
    return real


def rows(call: Call) -> Tensor | None:
    """The real rows of `call`.

    Raises:
        ShapeError: it cannot be told.
    """
    if call.real is not None or call.held is not None:
        return call.held if call.real is None else call.real
    if call.unclear:
        raise ShapeError(UNCLEAR.format(why=call.unclear))
    return None


def _elsewhere(key: str) -> bool:
    """Whether another thread is in a call with padding, of which this one may do a part."""
    masked = {
        thread: [id(call.frame) for call in list(stack) if call.key == key and (call.real is not None or call.unclear)]
        for thread, stack in list(_stacks.items())
        if stack and thread != threading.get_ident()
    }
    top = sys._current_frames() if any(masked.values()) else {}
    return any(id(frame) in masked[thread] for thread in masked.keys() & top.keys() for frame in frames(top[thread]))
