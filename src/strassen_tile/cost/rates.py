"""What a machine can do, measured once, and the time of a layer predicted from it.

A product's rate depends on its size, memory's on whether pages are fresh, so both are measured at a few sizes (about two
seconds, kept in the user's cache folder) and interpolated. The prediction is FLOPs over rate plus bytes over bandwidth:

    dense    2NKM / gemm(NKM)                                            + fresh Y
    STL      r products / batched gemm(NKM/pqs) + (X + X̂ + Ŷ) traffic    + fresh Y + calls

A training step is three such passes: each product once forward and twice backward.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from strassen_tile.cost.counts import linear
from strassen_tile.errors import ConfigError
from strassen_tile.tiling import as_tile

_SIDES = {"gemm": (128, 256, 512, 1024, 2048), "batched": (32, 64, 128, 256, 512)}
_BATCH = 24


@dataclass(frozen=True)
class Machine:
    """Measured rates of one device, dtype and number of threads.

    Attributes:
        gemm: (side, FLOP/s) of square products, ascending.
        batched: (side, FLOP/s) of a batch of them, as the r channels are.
        copy: bytes/s read and written over memory in use.
        fresh: bytes/s written to memory just allocated.
        call: seconds an operator call costs before it does anything.
    """

    device: str
    dtype: str
    threads: int
    gemm: tuple[tuple[int, float], ...]
    batched: tuple[tuple[int, float], ...]
    copy: float
    fresh: float
    call: float

    def linear(
        self, n: int, k: int, m: int, tile: int | Sequence[int], rank: int | None, name: str = "forward"
    ) -> tuple[float, float]:
        """Predicted (dense, STL) seconds for (n, k) → (n, m); `name` is "forward" or "step"."""
        itemsize = torch.empty((), dtype=getattr(torch, self.dtype)).element_size()
        counted = linear(n, k, m, tile, rank or 1, itemsize=itemsize)
        p, q, s = as_tile(tile)
        passes = 3 if name == "step" else 1
        fresh = itemsize * n * m / self.fresh
        dense = passes * (counted.dense_flops / self._rate(self.gemm, (n * k * m) ** (1 / 3)) + self.call) + fresh
        side = (n * k * m / (p * q * s)) ** (1 / 3)
        coding = (counted.bytes - itemsize * n * m) / self.copy
        stl = passes * (counted.product_flops / self._rate(self.batched, side) + coding + 4 * self.call) + fresh
        if name == "step":  # X̂ and Ŷ are kept, and with the gradients of X and Ŵ written to fresh memory
            dense += itemsize * (n * k + k * m) / self.fresh
            encoded = (rank or 1) * (n * k / (p * q) + n * m / (p * s))
            stl += itemsize * (n * k + (rank or 1) * k * m / (q * s) + 2 * encoded) / self.fresh
        return dense, stl

    def speedup(self, n: int, k: int, m: int, tile: int | Sequence[int], rank: int, name: str = "forward") -> float:
        """Predicted dense over STL time."""
        dense, stl = self.linear(n, k, m, tile, rank, name)
        return dense / stl

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
    """This machine's rates: from the cache, or measured now (about two seconds).

    Raises:
        ConfigError: the device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but torch sees none")
    path = _cache_path(device, dtype)
    if path.exists() and not refresh:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            for table in _SIDES:
                record[table] = tuple((int(side), float(rate)) for side, rate in record[table])
            return Machine(**record)
        except (OSError, ValueError, TypeError, KeyError):
            pass  # a cache of another version: measure again
    found = measure(device, dtype)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(asdict(found)), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        pass  # a read-only home costs two seconds a run, no more
    return found


def measure(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """Measure the rates now."""
    scale = 1 if device == "cpu" else 4

    def rate(batch: int, side: int) -> float:
        a = torch.randn(batch, side, side, device=device).to(dtype)
        b, out = torch.randn_like(a), torch.empty_like(a)
        run = (lambda: torch.mm(a[0], b[0], out=out[0])) if batch == 1 else (lambda: torch.bmm(a, b, out=out))
        return 2 * batch * side**3 / _seconds(run, device)

    x = torch.randn((1 << 24) * scale, device=device)  # 64 MiB: beyond what an allocator keeps for reuse
    y = torch.empty_like(x)
    copy = 2 * x.numel() * 4 / _seconds(lambda: y.copy_(x), device)
    fresh = x.numel() * 4 / _seconds(lambda: torch.empty_like(x).fill_(1.0), device)
    tiny = torch.ones(1, device=device)
    return Machine(
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        gemm=tuple((side * scale, rate(1, side * scale)) for side in _SIDES["gemm"]),
        batched=tuple((side * scale, rate(_BATCH, side * scale)) for side in _SIDES["batched"]),
        copy=copy,
        fresh=fresh,
        call=5 * _seconds(lambda: tiny.add_(1.0), device),
    )


def _seconds(run: Callable[[], object], device: str, budget: float = 0.12) -> float:
    """Median time of `run`, at least three times, for about `budget` seconds."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    times = [once(), once(), once()]
    end = time.perf_counter() + budget
    while time.perf_counter() < end and len(times) < 1000:
        times.append(once())
    return statistics.median(times)


def _cache_path(device: str, dtype: torch.dtype) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    parts = (name, device, str(dtype).removeprefix("torch."), f"t{torch.get_num_threads()}", torch.__version__)
    return root / "strassen-tile" / ("-".join(parts).replace(" ", "_").replace("/", "_") + ".json")
