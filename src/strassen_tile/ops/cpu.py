"""The CPU's kernels: tiles gathered and scattered in registers, one pass over the matrix.

Requires: float32 or bfloat16 with tiles of p·q ≤ 64 entries, q and s one of 1, 2, 4, 8, one encoder a layer, and the
compiled module `_kernels` (built on installation where there is a C compiler). Anything else takes `generic`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from strassen_tile.ops import generic, library
from strassen_tile.tiling import tile_count

try:  # after torch, whose OpenMP runtime it uses
    from strassen_tile.ops import _kernels
except ImportError:  # built without a compiler: `generic` serves
    _kernels = None  # type: ignore[assignment]

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_LANES = 16
_PARALLEL_FROM = 1 << 14  # tiles; fewer are done before a second thread has woken


def compiled() -> bool:
    """Whether the compiled kernels are there."""
    return _kernels is not None


def encode(x: Tensor, encoder: Tensor) -> Tensor:
    """As `generic.encode`."""
    if not supports(x, encoder.shape):
        return generic.encode(x, encoder)
    r, p, q = encoder.shape
    rows = x.shape[0] * tile_count(x.shape[1], p)
    encoded = x.new_empty(r, rows, tile_count(x.shape[2], q))
    step("encode", rows_dense(x), encoded, as_factor(encoder), 0, rows)
    return encoded


def decode(encoded: Tensor, decoder: Tensor, batch: int, rows: int, columns: int) -> Tensor:
    """As `generic.decode`."""
    if not supports(encoded, decoder.shape):
        return generic.decode(encoded, decoder, batch, rows, columns)
    y = encoded.new_empty(batch, rows, columns)
    step("decode", y, encoded.contiguous(), as_factor(decoder), 0, encoded.shape[1])
    return y


def correlate(x: Tensor, encoded: Tensor, tile: Sequence[int], per_column: bool) -> Tensor:
    """As `generic.correlate`; sums in float32, whatever the storage."""
    factor = (encoded.shape[0], *tile)
    if per_column or not supports(x, factor):
        return generic.correlate(x, encoded, tile, per_column)
    sums = empty_sums(factor)
    step("correlate", rows_dense(x), encoded.contiguous(), sums, 0, encoded.shape[1])
    return total_of(sums, x.dtype)


def supports(matrix: Tensor, factor: Sequence[int]) -> bool:
    """Whether the kernels take a matrix of this dtype with a factor of this shape."""
    if _kernels is None or len(factor) != 3 or matrix.dtype not in _TYPES:
        return False
    r, p, q = factor
    return r > 0 and p > 0 and q in (1, 2, 4, 8) and p * q <= 64


def rows_dense(x: Tensor) -> Tensor:
    """`x` with rows of neighbouring numbers, copied only if it has none."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def as_factor(factor: Tensor) -> Tensor:
    """E or D as the kernels read it."""
    return factor.float().contiguous()


def empty_sums(factor: Sequence[int]) -> Tensor:
    """What "correlate" adds to: (threads, r, p, q, lanes), zero."""
    # float32 on the CPU whatever torch's defaults are: the kernel writes just that
    return torch.zeros(torch.get_num_threads(), *factor, _LANES, dtype=torch.float32, device="cpu")


def total_of(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """The correlation (r, p, q)."""
    return sums.sum(dim=(0, -1)).to(dtype)


def step(
    name: str, matrix: Tensor, encoded: Tensor, factor: Tensor, first: int, count: int, bias: Tensor | None = None
) -> None:
    """The kernel `name` on tile rows first … first + count of `matrix` (B, N, K), its rows dense.

    `encoded` (r, count, J) holds those rows alone; `factor` is E or D from `as_factor`, or for "correlate" the sums
    that it adds to; `bias` (float32) is added by "decode".
    """
    r, p, q = factor.shape[1:4] if name == "correlate" else factor.shape
    _, rows, columns = matrix.shape
    _kernels.call(
        name,
        matrix.data_ptr(),
        encoded.data_ptr(),
        factor.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        rows,
        columns,
        matrix.stride(0),
        matrix.stride(1),
        tile_count(rows, p),
        encoded.shape[2],
        encoded.stride(0),
        first,
        count,
        r,
        p,
        q,
        _TYPES[matrix.dtype],
        torch.get_num_threads() if count * encoded.shape[2] >= _PARALLEL_FROM else 1,
    )


def huge_pages(memory: Tensor) -> None:
    """Ask for huge pages behind `memory`, which is to be kept for long."""
    _kernels.advise(memory.data_ptr(), memory.numel() * memory.element_size())


for _operator, _kernel in ((library.encode, encode), (library.decode, decode), (library.correlate, correlate)):
    library.register_kernel(_operator, _kernel, "CPU")
