"""Times of two runs in turn: a machine's speed drifts, and neighbours see the same of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Run = Callable[[], None]
Pairs = list[tuple[float, float]]


def interleave(first: Run, second: Run, seconds: float, device: str) -> Pairs:
    """Times of `first` and `second`, run in turn: at least five pairs, until `seconds` are spent."""
    for run in (first, second, first, second):
        run()
    once = _clock(first) if device == "cuda" else _wall
    pairs: Pairs = []
    end = time.perf_counter() + seconds
    while len(pairs) < 5 or (time.perf_counter() < end and len(pairs) < 200):
        pairs.append((once(first), once(second)))
    return pairs


def _wall(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _clock(sample: Run) -> Callable[[Run], float]:
    """The GPU's own clock over as many runs as make five milliseconds, so that launches hide behind the work."""

    def alone() -> None:
        sample()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    repeats = max(1, min(200, int(5e-3 / _wall(alone))))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(run: Run) -> float:
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / repeats

    return once
