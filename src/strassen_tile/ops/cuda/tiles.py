"""Device functions: tiles in and out of registers as (p·q, BI·BJ) blocks, one tile a column.

A block is BI tile rows by BJ tiles. Where p and q are powers of two, whole matrix rows are read and written and regrouped in
registers (FAST); other tiles are gathered entry by entry. What lies over an edge is zero, never read and never written.
Offsets are 64-bit: matrices may have more than 2³¹ entries.

A tensor core multiplies at least 16 entries. Tiles of fewer are taken G side by side, as one of p × G·q; the factor is then
block diagonal, G copies of itself, and what belongs to channel k of the g-th one is in row k·G + g.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_program(tiles, BJ: tl.constexpr):
    """(block of tile rows, block of tiles) of this program."""
    across = tl.cdiv(tiles, BJ)
    program = tl.program_id(0)
    return program // across, program % across


@triton.jit
def tile_positions(block_i, block_j, BI: tl.constexpr, BJ: tl.constexpr):
    """Tile row and tile column of each of the BI·BJ tiles."""
    t = tl.arange(0, BI * BJ)
    return block_i * BI + t // BJ, block_j * BJ + t % BJ


@triton.jit
def row_positions(block_i, total, tile_rows, rows, P: tl.constexpr, BI: tl.constexpr):
    """Sample, row in it, and whether it exists, for each of the BI·P matrix rows of a block of tile rows."""
    at = tl.arange(0, BI * P)
    i = block_i * BI + at // P
    row = i % tile_rows * P + at % P
    return i // tile_rows, row, (i < total) & (row < rows)


@triton.jit
def load_rows(x, block_i, block_j, total, tile_rows, rows, columns, stride_b, stride_n, stride_k,
              P: tl.constexpr, Q: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr):  # fmt: skip
    """The block as it lies in the matrix: (BI·P, BJ·Q)."""
    sample, row, there = row_positions(block_i, total, tile_rows, rows, P, BI)
    column = block_j * BJ * Q + tl.arange(0, BJ * Q)
    start = sample.to(tl.int64) * stride_b + row.to(tl.int64) * stride_n
    where = start[:, None] + column.to(tl.int64)[None, :] * stride_k
    return tl.load(x + where, mask=there[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def to_columns(block, P: tl.constexpr, Q: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr):
    """(BI·P, BJ·Q) → (P·Q, BI·BJ)."""
    return tl.reshape(tl.permute(tl.reshape(block, (BI, P, BJ, Q)), (1, 3, 0, 2)), (P * Q, BI * BJ))


@triton.jit
def entry_positions(block_i, block_j, total, tile_rows, rows, columns, P: tl.constexpr, Q: tl.constexpr,
                    ENTRIES: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr):  # fmt: skip
    """Sample, row, column and existence of every entry of every tile: (ENTRIES, BI·BJ), ENTRIES ≥ P·Q."""
    i, j = tile_positions(block_i, block_j, BI, BJ)
    e = tl.arange(0, ENTRIES)
    row = (i % tile_rows * P)[None, :] + (e // Q)[:, None]
    column = (j * Q)[None, :] + (e % Q)[:, None]
    there = (e < P * Q)[:, None] & (i < total)[None, :] & (row < rows) & (column < columns)
    return (i // tile_rows)[None, :], row, column, there


@triton.jit
def load_tiles(x, block_i, block_j, total, tile_rows, rows, columns, stride_b, stride_n, stride_k,
               P: tl.constexpr, Q: tl.constexpr, ENTRIES: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
               FAST: tl.constexpr):  # fmt: skip
    """(ENTRIES, BI·BJ): entry e of tile t; zero beyond the matrix and for e ≥ P·Q."""
    if FAST:
        block = load_rows(
            x, block_i, block_j, total, tile_rows, rows, columns, stride_b, stride_n, stride_k, P, Q, BI, BJ
        )
        return to_columns(block, P, Q, BI, BJ)
    sample, row, column, there = entry_positions(
        block_i, block_j, total, tile_rows, rows, columns, P, Q, ENTRIES, BI, BJ
    )
    where = sample.to(tl.int64) * stride_b + row.to(tl.int64) * stride_n + column.to(tl.int64) * stride_k
    return tl.load(x + where, mask=there, other=0.0)


@triton.jit
def store_tiles(y, v, block_i, block_j, total, tile_rows, rows, columns, stride_b, stride_n,
                P: tl.constexpr, Q: tl.constexpr, ENTRIES: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
                FAST: tl.constexpr):  # fmt: skip
    """The inverse of `load_tiles`, into dense rows."""
    v = v.to(y.dtype.element_ty)
    if FAST:
        block = tl.reshape(tl.permute(tl.reshape(v, (P, Q, BI, BJ)), (2, 0, 3, 1)), (BI * P, BJ * Q))
        sample, row, there = row_positions(block_i, total, tile_rows, rows, P, BI)
        column = block_j * BJ * Q + tl.arange(0, BJ * Q)
        start = sample.to(tl.int64) * stride_b + row.to(tl.int64) * stride_n
        tl.store(y + start[:, None] + column[None, :], block, mask=there[:, None] & (column < columns)[None, :])
    else:
        sample, row, column, there = entry_positions(
            block_i, block_j, total, tile_rows, rows, columns, P, Q, ENTRIES, BI, BJ
        )
        where = sample.to(tl.int64) * stride_b + row.to(tl.int64) * stride_n + column
        tl.store(y + where, v, mask=there)


@triton.jit
def load_factor(
    factor, rank, RANKS: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, ENTRIES: tl.constexpr
):
    """E or D as (RANKS·G, ENTRIES), zero beyond its ranks and entries. Q is that of G tiles together."""
    row, e = tl.arange(0, RANKS * G)[:, None], tl.arange(0, ENTRIES)[None, :]
    if G == 1:  # as below, but plainly contiguous
        return tl.load(factor + row * (P * Q) + e, mask=(row < rank) & (e < P * Q), other=0.0)
    k, b = row // G, e % Q
    own = (e < P * Q) & (b // (Q // G) == row % G)
    return tl.load(factor + k * (P * Q // G) + e // Q * (Q // G) + b % (Q // G), mask=(k < rank) & own, other=0.0)


@triton.jit
def load_factors(factor, block_j, tiles, rank, RANKS: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, G: tl.constexpr,
                 ENTRIES: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    """Of factors one a tile those of a block's GROUPS times G tiles, as (GROUPS, RANKS·G, ENTRIES); zero beyond the last."""
    group, row = tl.arange(0, GROUPS)[:, None, None], tl.arange(0, RANKS * G)[None, :, None]
    e = tl.arange(0, ENTRIES)[None, None, :]
    tile, k, b = (block_j * GROUPS + group) * G + row % G, row // G, e % Q
    own = (e < P * Q) & (b // (Q // G) == row % G)
    where = (tile.to(tl.int64) * rank + k) * (P * Q // G) + e // Q * (Q // G) + b % (Q // G)
    return tl.load(factor + where, mask=(tile < tiles) & (k < rank) & own, other=0.0)


@triton.jit
def to_channels(z, RANKS: tl.constexpr, G: tl.constexpr):
    """(RANKS·G, T) of tiles taken G side by side → (RANKS, T·G), tile by tile."""
    if G == 1:
        return z
    tiles: tl.constexpr = z.shape[1]
    return tl.reshape(tl.permute(tl.reshape(z, (RANKS, G, tiles)), (0, 2, 1)), (RANKS, tiles * G))


@triton.jit
def from_channels(z, RANKS: tl.constexpr, G: tl.constexpr):
    """The inverse of `to_channels`."""
    if G == 1:
        return z
    tiles: tl.constexpr = z.shape[1] // G
    return tl.reshape(tl.permute(tl.reshape(z, (RANKS, tiles, G)), (0, 2, 1)), (RANKS * G, tiles))


@triton.jit
def channel_positions(block_i, block_j, total, tiles, rank, stride_r, stride_i,
                      RANKS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr):  # fmt: skip
    """Offsets of (RANKS, BI·BJ) numbers in X̂ or Ŷ, and which of them exist."""
    i, j = tile_positions(block_i, block_j, BI, BJ)
    k = tl.arange(0, RANKS)
    where = k.to(tl.int64)[:, None] * stride_r + (i.to(tl.int64) * stride_i + j)[None, :]
    return where, (k < rank)[:, None] & ((i < total) & (j < tiles))[None, :]


@triton.jit
def load_row_scale(row_scale, block_i, block_j, total, BI: tl.constexpr, BJ: tl.constexpr):
    """A number a tile row, (1, BI·BJ): that of each tile's."""
    i, _j = tile_positions(block_i, block_j, BI, BJ)
    return tl.load(row_scale + i, mask=i < total, other=1.0)[None, :]


@triton.jit
def product_by_tile(factors, v, UPCAST: tl.constexpr):
    """(GROUPS, A, B) and (B, BI·GROUPS) → (A, BI·GROUPS): each of the tiles side by side by a factor of its own."""
    groups: tl.constexpr = factors.shape[0]
    a: tl.constexpr = factors.shape[1]
    b: tl.constexpr = factors.shape[2]
    below: tl.constexpr = v.shape[1] // groups
    by_tile = tl.permute(tl.reshape(v, (b, below, groups)), (2, 0, 1))
    z = product(factors.to(v.dtype), by_tile, UPCAST)
    return tl.reshape(tl.permute(z, (1, 2, 0)), (a, below * groups))


@triton.jit
def product(a, b, UPCAST: tl.constexpr):
    """The product a @ b, summed in float32. The interpreter multiplies the bits of bfloat16: there, they are widened."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")
