"""The CPU's kernels: tiles gathered and scattered in registers, one pass over the matrix.

Requires: float32 or bfloat16 with tiles of p·q ≤ 64 entries, q and s one of 1, 2, 4, 8, one encoder a layer or one a column
tile, and the compiled module `_kernels` (built on installation where there is a C compiler). Anything else takes `eager`, step
by step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from strassen_tile.errors import ShapeError, shape_text
from strassen_tile.ops import eager, schemas
from strassen_tile.tiling import tile_count

try:  # after torch, whose OpenMP runtime it uses
    from strassen_tile.ops.cpu import _kernels
except ImportError:  # built without a compiler: `eager` serves
    _kernels = None  # type: ignore[assignment]

TYPES = {torch.float32: 0, torch.bfloat16: 1}  # as the compiled kernels number them
_LANES = 16
_PARALLEL_FROM = 1 << 14  # tiles; fewer are done before a second thread has woken


def compiled() -> bool:
    """Whether the compiled kernels are there."""
    return _kernels is not None


def encode(x: Tensor, encoder: Tensor) -> Tensor:
    """As `eager.encode`."""
    if not supports(x, encoder.shape):
        return eager.encode(x, encoder)
    r, p, q = encoder.shape[-3:]
    encoded = x.new_empty(r, x.shape[0] * tile_count(x.shape[1], p), tile_count(x.shape[2], q))
    call("encode", rows_dense(x), encoded, _as_factor(encoder), per_tile=encoder.ndim == 4)
    return encoded


def decode(encoded: Tensor, decoder: Tensor, batch: int, rows: int, columns: int) -> Tensor:
    """As `eager.decode`."""
    if not supports(encoded, decoder.shape):
        return eager.decode(encoded, decoder, batch, rows, columns)
    y = encoded.new_empty(batch, rows, columns)
    decode_into(y, encoded.contiguous(), decoder)
    return y


def correlate(x: Tensor, encoded: Tensor, tile: Sequence[int], per_column: bool) -> Tensor:
    """As `eager.correlate`; sums in float32, whatever the storage."""
    factor = (*((encoded.shape[2],) if per_column else ()), encoded.shape[0], *tile)
    if not supports(x, factor):
        return eager.correlate(x, encoded, tile, per_column)
    sums = correlation_sums(factor)
    call("correlate", rows_dense(x), encoded.contiguous(), sums, per_tile=per_column)
    return correlation_total(sums, factor).to(x.dtype)


def encode_into(encoded: Tensor, x: Tensor, encoder: Tensor) -> None:
    """X̂ of `x` (B, N, K), its rows dense, into `encoded` (r, B·I, J), contiguous."""
    if supports(x, encoder.shape):
        call("encode", x, encoded, _as_factor(encoder), per_tile=encoder.ndim == 4)
    else:
        encoded.copy_(eager.encode(x, encoder))


def decode_into(y: Tensor, encoded: Tensor, decoder: Tensor, bias: Tensor | None = None) -> None:
    """Y + bias into `y` (B, N, M), its rows dense, from `encoded` (r, B·I, L), contiguous."""
    if supports(y, decoder.shape):
        bias = None if bias is None else _as_factor(bias)
        call("decode", y, encoded, _as_factor(decoder), bias, per_tile=decoder.ndim == 4)
    else:
        y.copy_(eager.decode(encoded, decoder, *y.shape))
        if bias is not None:
            y += bias


def correlation_sums(factor: Sequence[int]) -> Tensor:
    """What the kernel "correlate" adds to: a part for each thread and lane, or tile, whatever torch's defaults are."""
    *tiles, r, p, q = factor
    last = _up_to_lanes(tiles[0]) if tiles else _LANES
    return torch.zeros((torch.get_num_threads(), r, p, q, last), dtype=torch.float32, device="cpu")


def correlation_total(sums: Tensor, factor: Sequence[int]) -> Tensor:
    """The sums of all threads, as the factor's shape has them."""
    if len(factor) == 3:
        return sums.sum(dim=(0, -1))
    return sums.sum(dim=0)[..., : factor[0]].movedim(-1, 0).contiguous()


def supports(matrix: Tensor, factor: Sequence[int]) -> bool:
    """Whether the kernels take a matrix of this dtype with a factor of this shape, one a layer or one a column tile."""
    if _kernels is None or len(factor) not in (3, 4) or matrix.dtype not in TYPES:
        return False
    r, p, q = factor[-3:]
    return r > 0 and p > 0 and q in (1, 2, 4, 8) and p * q <= 64


def rows_dense(x: Tensor) -> Tensor:
    """`x` with rows of neighbouring numbers, copied only if it has none."""
    return x if rows_are_dense(x) else x.contiguous()


def rows_are_dense(x: Tensor) -> bool:
    """Whether neighbours in a row are neighbours in memory."""
    return x.stride(-1) == 1 or x.shape[-1] <= 1


def _as_factor(factor: Tensor) -> Tensor:
    """As the kernels read E, D and the bias: (r, p, q), or tile by tile (r, p, q, J and more), zero from J on."""
    if factor.ndim == 4:
        tiles = factor.shape[0]
        return F.pad(factor.float().movedim(0, -1), (0, _up_to_lanes(tiles) - tiles)).contiguous()
    return factor if factor.dtype == torch.float32 and factor.is_contiguous() else factor.float().contiguous()


def _up_to_lanes(tiles: int) -> int:
    return -(-tiles // _LANES) * _LANES


def call(
    name: str,
    matrix: Tensor,
    encoded: Tensor,
    factor: Tensor,
    bias: Tensor | None = None,
    *,
    per_tile: bool = False,
) -> None:
    """The kernel `name` on all tile rows of `matrix`; `factor` is E or D, or for "correlate" the sums that it adds to.

    Raises:
        ShapeError: `encoded` or `bias` is of another size than `matrix` and `factor` say, or of another dtype or device: the
            kernels do not look.
    """
    sizes = factor.shape[1:] if name == "correlate" else factor.shape
    r, p, q = sizes[:3]
    batch, rows, columns = matrix.shape
    sample_stride, row_stride, _ = matrix.stride()
    tile_rows, tiles = -(-rows // p), -(-columns // q)
    total = batch * tile_rows
    if encoded.dtype != matrix.dtype or not (matrix.is_cpu and encoded.is_cpu and factor.is_cpu):
        raise ShapeError(
            f"{name} takes tensors of one dtype on the CPU; got a matrix of {matrix.dtype} on {matrix.device}, an encoded "
            f"tensor of {encoded.dtype} on {encoded.device} and a factor on {factor.device}"
        )
    wide = sizes[3] if per_tile else 0
    if per_tile and wide != _up_to_lanes(tiles):
        raise ShapeError(f"{name} of {tiles} column tiles takes a factor for each; got one for {wide} or less")
    if encoded.shape != (r, total, tiles) or (bias is not None and bias.shape != (columns,)):
        raise ShapeError(
            f"{name} of a matrix {shape_text(matrix.shape)} with a factor {shape_text((r, p, q))} takes an encoded tensor "
            f"{shape_text((r, total, tiles))} and a bias ({columns},); got {shape_text(encoded.shape)} and "
            f"{None if bias is None else shape_text(bias.shape)}"
        )
    _kernels.call(
        name,
        matrix.data_ptr(),
        encoded.data_ptr(),
        factor.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        rows,
        columns,
        sample_stride,
        row_stride,
        tile_rows,
        tiles,
        encoded.stride(0),
        0,
        total,
        wide,
        r,
        p,
        q,
        TYPES[matrix.dtype],
        torch.get_num_threads() if total * tiles >= _PARALLEL_FROM else 1,
    )


def huge_pages(memory: Tensor) -> None:
    """Ask for huge pages behind `memory`, which is to be kept for long."""
    if _kernels is not None:
        _kernels.advise(memory.data_ptr(), memory.numel() * memory.element_size())


for _operator, _kernel in ((schemas.encode, encode), (schemas.decode, decode), (schemas.correlate, correlate)):
    schemas.register_kernel(_operator, _kernel, "CPU")
