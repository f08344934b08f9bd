"""Runs spread over processes of this machine: each trains one at a time, the process that started them keeps the rows.

What a run comes to does not depend on which process trains it, nor on what the others do; only on the number of threads,
as rounding does.
"""

from __future__ import annotations

import multiprocessing
import queue
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.queues import Queue
from typing import Any, Protocol

import torch

from strassen_tile.errors import STLError

_PATIENCE = 1.0  # seconds between looks at whether the others are alive
_FAREWELL = 10.0  # seconds in which a process that has nothing left to do ends by itself


class JobError(STLError):
    """A process that trained a run ended without a word."""


class Work(Protocol):
    """Does one task; what it hands to `send` reaches `receive` of the process that started it, in order."""

    def __call__(self, task: Any, send: Callable[[Any], None]) -> None: ...


def spread(work: Work, tasks: Sequence[Any], jobs: int, receive: Callable[[Any], None]) -> None:
    """Do all tasks in `jobs` processes, each with its share of this one's threads.

    Args:
        work: a function of a module, or a partial of one.
        tasks: what it is called with; they are started in order.
        jobs: how many at the same time.
        receive: called here with what the tasks send.

    Raises:
        Exception: what a task raised; the others are stopped then.
        JobError: a process was killed.
    """
    context = multiprocessing.get_context("spawn")  # a fork would share the state of OpenMP and of CUDA
    waiting, inbox = context.Queue(), context.Queue()
    for task in tasks:
        waiting.put(("task", task))
    threads = threads_of(jobs)
    workers = [
        context.Process(target=_work, args=(work, waiting, inbox, threads)) for _ in range(min(jobs, len(tasks)))
    ]
    try:
        for worker in workers:
            worker.start()
        for _ in tasks:
            _until_done(inbox, workers, receive)
        for _ in workers:  # one that is terminated leaves semaphores of its libraries behind
            waiting.put(("end", None))
        for worker in workers:
            worker.join(_FAREWELL)
    finally:
        for worker in [one for one in workers if one.pid is not None]:  # others could not be started
            worker.terminate()
            worker.join()


def threads_of(jobs: int) -> int:
    """The share of this process's threads that each of so many has."""
    return max(1, torch.get_num_threads() // jobs)


def _until_done(
    inbox: Queue[Any], workers: Sequence[multiprocessing.process.BaseProcess], receive: Callable[[Any], None]
) -> None:
    """Hand on what is sent until one task is done."""
    while True:
        try:
            kind, content = inbox.get(timeout=_PATIENCE)
        except queue.Empty:
            if dead := [worker for worker in workers if worker.exitcode]:
                raise JobError(
                    f"process {dead[0].pid}, which trained a run, ended with code {dead[0].exitcode} and without a word "
                    "(out of memory?); repeat the command to go on, with fewer jobs"
                ) from None
            continue
        if kind == "done":
            return
        if kind == "error":
            raise content
        receive(content)


def _work(work: Work, waiting: Queue[Any], inbox: Queue[Any], threads: int) -> None:
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None and not parent.is_alive():
            inbox.cancel_join_thread()  # nobody reads any more: else it would wait for that
            raise SystemExit(1)  # killed: nobody would keep the rows

    def send(message: Any) -> None:
        end_with_parent()
        inbox.put(("message", message))

    while True:
        try:
            kind, task = waiting.get(timeout=_PATIENCE)
        except queue.Empty:
            end_with_parent()
            continue
        if kind == "end":
            return
        try:
            work(task, send)
        except Exception as error:
            known = isinstance(error, STLError | OSError)
            if not known:  # a fault of ours: where it is would be lost on the way
                traceback.print_exc()
            inbox.put(("error", error if known else JobError(f"{type(error).__name__}: {error}")))
            return
        except KeyboardInterrupt:  # the process that started this one says so
            return
        inbox.put(("done", None))
