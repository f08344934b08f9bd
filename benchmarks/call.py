"""What a call of a small layer costs: nn.Linear and STLLinear in turn, with and without gradients to come.

    python benchmarks/call.py --out benchmarks/results/FILE.json

Appends a row for each. The fastest of many windows of calls: whatever else a machine does only ever slows a call down.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from strassen_tile import STLLinear
from strassen_tile.records import append_rows, environment

WINDOWS, CALLS = 400, 100


def fastest(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds a call of each, the fastest of windows that take turns."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(WINDOWS):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                function()
            best[name] = min(best[name], (time.perf_counter() - start) / CALLS)
    return best


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--features", type=int, default=64)
    options = parser.parse_args()
    n, k = options.rows, options.features
    x, dense, stl = torch.randn(1, n, k), torch.nn.Linear(k, k), STLLinear(k, k)
    calls = {"dense": lambda: dense(x), "stl": lambda: stl(x)}
    where = environment(command=f"python benchmarks/call.py --rows {n} --features {k}", device="cpu")
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            for method, seconds in fastest(calls).items():
                row = {"method": method, "n": n, "k": k, "m": k, "gradients": gradients, "call_s": seconds, **where}
                append_rows(options.out, [row])
                print(f"{method:6} {'with' if gradients else 'without'} gradients: {seconds * 1e6:.1f} µs")


if __name__ == "__main__":
    main()
