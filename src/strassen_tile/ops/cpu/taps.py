"""The CPU's kernels of a short convolution over rows: one pass over memory, where features and their taps lie side by side.

Requires: float32 or bfloat16, and the compiled module `_taps` (built on installation where there is a C compiler). Anything
else takes `ops/taps.py`'s own sums in PyTorch's operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strassen_tile.ops.cpu.tiles import TYPES

try:  # after torch, whose OpenMP runtime it uses
    from strassen_tile.ops.cpu import _taps
except ImportError:  # built without a compiler
    _taps = None  # type: ignore[assignment]

_PARALLEL_FROM = 1 << 16  # numbers; fewer are done before a second thread has woken


def supports(*matrices: Tensor) -> bool:
    """Whether the kernels take matrices (B, N, K) of this dtype."""
    return _taps is not None and all(m.dtype in TYPES and m.is_cpu and m.numel() > 0 for m in matrices)


def convolve(x: Tensor, weight: Tensor, before: int, residual: bool) -> Tensor:
    """As `ops.taps.convolve`."""
    x = x.contiguous()
    y = torch.empty_like(x)
    factor = weight.detach().float().mT.contiguous()
    _call("convolve", x, factor.data_ptr(), y.data_ptr(), factor.shape[0], before, residual, _threads(x))
    return y


def correlate(grad: Tensor, x: Tensor, taps: int, before: int) -> Tensor:
    """As `ops.taps.correlate`; sums in float32, whatever the storage."""
    grad, x, threads = grad.contiguous(), x.contiguous(), _threads(x)
    sums = torch.zeros(threads, taps, x.shape[-1], dtype=torch.float32, device="cpu")
    _call("correlate", x, grad.data_ptr(), sums.data_ptr(), taps, before, False, threads)
    return sums.sum(dim=0).mT.contiguous()


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= _PARALLEL_FROM else 1


def _call(step: str, x: Tensor, second: int, to: int, taps: int, before: int, residual: bool, threads: int) -> None:
    batch, rows, columns = x.shape
    kind = TYPES[x.dtype]
    _taps.call(step, x.data_ptr(), second, to, rows, columns, batch * rows, taps, before, residual, kind, threads)
