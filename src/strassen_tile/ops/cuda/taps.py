"""Triton's kernels of a short convolution over rows: each row is read once from memory, and written once.

Requires: float32, bfloat16 or float16 on a CUDA device, current or not (any device under Triton's interpreter). Sums are in
float32. Not yet measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from strassen_tile.ops.cuda import tap_kernels as kernels

_ROWS, _COLUMNS, _WARPS = 32, 64, 4  # of a program's block; not yet tuned on a GPU
_PROGRAMS = 64  # of a correlation, for each block of columns: as many partial sums to add


def supports(x: Tensor) -> bool:
    """Whether the kernels take matrices (B, N, K) of this dtype and size: rows are counted in 31 bits."""
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.numel() > 0 and x.shape[:-1].numel() < 2**30


def convolve(x: Tensor, weight: Tensor, before: int, residual: bool) -> Tensor:
    """As `ops.taps.convolve_rows`, without gradients."""
    x = x.contiguous()
    y, factor = x.new_empty(x.shape), weight.float().mT.contiguous()
    (batch, rows, columns), taps = x.shape, factor.shape[0]
    grid = triton.cdiv(batch * rows, _ROWS) * triton.cdiv(columns, _COLUMNS)
    with torch.cuda.device_of(x):
        kernels.taps_kernel[(grid,)](
            x, factor, y, batch * rows, rows, columns, before,
            TAPS=taps, RESIDUAL=residual, BN=_ROWS, BK=_COLUMNS, num_warps=_WARPS,
        )  # fmt: skip
    return y


def correlate(grad: Tensor, x: Tensor, taps: int, before: int) -> Tensor:
    """Σ_n grad[n, k] x[n + t − before, k]: (K, T) in float32."""
    grad, x = grad.contiguous(), x.contiguous()
    batch, rows, columns = x.shape
    blocks = triton.cdiv(batch * rows, _ROWS)
    programs = min(blocks, _PROGRAMS)
    sums = x.new_empty(programs, taps, columns, dtype=torch.float32)
    with torch.cuda.device_of(x):
        kernels.taps_correlate_kernel[(programs * triton.cdiv(columns, _COLUMNS),)](
            grad, x, sums, batch * rows, rows, columns, before, blocks,
            TAPS=taps, PADDED=triton.next_power_of_2(taps), BN=_ROWS, BK=_COLUMNS, num_warps=_WARPS,
        )  # fmt: skip
    return sums.sum(dim=0).mT.contiguous()
