"""Measure the kernels' block sizes on this device. Requires: a CUDA device, unless a clock of one's own is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from strassen_tile.ops.cuda import choices, launch
from strassen_tile.ops.cuda.choices import Choice

Clock = Callable[[Callable[[], object]], float]  # milliseconds a call takes
_PATIENCE = 1.02  # a choice must beat the guess by more than noise
Case = tuple[str, Callable[[], Tensor]]


def cases(n: int, k: int, tile: tuple[int, int], rank: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """(step, a call of it) on matrices of n×k."""
    p, q = tile
    x, scale = (torch.randn(*shape, device=device).to(dtype) for shape in ((1, n, k), (k,)))
    e = torch.randn(rank, p, q, device=device).to(dtype)
    z = launch.encode(x, e, aligned=True)
    waiting = launch.Decoding(z, e, scale)
    yield "encode", lambda: launch.encode(x, e, aligned=True)
    if launch.tiles_together(p, q, rank):
        yield "norm_encode", lambda: launch.norm_encode(x, scale, scale, 1e-5, e, centre=True, aligned=True)
    yield "decode", lambda: launch.decode(z, e, 1, n, k, scale)
    yield "decode_act_encode", lambda: launch.decode_act_encode(waiting, None, e, 1, n, k, "gelu_tanh", aligned=True)
    yield "correlate", lambda: launch.correlate(x, z, tile)


class Tuned(NamedTuple):
    """The fastest choice for a key, its milliseconds, and those of the guess."""

    key: str
    choice: Choice
    took: float
    guessed: float


def tune(
    ranks: Sequence[int] = (16, 32, 49),
    *,
    n: int = 8192,
    k: int = 8192,
    tile: tuple[int, int] = (4, 4),
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    clock: Clock | None = None,
    among: Sequence[Choice] | None = None,
) -> Iterator[Tuned]:
    """The fastest choice of each step, one after the other; ranks that round up to one power of two share them.

    One that does not compile, or computes something else than the guess does, is passed over.
    """
    timed = clock or (lambda run: float(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")))
    for rank in ranks:
        g = launch.tiles_together(*tile, rank) or 1
        entries, padded = launch.padded(tile[0] * tile[1] * g), launch.padded(rank, g) * g
        for step, run in cases(n, k, tile, rank, dtype, device):
            guess = choices.guess(step, entries, padded, dtype.itemsize)
            with choices.trying(guess):
                expected, before = run(), timed(run)
            times = {guess: before / _PATIENCE}
            for choice in among or choices.candidates(entries):
                if choice != guess and (took := _time(run, choice, expected, timed)) is not None:
                    times[choice] = took
            best = min(times, key=lambda choice: times[choice])
            took = before if best == guess else times[best]
            yield Tuned(choices.key(step, entries, padded, dtype.itemsize), best, took, before)


def _time(run: Callable[[], Tensor], choice: Choice, expected: Tensor, timed: Clock) -> float | None:
    with choices.trying(choice):
        try:
            y = run()
            if not torch.allclose(y.float(), expected.float(), rtol=0.02, atol=0.02 * float(expected.float().std())):
                return None
            return timed(run)
        except Exception:  # too much shared memory, too many registers: the compiler and the driver say it in many ways
            return None
