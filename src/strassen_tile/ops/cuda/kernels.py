"""Encode, decode, decode-activate-encode, norm-encode, correlate: one program a block of tiles.

Arguments: matrices with their strides, encoded tensors (r, total, tiles) with strides of channel and tile row, factors
dense. `total` counts the tile rows of all samples, `tile_rows` those of one. PER_TILE: a factor for every tile of a row,
(tiles, r, p, q), and not one for all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from strassen_tile.ops.cuda.tiles import (
    channel_positions,
    entry_positions,
    from_channels,
    load_factor,
    load_factors,
    load_row_scale,
    load_rows,
    load_tiles,
    product,
    product_by_tile,
    row_positions,
    split_program,
    store_tiles,
    to_channels,
    to_columns,
)


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """Elementwise: "none", "relu", "gelu", "gelu_tanh" or "silu"."""
    if ACTIVATION == "relu":
        v = tl.where(v < 0.0, 0.0, v)  # a NaN stays one
    elif ACTIVATION == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # tanh(u) = 2 sigmoid(2u) - 1
        v = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACTIVATION == "silu":
        v = v * tl.sigmoid(v)
    return v


@triton.jit
def power_of(positive):
    """The largest power of two in a positive number."""
    return (positive.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def encode_kernel(x, factor, scale, row_scale, encoded, total, tile_rows, rows, columns, tiles, rank,
                  stride_b, stride_n, stride_k, stride_r, stride_i,
                  P: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, ENTRIES: tl.constexpr, RANKS: tl.constexpr,
                  BI: tl.constexpr, BJ: tl.constexpr, FAST: tl.constexpr, PER_TILE: tl.constexpr, SCALED: tl.constexpr,
                  UPCAST: tl.constexpr):  # fmt: skip
    """X̂[k, I, J] = ⟨E_k, X_IJ⟩, over scale[k]·row_scale[I] if SCALED: over a power of two before, so that none overflows."""
    block_i, block_j = split_program(tiles, BJ)
    v = load_tiles(x, block_i, block_j, total, tile_rows, rows, columns, stride_b, stride_n, stride_k,
                   P, Q, ENTRIES, BI, BJ // G, FAST)  # fmt: skip
    if SCALED:
        v = (v.to(tl.float32) / power_of(load_row_scale(row_scale, block_i, block_j, total, BI, BJ // G))).to(
            x.dtype.element_ty
        )
    if PER_TILE:
        z = product_by_tile(load_factors(factor, block_j, tiles, rank, RANKS, P, Q, G, ENTRIES, BJ // G), v, UPCAST)
    else:
        z = product(load_factor(factor, rank, RANKS, P, Q, G, ENTRIES), v, UPCAST)
    z = to_channels(z, RANKS, G)
    if SCALED:
        k = tl.arange(0, RANKS)
        by_row = load_row_scale(row_scale, block_i, block_j, total, BI, BJ)
        z /= by_row / power_of(by_row)
        z /= tl.load(scale + k, mask=k < rank, other=1.0)[:, None]
    where, there = channel_positions(block_i, block_j, total, tiles, rank, stride_r, stride_i, RANKS, BI, BJ)
    tl.store(encoded + where, z.to(encoded.dtype.element_ty), mask=there)


@triton.jit
def norm_encode_kernel(x, scale, shift, factor, encoded, total, tile_rows, rows, columns, tiles, rank, eps,
                       stride_b, stride_n, stride_k, stride_r, stride_i,
                       P: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, RANKS: tl.constexpr,
                       BI: tl.constexpr, BJ: tl.constexpr, CENTRE: tl.constexpr,
                       SCALE: tl.constexpr, SHIFT: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Encode of LayerNorm(x) (CENTRE) or RMSNorm(x): a program has whole rows, reads them twice, the second time from L2."""
    block_i = tl.program_id(0)
    mean = tl.zeros((BI * P,), tl.float32)
    square = tl.zeros((BI * P,), tl.float32)
    if CENTRE:
        for block_j in range(tl.cdiv(tiles, BJ)):
            block = load_rows(x, block_i, block_j, total, tile_rows, rows, columns, stride_b, stride_n, stride_k,
                              P, Q, BI, BJ // G).to(tl.float32)  # fmt: skip
            mean += tl.sum(block, axis=1)
        mean /= columns
    for block_j in range(tl.cdiv(tiles, BJ)):
        block = load_rows(x, block_i, block_j, total, tile_rows, rows, columns, stride_b, stride_n, stride_k,
                          P, Q, BI, BJ // G).to(tl.float32)  # fmt: skip
        column = block_j * (BJ // G * Q) + tl.arange(0, BJ // G * Q)
        block = tl.where((column < columns)[None, :], block - mean[:, None], 0.0)
        square += tl.sum(block * block, axis=1)
    inverse = tl.rsqrt(square / columns + eps)
    _sample, _row, row_there = row_positions(block_i, total, tile_rows, rows, P, BI)
    e = load_factor(factor, rank, RANKS, P, Q, G, P * Q)
    for block_j in range(tl.cdiv(tiles, BJ)):
        block = load_rows(x, block_i, block_j, total, tile_rows, rows, columns, stride_b, stride_n, stride_k,
                          P, Q, BI, BJ // G).to(tl.float32)  # fmt: skip
        column = block_j * (BJ // G * Q) + tl.arange(0, BJ // G * Q)
        inside = column < columns
        block = (block - mean[:, None]) * inverse[:, None]
        if SCALE:
            block *= tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if SHIFT:
            block += tl.load(shift + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        # Rows and columns over the edge are no longer zero, but must be.
        block = tl.where(row_there[:, None] & inside[None, :], block, 0.0).to(x.dtype.element_ty)
        z = to_channels(product(e, to_columns(block, P, Q, BI, BJ // G), UPCAST), RANKS, G)
        where, there = channel_positions(block_i, block_j, total, tiles, rank, stride_r, stride_i, RANKS, BI, BJ)
        tl.store(encoded + where, z.to(encoded.dtype.element_ty), mask=there)


@triton.jit
def decoded_block(encoded, factor, bias, row_scale, block_i, block_j, total, tile_rows, rows, columns, tiles, rank,
                  stride_r, stride_i,
                  P: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, ENTRIES: tl.constexpr, RANKS: tl.constexpr,
                  BI: tl.constexpr, BJ: tl.constexpr, PER_TILE: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr,
                  UPCAST: tl.constexpr):  # fmt: skip
    """(ENTRIES, BI·BJ) of Y·row_scale[I]² + bias in float32."""
    where, there = channel_positions(block_i, block_j, total, tiles, rank, stride_r, stride_i, RANKS, BI, BJ)
    z = from_channels(tl.load(encoded + where, mask=there, other=0.0), RANKS, G)
    if PER_TILE:
        d = load_factors(factor, block_j, tiles, rank, RANKS, P, Q, G, ENTRIES, BJ // G)
        y = product_by_tile(tl.permute(d, (0, 2, 1)), z, UPCAST)
    else:
        y = product(tl.trans(load_factor(factor, rank, RANKS, P, Q, G, ENTRIES)).to(z.dtype), z, UPCAST)
    if SCALED:
        by_row = load_row_scale(row_scale, block_i, block_j, total, BI, BJ // G)
        y = y * by_row * by_row  # one after the other: the square may be beyond float32
    if BIAS:
        _sample, _row, column, inside = entry_positions(
            block_i, block_j, total, tile_rows, rows, columns, P, Q, ENTRIES, BI, BJ // G
        )
        y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def decode_kernel(encoded, factor, bias, row_scale, y, total, tile_rows, rows, columns, tiles, rank,
                  stride_r, stride_i, stride_b, stride_n,
                  P: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, ENTRIES: tl.constexpr, RANKS: tl.constexpr,
                  BI: tl.constexpr, BJ: tl.constexpr, FAST: tl.constexpr, PER_TILE: tl.constexpr, BIAS: tl.constexpr,
                  SCALED: tl.constexpr, ACTIVATION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Y_IL = activation(Σ_k Ŷ[k, I, L] D_k + bias), the sum times row_scale[I]² if SCALED."""
    block_i, block_j = split_program(tiles, BJ)
    v = decoded_block(encoded, factor, bias, row_scale, block_i, block_j, total, tile_rows, rows, columns, tiles, rank,
                      stride_r, stride_i, P, Q, G, ENTRIES, RANKS, BI, BJ, PER_TILE, BIAS, SCALED, UPCAST)  # fmt: skip
    store_tiles(y, activate(v, ACTIVATION), block_i, block_j, total, tile_rows, rows, columns, stride_b, stride_n,
                P, Q, ENTRIES, BI, BJ // G, FAST)  # fmt: skip


@triton.jit
def decode_act_encode_kernel(encoded, decoder, bias, up, up_decoder, up_bias, encoder, out, total, tile_rows, rows, columns,
                  tiles, rank, up_rank, next_rank, stride_r, stride_i, up_stride_r, up_stride_i, out_stride_r, out_stride_i,
                  P: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, ENTRIES: tl.constexpr, RANKS: tl.constexpr,
                  UP_RANKS: tl.constexpr, NEXT_RANKS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
                  BIAS: tl.constexpr, UP_BIAS: tl.constexpr, GATED: tl.constexpr,
                  ACTIVATION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Decode, activate, encode for the next layer: its tile grid is this one's output grid, so no tile leaves registers.

    GATED: the activation is act(decoded)·up, `up` being the Ŷ of a second layer of as many features.
    """
    block_i, block_j = split_program(tiles, BJ)
    v = decoded_block(encoded, decoder, bias, None, block_i, block_j, total, tile_rows, rows, columns, tiles, rank,
                      stride_r, stride_i, P, Q, G, ENTRIES, RANKS, BI, BJ, False, BIAS, False, UPCAST)  # fmt: skip
    v = activate(v, ACTIVATION)
    if GATED:
        v *= decoded_block(up, up_decoder, up_bias, None, block_i, block_j, total, tile_rows, rows, columns, tiles, up_rank,
                           up_stride_r, up_stride_i, P, Q, G, ENTRIES, UP_RANKS, BI, BJ, False, UP_BIAS, False,
                           UPCAST)  # fmt: skip
    _sample, _row, _column, inside = entry_positions(
        block_i, block_j, total, tile_rows, rows, columns, P, Q, ENTRIES, BI, BJ // G
    )
    v = tl.where(inside, v, 0.0)  # padding decodes to anything, and act(bias) is not zero
    e = load_factor(encoder, next_rank, NEXT_RANKS, P, Q, G, ENTRIES)
    z = to_channels(product(e, v.to(encoder.dtype.element_ty), UPCAST), NEXT_RANKS, G)
    where, there = channel_positions(
        block_i, block_j, total, tiles, next_rank, out_stride_r, out_stride_i, NEXT_RANKS, BI, BJ
    )
    tl.store(out + where, z.to(out.dtype.element_ty), mask=there)


@triton.jit
def correlate_kernel(x, encoded, sums, total, tile_rows, rows, columns, tiles, rank, blocks,
                     stride_b, stride_n, stride_k, stride_r, stride_i,
                     P: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, ENTRIES: tl.constexpr, RANKS: tl.constexpr,
                     BI: tl.constexpr, BJ: tl.constexpr, FAST: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Σ_IJ X̂[k, I, J] X_IJ over every n-th block, n programs: (n, RANKS·G, ENTRIES) float32, to be summed over n."""
    across = tl.cdiv(tiles, BJ)
    acc = tl.zeros((RANKS * G, ENTRIES), tl.float32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        block_i, block_j = block // across, block % across
        v = load_tiles(x, block_i, block_j, total, tile_rows, rows, columns, stride_b, stride_n, stride_k,
                       P, Q, ENTRIES, BI, BJ // G, FAST)  # fmt: skip
        where, there = channel_positions(block_i, block_j, total, tiles, rank, stride_r, stride_i, RANKS, BI, BJ)
        z = from_channels(tl.load(encoded + where, mask=there, other=0.0), RANKS, G)
        acc += product(z, tl.trans(v), UPCAST)
    k, e = tl.arange(0, RANKS * G)[:, None], tl.arange(0, ENTRIES)[None, :]
    tl.store(sums + (tl.program_id(0) * RANKS * G + k) * ENTRIES + e, acc)
