"""How fast on this machine: dense, Strassen-Tile and its baselines, in pairs with the dense product in the same run.

A machine's speed drifts, so no time stands alone: runs alternate dense, candidate, dense, candidate, and the speed-up is
the median of the ratios of neighbours. Nothing is timed before it has been compared with the float64 reference: its result
on the first, middle and last rows, and for a step all its gradients (beyond 4096³ those of the first and last rows).
"""

from __future__ import annotations

import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from strassen_tile.cost import machine
from strassen_tile.errors import ConfigError
from strassen_tile.experiments.candidates import METHODS, WHY_NO_STEP, Candidate, candidates, dense_candidate, row_count
from strassen_tile.experiments.verification import VerificationError, verified
from strassen_tile.files import amount
from strassen_tile.nn import STLConfig
from strassen_tile.ops.cpu.tiles import compiled
from strassen_tile.records import Row, environment

__all__ = ["DTYPES", "NAMED", "VerificationError", "bench", "interleave", "shapes_of"]

Shape = tuple[int, int, int]
NAMED: dict[str, tuple[Shape, ...]] = {
    "squares": ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (4096, 4096, 4096)),
    "vit-b": ((6304, 768, 2304), (6304, 768, 768), (6304, 768, 3072), (6304, 3072, 768)),  # 32 images of 197 tokens
    "llama-7b": ((2048, 4096, 4096), (2048, 4096, 11008), (2048, 11008, 4096)),
    "small": ((256, 256, 256), (512, 128, 384), (4096, 64, 64), (32, 1024, 1024), (32, 4096, 4096)),
    "mlp": ((4096, 1024, 4096), (4096, 4096, 1024)),
}
SMALLEST = 16
_COPIES = 3  # of the operands at the least: as drawn, in their dtype, and in float64 to compare with
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def shapes_of(text: str) -> list[Shape]:
    """`4096x4096x4096,vit-b` → N×K×M triples. Raises ConfigError for anything else."""
    found: list[Shape] = []
    for part in text.split(","):
        if part in NAMED:
            found += NAMED[part]
            continue
        sizes = part.split("x")
        if len(sizes) != 3 or not all(re.fullmatch(r"0*[1-9][0-9]{0,8}", size) for size in sizes):
            raise ConfigError(f"a shape is NxKxM or one of {', '.join(NAMED)}; got {part!r}")
        n, k, m = map(int, sizes)
        found.append((n, k, m))
    return found


def bench(
    shapes: Sequence[Shape],
    ranks: Sequence[int],
    *,
    device: str = "cpu",
    dtype: str = "float32",
    passes: Sequence[str] = ("forward",),
    methods: Sequence[str] = ("stl", "low-rank"),
    tile: int | Sequence[int] = 4,
    seconds: float = 4.0,
) -> Iterator[Row]:
    """A row for each candidate and one for dense, for every shape and pass.

    The dense row comes after the candidates': its times are those measured in their pairs. 2:4 has rows of the forward pass
    alone: see `left_out`.

    Args:
        shapes: (N, K, M) each.
        ranks: of the STL candidates; low rank gets the FLOPs of each one's products.
        device: "cpu" or "cuda".
        dtype: of everything.
        passes: "forward" (no gradient) or "step" (forward and backward, gradients of the input and all parameters).
        methods: besides dense.
        tile: of the STL candidates.
        seconds: to spend on each pair, at least five pairs.

    Raises:
        ConfigError: an argument that cannot be; before the first row is asked for.
        VerificationError: an implementation is wrong.
    """
    if dtype not in DTYPES or not passes or any(name not in ("forward", "step") for name in passes):
        raise ConfigError(f"dtype is one of {', '.join(DTYPES)}, a pass forward or step; got {dtype!r}, {list(passes)}")
    if unknown := set(methods) - set(METHODS):
        raise ConfigError(f"unknown methods {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    if not ranks or min(ranks) < 1 or not 0 <= seconds < math.inf:
        raise ConfigError(f"ranks must be positive, seconds not negative and finite; got {list(ranks)} and {seconds}")
    if not any(row_count(name, methods, ranks) for name in passes):
        raise ConfigError(f"nothing to time: methods {list(methods)}, passes {list(passes)}; {WHY_NO_STEP}")
    for rank in ranks:
        STLConfig(tile=tile, rank=rank)  # a rank that cannot be is said now, not after the ones before it
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but torch sees none")
    if "2:4" in methods and device != "cuda":
        raise ConfigError(
            "2:4 products need an NVIDIA GPU of the Ampere generation or later; leave them out with --methods"
        )
    if small := [shape for shape in shapes if min(shape) < SMALLEST]:
        raise ConfigError(
            f"{'x'.join(map(str, small[0]))} is too small: sums of few terms may cancel, and no bound on their error holds. "
            f"Every side must be at least {SMALLEST}"
        )
    has = _memory(device)
    for n, k, m in shapes:
        if (needed := _COPIES * 4 * (n * k + k * m + n * m)) > has:
            raise ConfigError(
                f"{n}x{k}x{m} is too large: it takes {amount(needed)} of memory, and there is {amount(has)}"
            )
    return _rows(shapes, ranks, device, dtype, passes, methods, tile, seconds)


def _memory(device: str) -> int:
    """Bytes of memory that the device has; more than any shape takes where the system does not say."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62


def _rows(
    shapes: Sequence[Shape],
    ranks: Sequence[int],
    device: str,
    dtype: str,
    passes: Sequence[str],
    methods: Sequence[str],
    tile: int | Sequence[int],
    seconds: float,
) -> Iterator[Row]:
    where = environment()
    here = machine(device, DTYPES[dtype])
    for shape in shapes:
        n, k, m = shape
        x = torch.randn(n, k, device=device).to(DTYPES[dtype])
        weight = (torch.randn(m, k, device=device) / k**0.5).to(DTYPES[dtype])
        grad = torch.randn(n, m, device=device).to(DTYPES[dtype])
        for name in passes:
            fixed: Row = {"device": device, "dtype": dtype, "n": n, "k": k, "m": m, "pass": name, **where}
            fixed |= {
                "compiled": compiled(),
                "tile": str(tile),
            }  # without the compiled kernels a time means something else
            dense = dense_candidate(x, weight)
            run_dense = _timed(dense.forward, dense.leaves, grad, name)
            alone: list[float] = []
            for candidate in candidates(x, weight, ranks, methods, tile, name):
                error = verified(candidate, n, name)
                run = _timed(candidate.forward, candidate.leaves, grad, name)
                pairs = interleave(run_dense, run, seconds, device)
                alone += [first for first, _ in pairs]
                predicted = here.linear(n, k, m, tile, candidate.rank, name) if candidate.method == "stl" else None
                yield _row(pairs, candidate, error, predicted, fixed)
            if alone:
                yield _row([(once, once) for once in alone], dense, verified(dense, n, name), None, fixed)


def interleave(
    first: Callable[[], None], second: Callable[[], None], seconds: float, device: str
) -> list[tuple[float, float]]:
    """Times of `first` and `second`, run in turn: at least five pairs, until `seconds` are spent."""
    for run in (first, second, first, second):
        run()
    once = _clock(first) if device == "cuda" else _wall
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(pairs) < 5 or (time.perf_counter() < end and len(pairs) < 200):
        pairs.append((once(first), once(second)))
    return pairs


def _wall(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _clock(sample: Callable[[], None]) -> Callable[[Callable[[], None]], float]:
    """The GPU's own clock over as many runs as make five milliseconds, so that launches hide behind the work."""

    def alone() -> None:
        sample()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    repeats = max(1, min(200, int(5e-3 / _wall(alone))))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(run: Callable[[], None]) -> float:
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / repeats

    return once


def _timed(forward: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor, name: str) -> Callable[[], None]:
    def run_forward() -> None:
        with torch.no_grad():
            forward()

    def run_step() -> None:
        for leaf in leaves:
            leaf.requires_grad_(True).grad = None
        forward().backward(grad)

    return run_step if name == "step" else run_forward


def _quantile(ordered: Sequence[float], part: float) -> float:
    """Between neighbours, as numpy does."""
    place = part * (len(ordered) - 1)
    low = int(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def _row(
    pairs: list[tuple[float, float]],
    candidate: Candidate,
    error: float,
    predicted: tuple[float, float] | None,
    fixed: Row,
) -> Row:
    ratios = sorted(a / b for a, b in pairs)
    times = sorted(b for _, b in pairs)
    dense = sorted(a for a, _ in pairs)
    return {
        **fixed,
        "method": candidate.method,
        "rank": candidate.rank,
        "median_s": statistics.median(times),
        "q20_s": _quantile(times, 0.2),
        "q80_s": _quantile(times, 0.8),
        "dense_s": statistics.median(dense),
        "pairs": len(pairs),
        "speedup": statistics.median(ratios),
        "speedup_q20": _quantile(ratios, 0.2),
        "speedup_q80": _quantile(ratios, 0.8),
        "limit": candidate.limit,
        "error": error,
        "predicted_s": None if predicted is None else predicted[1],
        "predicted_dense_s": None if predicted is None else predicted[0],
    }
