"""What a machine can do, measured once, and the time of a layer predicted from it.

A product's rate depends on its size, memory's on whether pages are fresh, so both are measured at a few sizes (about three
seconds, kept in the user's cache folder) and interpolated. The prediction is FLOPs over rate plus bytes over bandwidth:

    dense    2NKM / gemm(NKM)                                            + fresh Y
    STL      r products / batched gemm(NKM/pqs) + (X + X̂ + Ŷ) traffic    + fresh Y + calls

A training step does each product once forward and twice backward, encodes X twice and dY, decodes Y and dX, correlates for
E and D; fresh are Y, dX, the weight's gradient and, for STL, Ŷ (`ops/cpu/panels.py`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from strassen_tile import files
from strassen_tile.cost.counts import linear
from strassen_tile.errors import ConfigError
from strassen_tile.tiling import as_tile

_SIDES = {"gemm": (128, 256, 512, 1024), "batched": (32, 64, 128, 256, 512)}
_BATCH = 24
_TRANSFORM_SIDE = 512
_MAX_BYTES = 1 << 16  # of the cache file, which takes less than 1 KiB
_SLOW = 0.25  # seconds
_FRESH_FROM = 32 << 20  # bytes: the most that glibc's allocator keeps
_FORWARD_CALLS, _STEP_CALLS = 6, 20  # operator calls beside the products: of panels, factors, and Python between them


@dataclass(frozen=True)
class Machine:
    """Measured rates of one device, dtype and number of threads.

    Attributes:
        gemm: (side, FLOP/s) of square products, ascending.
        batched: (side, FLOP/s) of a batch of them, as the r channels are.
        transform: FLOP/s of encoding and decoding, done in float32 whatever the dtype: that of a float32 product.
        copy: bytes/s read and written over memory in use.
        fresh: bytes/s written to memory just allocated.
        call: seconds an operator call costs before it does anything.
    """

    device: str
    dtype: str
    threads: int
    gemm: tuple[tuple[int, float], ...]
    batched: tuple[tuple[int, float], ...]
    transform: float
    copy: float
    fresh: float
    call: float

    def linear(
        self, n: int, k: int, m: int, tile: int | Sequence[int], rank: int, name: str = "forward"
    ) -> tuple[float, float]:
        """Predicted (dense, STL) seconds for (n, k) → (n, m); `name` is "forward" or "step"."""
        itemsize = torch.empty((), dtype=getattr(torch, self.dtype)).element_size()
        counted = linear(n, k, m, tile, rank, itemsize=itemsize)
        p, q, s = as_tile(tile)
        dense_s = counted.dense_flops / self._rate(self.gemm, (n * k * m) ** (1 / 3)) + self.call
        products = counted.product_flops / self._rate(self.batched, (n * k * m / (p * q * s)) ** (1 / 3))
        x, y = itemsize * n * k, itemsize * n * m
        transform = (counted.flops - counted.product_flops) / self.transform  # their traffic is added below
        if name != "step":
            dense = dense_s + self._write(y)
            transform += (counted.bytes - y) / self.copy + self._write(y)
            return dense, products + transform + _FORWARD_CALLS * self.call
        encoded, products_bytes = (rank * size / (p * edge) for size, edge in ((x, q), (y, s)))
        weight = itemsize * rank * k * m / (q * s)
        # forward: X, X̂ twice, Ŷ read; dD: dY, Ŷ; dŶ: dY, written and read twice; X̂ again; dX̂: written, read twice; dE: X
        traffic = 3 * x + 7 * encoded + 2 * y + 5 * products_bytes
        dense = 3 * dense_s + self._write(y, x, itemsize * k * m)
        transform = 3.5 * transform + traffic / self.copy + self._write(y, x, weight, products_bytes)
        return dense, 3 * products + transform + _STEP_CALLS * self.call

    def speedup(self, n: int, k: int, m: int, tile: int | Sequence[int], rank: int, name: str = "forward") -> float:
        """Predicted dense over STL time."""
        dense, stl = self.linear(n, k, m, tile, rank, name)
        return dense / stl

    def _write(self, *sizes: float) -> float:
        """Seconds to write results of so many bytes: an allocator keeps small ones for reuse, large ones are fresh."""
        return sum(size / (self.fresh if size >= _FRESH_FROM else self.copy) for size in sizes)

    @staticmethod
    def _rate(table: Sequence[tuple[int, float]], side: float) -> float:
        """Linear in the logarithm of the side between measured ones, constant beyond."""
        if side <= table[0][0]:  # small products cost about what the smallest measured one does a row
            return table[0][1]
        for (a, low), (b, high) in itertools.pairwise(table):
            if side <= b:
                part = math.log(side / a) / math.log(b / a)
                return low + part * (high - low)
        return table[-1][1]


def machine(device: str = "cpu", dtype: torch.dtype = torch.float32, *, refresh: bool = False) -> Machine:
    """This machine's rates: from the cache, or measured now (about three seconds).

    Raises:
        ConfigError: the device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but torch sees none")
    path = _cache_path(device, dtype)
    if not refresh:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # none yet, or of another version: measure
            record: Any = files.read_json(path, _MAX_BYTES)
            for table in _SIDES:
                record[table] = tuple((int(side), float(rate)) for side, rate in record[table])
            cached = Machine(**record)
            rates = [rate for _, rate in cached.gemm + cached.batched]
            if cached.gemm and cached.batched and min(*rates, cached.transform, cached.copy, cached.fresh) > 0:
                return cached
    found = measure(device, dtype)
    with contextlib.suppress(OSError):  # a read-only home costs three seconds a run, no more
        files.write_text(path, json.dumps(asdict(found)))
    return found


def measure(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """Measure the rates now."""
    scale = 1 if device == "cpu" else 4

    def product(batch: int, side: int) -> Callable[[], object]:
        a = torch.randn(batch, side, side, device=device).to(dtype)
        b, out = torch.randn_like(a), torch.empty_like(a)
        return (lambda: torch.mm(a[0], b[0], out=out[0])) if batch == 1 else (lambda: torch.bmm(a, b, out=out))

    x = torch.randn((1 << 24) * scale, device=device)  # 64 MiB: beyond what an allocator keeps for reuse
    y, tiny = torch.empty_like(x), torch.ones(1, device=device)
    tasks: dict[object, Callable[[], object]] = {
        (table, side * scale): product(1 if table == "gemm" else _BATCH, side * scale)
        for table, sides in _SIDES.items()
        for side in sides
    }
    a = torch.randn(_TRANSFORM_SIDE, _TRANSFORM_SIDE, device=device)
    tasks["transform"] = lambda: torch.mm(a, a)
    tasks["copy"] = lambda: y.copy_(x)
    tasks["fresh"] = lambda: torch.empty_like(x).fill_(1.0)
    tasks["call"] = lambda: tiny.add_(1.0)
    # Others on a shared machine only ever slow it down, for a while: the best of three rounds some time apart.
    best = {name: _seconds(run, device) for name, run in tasks.items()}
    for _ in range(2):
        for name, run in tasks.items():
            if best[name] < _SLOW:
                best[name] = min(best[name], _seconds(run, device))
    rates = {
        key: [(n * scale, 2 * batch * (n * scale) ** 3 / best[key, n * scale]) for n in _SIDES[key]]
        for key, batch in (("gemm", 1), ("batched", _BATCH))
    }
    return Machine(
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        gemm=tuple(rates["gemm"]),
        batched=tuple(rates["batched"]),
        transform=2 * _TRANSFORM_SIDE**3 / best["transform"],
        copy=2 * x.numel() * 4 / best["copy"],
        fresh=x.numel() * 4 / best["fresh"],
        call=5 * best["call"],
    )


def _seconds(run: Callable[[], object], device: str, budget: float = 0.05) -> float:
    """Time of `run`: the lower quartile of at least three, for about `budget` seconds."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    if (first := once()) > 2 * _SLOW:  # a dtype without kernels: once tells enough
        return first
    times = [once(), once(), once()]
    end = time.perf_counter() + budget
    while time.perf_counter() < end and len(times) < 1000:
        times.append(once())
    return sorted(times)[len(times) // 4]


def _cache_path(device: str, dtype: torch.dtype) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    parts = (name, device, str(dtype).removeprefix("torch."), f"t{torch.get_num_threads()}", torch.__version__)
    return root / "strassen-tile" / ("-".join(parts).replace(" ", "_").replace("/", "_") + ".json")
