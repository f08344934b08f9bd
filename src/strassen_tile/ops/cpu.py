"""The CPU's kernels: tiles gathered in registers, the product in row panels that stay in cache.

Requires: float32 or bfloat16 with tiles of p·q ≤ 64 entries, q and s one of 1, 2, 4, 8, one encoder a layer, and the
compiled module `_kernels` (built on installation where there is a C compiler). Anything else takes `generic`.

What costs time beside the products is memory: written naively, decoding a 4096×4096 output spends longer in page faults
than in arithmetic. So matrices are read and written once, in whole rows; X̂ and Ŷ of a panel live in a workspace that is
kept from call to call; and fresh outputs ask for huge pages.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from strassen_tile.ops import generic, library
from strassen_tile.tiling import tile_count

try:  # after torch, whose OpenMP runtime it uses
    from strassen_tile.ops import _kernels
except ImportError:  # built without a compiler: `generic` serves
    _kernels = None  # type: ignore[assignment]

WORKSPACE_BYTES = 60 << 20  # of a panel's X̂ and Ŷ: larger is faster up to here, and 64 MiB is promised
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_LANES = 16
_PARALLEL_FROM = 1 << 14  # tiles; fewer are done before a second thread has woken
_HUGE_FROM = 1 << 22  # bytes
_workspaces = threading.local()


def compiled() -> bool:
    """Whether the compiled kernels are there."""
    return _kernels is not None


def encode(x: Tensor, encoder: Tensor) -> Tensor:
    """As `generic.encode`."""
    if not _supports(x, encoder.shape):
        return generic.encode(x, encoder)
    r, p, q = encoder.shape
    rows = x.shape[0] * tile_count(x.shape[1], p)
    encoded = _fresh((r, rows, tile_count(x.shape[2], q)), x)
    _step("encode", _rows_dense(x), encoded, encoder, 0, rows)
    return encoded


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """As `generic.multiply`, into huge pages."""
    return generic.multiply(a, b) if _kernels is None else torch.bmm(a, b, out=_fresh((*a.shape[:2], b.shape[2]), a))


def decode(encoded: Tensor, decoder: Tensor, batch: int, rows: int, columns: int) -> Tensor:
    """As `generic.decode`."""
    if not _supports(encoded, decoder.shape):
        return generic.decode(encoded, decoder, batch, rows, columns)
    y = _fresh((batch, rows, columns), encoded)
    _step("decode", y, encoded.contiguous(), decoder, 0, encoded.shape[1])
    return y


def correlate(x: Tensor, encoded: Tensor, tile: Sequence[int], per_column: bool) -> Tensor:
    """As `generic.correlate`; sums in float32, whatever the storage."""
    p, q = tile
    r = encoded.shape[0]
    if per_column or not _supports(x, (r, p, q)):
        return generic.correlate(x, encoded, tile, per_column)
    sums = torch.zeros(torch.get_num_threads(), r, p, q, _LANES)
    _step("correlate", _rows_dense(x), encoded.contiguous(), sums, 0, encoded.shape[1])
    return sums.sum(dim=(0, 4)).to(x.dtype)


def linear(
    x: Tensor, encoded_weight: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, columns: int
) -> Tensor:
    """decode(encode(x) @ Ŵ) + bias in panels of tile rows: memory beside the output is one workspace."""
    if not (_supports(x, encoder.shape) and _supports(x, decoder.shape)):
        return generic.linear(x, encoded_weight, encoder, decoder, bias, columns)
    (r, j, l), p = encoded_weight.shape, encoder.shape[1]  # noqa: E741 - the tile index L
    total = x.shape[0] * tile_count(x.shape[1], p)
    y = _fresh((x.shape[0], x.shape[1], columns), x)
    if 0 in (total, columns):
        return y
    x, encoded_weight = _rows_dense(x), encoded_weight.contiguous()
    e, d = encoder.float().contiguous(), decoder.float().contiguous()
    added = None if bias is None else bias.float().contiguous()
    height = panel_rows(total, r * (j + l) * x.element_size())
    workspace = _workspace(r * height * (j + l), x)
    for first in range(0, total, height):
        count = min(height, total - first)
        encoded = workspace[: r * count * j].view(r, count, j)
        products = workspace[r * count * j : r * count * (j + l)].view(r, count, l)
        _step("encode", x, encoded, e, first, count)
        torch.bmm(encoded, encoded_weight, out=products)
        _step("decode", y, products, d, first, count, bias=added)
    return y


@lru_cache(maxsize=1024)
def panel_rows(total: int, bytes_a_row: int) -> int:
    """Tile rows a panel: as many as the workspace holds, in panels of equal height."""
    most = max(1, WORKSPACE_BYTES // max(1, bytes_a_row))
    return tile_count(total, tile_count(total, most))


def _supports(matrix: Tensor, factor: Sequence[int]) -> bool:
    if _kernels is None or len(factor) != 3 or matrix.dtype not in _TYPES:
        return False
    r, p, q = factor
    return r > 0 and p > 0 and q in (1, 2, 4, 8) and p * q <= 64


def _rows_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _fresh(shape: Sequence[int], like: Tensor) -> Tensor:
    made = torch.empty(shape, dtype=like.dtype, device=like.device)
    size = made.numel() * made.element_size()
    if size >= _HUGE_FROM:
        _kernels.advise(made.data_ptr(), size)
    return made


def _workspace(numel: int, like: Tensor) -> Tensor:
    """`numel` numbers that belong to this thread until its next call."""
    size = numel * like.element_size()
    held: Tensor | None = getattr(_workspaces, "buffer", None)
    if held is None or held.numel() < size:
        held = _workspaces.buffer = torch.empty(size, dtype=torch.uint8)
        if size >= _HUGE_FROM:
            _kernels.advise(held.data_ptr(), size)
    return held[:size].view(like.dtype)


def _step(
    step: str, matrix: Tensor, encoded: Tensor, factor: Tensor, first: int, count: int, bias: Tensor | None = None
) -> None:
    """One kernel on tile rows first … first + count of `matrix` (B, N, K).

    `encoded` (r, count, J) holds those rows alone; `factor` is E or D, or for "correlate" the sums (threads, r, p, q,
    lanes) that it adds to.
    """
    r, p, q = factor.shape[1:4] if step == "correlate" else factor.shape
    _, rows, columns = matrix.shape
    values = factor.float().contiguous()  # held by this name while the kernel reads it
    _kernels.call(
        step,
        matrix.data_ptr(),
        encoded.data_ptr(),
        values.data_ptr(),
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


for _operator, _kernel in (
    (library.encode, encode),
    (library.multiply, multiply),
    (library.decode, decode),
    (library.correlate, correlate),
    (library.linear, linear),
):
    library.register_kernel(_operator, _kernel, "CPU")
