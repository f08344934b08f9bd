"""A short convolution over rows, and the gradient of its weight: one program a block of rows and columns, sums in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tap(x, n, i, k, shift, total, rows, columns):
    """Rows i + shift of x (total, columns), where they are of i's sample: n = i % rows is its place there; else zero."""
    there = (i < total) & (n + shift >= 0) & (n + shift < rows)
    where = (i + shift).to(tl.int64)[:, None] * columns + k[None, :]
    return tl.load(x + where, mask=there[:, None] & (k < columns)[None, :], other=0.0).to(tl.float32)


@triton.jit
def taps_kernel(x, weight, y, total, rows, columns, before,
                TAPS: tl.constexpr, RESIDUAL: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Y[n, k] = Σ_t W[t, k] X[n + t − before, k], and X[n, k] if RESIDUAL; W is (TAPS, K) float32."""
    across = tl.cdiv(columns, BK)
    i = tl.program_id(0) // across * BN + tl.arange(0, BN)
    k = tl.program_id(0) % across * BK + tl.arange(0, BK)
    acc = tl.zeros((BN, BK), tl.float32)
    for tap in tl.static_range(TAPS):
        factor = tl.load(weight + tap * columns + k, mask=k < columns, other=0.0)
        acc += factor[None, :] * load_tap(x, i % rows, i, k, tap - before, total, rows, columns)
    if RESIDUAL:
        acc += load_tap(x, i % rows, i, k, 0, total, rows, columns)
    where = i.to(tl.int64)[:, None] * columns + k[None, :]
    tl.store(y + where, acc.to(y.dtype.element_ty), mask=(i < total)[:, None] & (k < columns)[None, :])


@triton.jit
def taps_correlate_kernel(grad, x, sums, total, rows, columns, before, blocks,
                          TAPS: tl.constexpr, PADDED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Σ_n G[n, k] X[n + t − before, k] over every n-th block of rows, n programs: (n, TAPS, K), to be summed over n."""
    across = tl.cdiv(columns, BK)
    first, count = tl.program_id(0) // across, tl.num_programs(0) // across
    k = tl.program_id(0) % across * BK + tl.arange(0, BK)
    t = tl.arange(0, PADDED)
    acc = tl.zeros((PADDED, BK), tl.float32)
    for block in range(first, blocks, count):
        i = block * BN + tl.arange(0, BN)
        g = load_tap(grad, i % rows, i, k, 0, total, rows, columns)
        for tap in tl.static_range(TAPS):
            seen = tl.sum(g * load_tap(x, i % rows, i, k, tap - before, total, rows, columns), axis=0)
            acc += tl.where((t == tap)[:, None], seen[None, :], 0.0)
    where = (first * TAPS + t)[:, None] * columns + k[None, :]
    tl.store(sums + where, acc, mask=(t < TAPS)[:, None] & (k < columns)[None, :])
