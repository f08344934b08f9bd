"""The kernels as functions of tensors: sizes, strides, block sizes and padding worked out here, once a call.

Requires: tensors on one CUDA device (any device under Triton's interpreter), factors one a layer (3-D), ranks and tiles with
r ≤ 128 and p·q ≤ 64. Results have 16-byte aligned rows where `aligned` asks for it: their last dimension is then a view.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from strassen_tile.ops.triton import kernels
from strassen_tile.tiling import tile_count

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_PROGRAMS = 512  # of a correlation: a few on each multiprocessor, and as many partial sums to add
_MOST_RANKS, _MOST_ENTRIES = 128, 64


def supports(matrix: Tensor, factor: Sequence[int]) -> bool:
    """Whether the kernels take a matrix of this dtype with a factor of this shape."""
    if len(factor) != 3 or matrix.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return 0 < factor[0] <= _MOST_RANKS and 0 < factor[1] * factor[2] <= _MOST_ENTRIES


def encode(x: Tensor, encoder: Tensor, *, aligned: bool = False) -> Tensor:
    """X̂ (r, B·I, J) of x (B, N, K)."""
    r, p, q = encoder.shape
    total, tiles = x.shape[0] * tile_count(x.shape[1], p), tile_count(x.shape[2], q)
    encoded = empty_encoded(r, total, tiles, x, aligned)
    if encoded.numel():
        shape = compile_time(p, q, r, x.dtype)
        kernels.encode_kernel[_grid(total, tiles, shape)](
            x,
            encoder.contiguous(),
            encoded,
            *_sizes(x, p, total, tiles, r),
            *x.stride(),
            *encoded.stride()[:2],
            **shape,
        )
    return encoded


def norm_encode(
    x: Tensor, scale: Tensor, shift: Tensor | None, eps: float, encoder: Tensor, *, centre: bool, aligned: bool = False
) -> Tensor:
    """X̂ of LayerNorm(x) if `centre`, of RMSNorm(x) otherwise; tiles must be FAST ones (`fast`)."""
    r, p, q = encoder.shape
    total, tiles = x.shape[0] * tile_count(x.shape[1], p), tile_count(x.shape[2], q)
    encoded = empty_encoded(r, total, tiles, x, aligned)
    if encoded.numel():
        shape = compile_time(p, q, r, x.dtype)
        del shape["ENTRIES"], shape["FAST"]
        kernels.norm_encode_kernel[(triton.cdiv(total, shape["BI"]),)](
            x, scale, shift, encoder.contiguous(), encoded, *_sizes(x, p, total, tiles, r), eps,
            *x.stride(), *encoded.stride()[:2], CENTRE=centre, SHIFT=shift is not None, **shape,
        )  # fmt: skip
    return encoded


def decode(
    encoded: Tensor,
    decoder: Tensor,
    batch: int,
    rows: int,
    columns: int,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(Y + bias) (batch, rows, columns) of Ŷ (r, B·I, L)."""
    r, p, s = decoder.shape
    y = encoded.new_empty(batch, rows, columns)
    if y.numel():
        encoded = _dense_last(encoded)
        total, tiles = encoded.shape[1:]
        shape = compile_time(p, s, r, y.dtype)
        kernels.decode_kernel[_grid(total, tiles, shape)](
            encoded, decoder.contiguous(), bias, y, *_sizes(y, p, total, tiles, r), *encoded.stride()[:2],
            *y.stride()[:2], BIAS=bias is not None, ACTIVATION=activation, **shape,
        )  # fmt: skip
    return y


def recode(
    encoded: Tensor,
    decoder: Tensor,
    encoder: Tensor,
    batch: int,
    rows: int,
    columns: int,
    bias: Tensor | None = None,
    activation: str = "none",
    *,
    gated: bool = False,
    aligned: bool = False,
) -> Tensor:
    """encode(activation(decode(Ŷ) + bias)), Y never written: (r', B·I, L).

    Args:
        encoded: Ŷ (r, B·I, L), or if `gated` (r, B·I, 2L): gate and up side by side.
        decoder: (r, p, s).
        encoder: (r', p, s) of the next layer.
        batch, rows, columns: of Y, or of gate and up each: columns = s·L or less, and if `gated` s·L exactly.
        bias: (columns,) or if `gated` (2·columns,).
        activation: of `composed.ACTIVATIONS`; if `gated` act(gate)·up.
        gated: see there.
        aligned: as for `encode`.
    """
    (r, p, s), next_rank = decoder.shape, encoder.shape[0]
    encoded = _dense_last(encoded)
    total, tiles = encoded.shape[1], encoded.shape[2] // (2 if gated else 1)
    out = empty_encoded(next_rank, total, tiles, encoded, aligned)
    if out.numel():
        shape = compile_time(p, s, r, out.dtype)
        sizes = total, tile_count(rows, p), rows, columns, tiles, r, next_rank
        kernels.recode_kernel[_grid(total, tiles, shape)](
            encoded, decoder.contiguous(), bias, encoder.contiguous(), out, *sizes, *encoded.stride()[:2],
            *out.stride()[:2], NEXT_RANKS=_padded(next_rank), BIAS=bias is not None, GATED=gated,
            ACTIVATION=activation, **{key: value for key, value in shape.items() if key != "FAST"},
        )  # fmt: skip
    return out


def correlate(x: Tensor, encoded: Tensor, tile: Sequence[int]) -> Tensor:
    """Σ_IJ X̂[k, I, J] X_IJ: (r, p, q), summed in float32."""
    (p, q), (r, total, tiles) = tile, encoded.shape
    if not x.numel() or not encoded.numel():
        return x.new_zeros(r, p, q)
    encoded, shape = _dense_last(encoded), compile_time(p, q, r, x.dtype)
    blocks = triton.cdiv(total, shape["BI"]) * triton.cdiv(tiles, shape["BJ"])
    programs = min(blocks, _PROGRAMS)
    sums = x.new_empty(programs, shape["RANKS"], shape["ENTRIES"], dtype=torch.float32)
    kernels.correlate_kernel[(programs,)](
        x, encoded, sums, *_sizes(x, p, total, tiles, r), blocks, *x.stride(), *encoded.stride()[:2], **shape
    )
    return sums.sum(dim=0)[:r, : p * q].reshape(r, p, q).to(x.dtype)


def fast(p: int, q: int) -> bool:
    """Whether tiles of p×q are read in whole matrix rows."""
    return p & (p - 1) == 0 and q & (q - 1) == 0 and p * q >= 16


def empty_encoded(r: int, total: int, tiles: int, like: Tensor, aligned: bool) -> Tensor:
    """Room for (r, total, tiles); if `aligned`, each row starts at a multiple of 16 numbers."""
    width = triton.cdiv(tiles, 16) * 16 if aligned else tiles
    return like.new_empty(r, total, width)[:, :, :tiles]


def compile_time(p: int, q: int, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time sizes of a kernel for this tile and rank, and its warps."""
    entries = _padded(p * q)
    wide = entries <= 16
    return {
        "P": p, "Q": q, "ENTRIES": entries, "RANKS": _padded(rank), "BI": 1, "BJ": 64 if wide else 32, "FAST": fast(p, q),
        "UPCAST": INTERPRETED, "num_warps": 8 if dtype == torch.float32 else 4,
    }  # fmt: skip


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _grid(total: int, tiles: int, shape: dict[str, Any]) -> tuple[int]:
    return (triton.cdiv(total, shape["BI"]) * triton.cdiv(tiles, shape["BJ"]),)


def _sizes(matrix: Tensor, p: int, total: int, tiles: int, rank: int) -> tuple[int, ...]:
    return total, tile_count(matrix.shape[1], p), matrix.shape[1], matrix.shape[2], tiles, rank


def _dense_last(encoded: Tensor) -> Tensor:
    return encoded if encoded.stride(-1) == 1 or encoded.shape[-1] <= 1 else encoded.contiguous()
