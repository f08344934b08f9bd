"""The kernels as functions of tensors: sizes, strides and padding worked out here, once a call.

Requires: tensors on one CUDA device, current or not (any device under Triton's interpreter), ranks and tiles with r ≤ 128
and p·q ≤ 64; factors one a layer (3-D), to `encode` and `decode` also one a tile (4-D).
Triton launches on the current device, so each launch makes that of its tensors current.
Results have 16-byte aligned rows where `aligned` asks for it: their last dimension is then a view.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from strassen_tile.ops.cuda import choices, kernels
from strassen_tile.tiling import tile_count

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_PROGRAMS = 512  # of a correlation: a few on each multiprocessor, and as many partial sums to add
_MOST_RANKS, _MOST_ENTRIES = 128, 64


def supports(matrix: Tensor, factor: Sequence[int]) -> bool:
    """Whether the kernels take a matrix of this dtype with a factor of this shape."""
    if len(factor) not in (3, 4) or matrix.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return 0 < factor[-3] <= _MOST_RANKS and 0 < factor[-2] * factor[-1] <= _MOST_ENTRIES


def encode(
    x: Tensor,
    encoder: Tensor,
    *,
    aligned: bool = False,
    out: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """X̂ (r, B·I, J) of x (B, N, K) and an encoder (r, p, q) or (J, r, p, q).

    Into `out` (r, B·I, J or more), and divided by `scales` (r,) and (B·I,), if given.
    """
    r, p, q = encoder.shape[-3:]
    total, tiles = x.shape[0] * tile_count(x.shape[1], p), tile_count(x.shape[2], q)
    encoded = empty_encoded(r, total, tiles, x, aligned) if out is None else out
    if encoded.numel():
        shape = blocks(compile_time("encode", p, q, r, encoded), encoder.ndim == 4)
        with torch.cuda.device_of(encoded):
            kernels.encode_kernel[_grid(total, tiles, shape)](
                x,
                encoder.contiguous(),
                *(scales or (None, None)),
                encoded,
                *_sizes(x, p, total, tiles, r),
                *x.stride(),
                *encoded.stride()[:2],
                SCALED=scales is not None,
                **shape,
            )
    return encoded


def norm_encode(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    encoder: Tensor,
    *,
    centre: bool,
    aligned: bool = False,
) -> Tensor:
    """X̂ of LayerNorm(x) if `centre`, of RMSNorm(x) otherwise; for tiles read in whole rows (`tiles_together`)."""
    r, p, q = encoder.shape
    total, tiles = x.shape[0] * tile_count(x.shape[1], p), tile_count(x.shape[2], q)
    encoded = empty_encoded(r, total, tiles, x, aligned)
    if encoded.numel():
        shape = compile_time("norm_encode", p, q, r, x)
        del shape["ENTRIES"], shape["FAST"]
        scale, shift = _dense(scale), _dense(shift)
        with torch.cuda.device_of(encoded):
            kernels.norm_encode_kernel[(triton.cdiv(total, shape["BI"]),)](
                x, scale, shift, encoder.contiguous(), encoded, *_sizes(x, p, total, tiles, r), eps,
                *x.stride(), *encoded.stride()[:2], CENTRE=centre, SCALE=scale is not None,
                SHIFT=shift is not None, **shape,
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
    row_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """activation(Y + bias) (batch, rows, columns) of Ŷ (r, B·I, L) and a decoder (r, p, s) or (L, r, p, s).

    Into `out` if given. Tile row I of Y is multiplied by row_scale[I] twice, if those are given.
    """
    r, p, s = decoder.shape[-3:]
    y = encoded.new_empty(batch, rows, columns) if out is None else out
    if y.numel():
        encoded = _dense_last(encoded)
        total, tiles = encoded.shape[1:]
        shape = blocks(compile_time("decode", p, s, r, encoded), decoder.ndim == 4)
        with torch.cuda.device_of(y):
            kernels.decode_kernel[_grid(total, tiles, shape)](
                encoded, decoder.contiguous(), _dense(bias), row_scale, y, *_sizes(y, p, total, tiles, r),
                *encoded.stride()[:2], *y.stride()[:2], BIAS=bias is not None, SCALED=row_scale is not None,
                ACTIVATION=activation, **shape,
            )  # fmt: skip
    return y


class Decoding(NamedTuple):
    """Ŷ (r, B·I, L), a decoder (r, p, s) and a bias (columns,) or None: what is yet to be decoded."""

    products: Tensor
    decoder: Tensor
    bias: Tensor | None


def decode_act_encode(
    first: Decoding,
    up: Decoding | None,
    encoder: Tensor,
    batch: int,
    rows: int,
    columns: int,
    activation: str = "none",
    *,
    aligned: bool = False,
) -> Tensor:
    """encode(activation(decode(Ŷ) + bias)), Y never written: (r', B·I, L).

    Args:
        first: what is decoded and activated.
        up: what it is then multiplied by, as many columns; None if nothing.
        encoder: (r', p, s) of the next layer.
        batch, rows, columns: of Y.
        activation: of `composed.ACTIVATIONS`.
        aligned: as for `encode`.
    """
    (r, p, s), next_rank = first.decoder.shape, encoder.shape[0]
    total, tiles = first.products.shape[1:]
    out = empty_encoded(next_rank, total, tiles, first.products, aligned)
    if out.numel():
        z, d, bias = _dense_last(first.products), first.decoder.contiguous(), _dense(first.bias)
        second = first if up is None else up
        z_up, d_up = _dense_last(second.products), second.decoder.contiguous()
        shape = compile_time("decode_act_encode", p, s, max(r, d_up.shape[0], next_rank), out)
        del shape["FAST"]
        ranks = {"RANKS": r, "UP_RANKS": d_up.shape[0], "NEXT_RANKS": next_rank}
        shape |= {name: padded(rank, shape["G"]) for name, rank in ranks.items()}
        sizes = total, tile_count(rows, p), rows, columns, tiles, r, d_up.shape[0], next_rank
        with torch.cuda.device_of(out):
            kernels.decode_act_encode_kernel[_grid(total, tiles, shape)](
                z, d, bias, z_up, d_up, _dense(second.bias), encoder.contiguous(), out, *sizes,
                *z.stride()[:2], *z_up.stride()[:2], *out.stride()[:2], BIAS=bias is not None,
                UP_BIAS=second.bias is not None, GATED=up is not None, ACTIVATION=activation, **shape,
            )  # fmt: skip
    return out


def correlate(x: Tensor, encoded: Tensor, tile: Sequence[int]) -> Tensor:
    """Σ_IJ X̂[k, I, J] X_IJ: (r, p, q), summed in float32."""
    (p, q), (r, total, tiles) = tile, encoded.shape
    if not x.numel() or not encoded.numel():
        return x.new_zeros(r, p, q)
    encoded, shape = _dense_last(encoded), compile_time("correlate", p, q, r, x)
    blocks = triton.cdiv(total, shape["BI"]) * triton.cdiv(tiles, shape["BJ"])
    programs = min(blocks, _PROGRAMS)
    ranks, g, entries = shape["RANKS"], shape["G"], shape["ENTRIES"]
    sums = x.new_empty(programs, ranks * g, entries, dtype=torch.float32)
    with torch.cuda.device_of(sums):
        kernels.correlate_kernel[(programs,)](
            x, encoded, sums, *_sizes(x, p, total, tiles, r), blocks, *x.stride(), *encoded.stride()[:2], **shape
        )
    each = sums.sum(dim=0)[: r * g, : p * q * g].view(r, g, p, g, q)
    return each.diagonal(dim1=1, dim2=3).sum(dim=-1).to(x.dtype)


def tiles_together(p: int, q: int, rank: int) -> int:
    """G: how many tiles of p×q are taken as one; 0 if they are gathered entry by entry."""
    if p & (p - 1) or q & (q - 1):
        return 0
    g = max(1, 16 // (p * q))
    return g if padded(rank, g) * g <= _MOST_RANKS else 0


def empty_encoded(r: int, total: int, tiles: int, like: Tensor, aligned: bool) -> Tensor:
    """Room for (r, total, tiles); if `aligned`, each row starts at a multiple of 16 numbers."""
    width = triton.cdiv(tiles, 16) * 16 if aligned else tiles
    return like.new_empty(r, total, width)[:, :, :tiles]


def compile_time(step: str, p: int, q: int, rank: int, like: Tensor) -> dict[str, Any]:
    """The compile-time sizes of a kernel for tiles of p×q and up to `rank` channels, and its warps."""
    beside = tiles_together(p, q, rank)
    g = beside or 1
    entries, ranks = padded(p * q * g), padded(rank, g)
    tile_rows, tiles, warps = choices.chosen(step, entries, ranks * g, like.dtype, like.device)
    return {
        "P": p, "Q": q * g, "G": g, "ENTRIES": entries, "RANKS": ranks, "BI": tile_rows, "BJ": tiles * g, "FAST": beside > 0,
        "UPCAST": INTERPRETED, "num_warps": warps,
    }  # fmt: skip


def blocks(shape: dict[str, Any], per_tile: bool) -> dict[str, Any]:
    """Those sizes for `encode` or `decode`.

    Of factors one a tile, each multiplies 16 tiles of a column, as tensor cores want; eight tiles side by side are stored
    16 bytes at a time, if registers hold them.
    """
    if not per_tile:
        return {**shape, "PER_TILE": False}
    g, small = shape["G"], shape["ENTRIES"] <= 16
    groups = max(shape["BI"] * shape["BJ"] // g // 16, 8 // g if small else 1, 1)
    warps = shape["num_warps"] if small and shape["RANKS"] <= 32 else 8
    return {**shape, "BI": 16, "BJ": groups * g, "num_warps": warps, "PER_TILE": True}


def padded(size: int, together: int = 1) -> int:
    """The next power of two; with as many others, a side of a tensor-core product, at least 16."""
    return max(16 // together, 1 << (size - 1).bit_length(), 1)


def _grid(total: int, tiles: int, shape: dict[str, Any]) -> tuple[int]:
    return (triton.cdiv(total, shape["BI"]) * triton.cdiv(tiles, shape["BJ"]),)


def _sizes(matrix: Tensor, p: int, total: int, tiles: int, rank: int) -> tuple[int, ...]:
    return total, tile_count(matrix.shape[1], p), matrix.shape[1], matrix.shape[2], tiles, rank


def _dense_last(encoded: Tensor) -> Tensor:
    return encoded if encoded.stride(-1) == 1 or encoded.shape[-1] <= 1 else encoded.contiguous()


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
