"""Matrices to tiles and back. Ragged edges are padded with zeros, each sample on its own.

Requires: tensors of two or more dimensions; tiles are cut along the last two only, so a tile never holds rows of two
samples. Any dtype and device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch.nn.functional as F
from torch import Tensor

from strassen_tile.errors import ShapeError

Tile = tuple[int, int, int]


def as_tile(tile: int | Sequence[int]) -> Tile:
    """Normalise `tile` to (p, q, s).

    Args:
        tile: one side for a cube (`4` means `(4, 4, 4)`), or the three sides p, q, s.

    Raises:
        ShapeError: not one or three positive integers.
    """
    given = tuple(tile) if isinstance(tile, Sequence) else (tile, tile, tile)
    sides = [side for side in map(as_integer, given) if side is not None and side >= 1]
    if len(given) != 3 or len(sides) != 3:
        raise ShapeError(f"tile must be a positive integer or three of them (p, q, s); got {tile!r}")
    p, q, s = sides
    return p, q, s


def as_integer(value: object) -> int | None:
    """`value` as Python's int, numpy's integers too; None if it is anything else, a bool or 4.0 included."""
    return int(value) if not isinstance(value, bool) and isinstance(value, Integral) else None


def tile_count(size: int, side: int) -> int:
    """How many tiles of `side` cover `size` entries; the last may hang over the edge."""
    return (size + side - 1) // side  # not −(−size // side): ONNX rounds towards zero


def as_samples(x: Tensor) -> Tensor:
    """(…, N, K) as (B, N, K): a view where strides allow. (`reshape(-1, …)` cannot tell B when N or K is 0.)"""
    return x if x.ndim == 3 else x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def to_tiles(x: Tensor, p: int, q: int) -> Tensor:
    """Cut (…, N, K) into tiles (…, I, J, p, q) with I = ⌈N/p⌉, J = ⌈K/q⌉; what hangs over the edge is zero."""
    n, k = x.shape[-2:]
    rows, columns = tile_count(n, p), tile_count(k, q)
    if rows * p != n or columns * q != k:
        x = F.pad(x, (0, columns * q - k, 0, rows * p - n))
    return x.reshape(*x.shape[:-2], rows, p, columns, q).transpose(-3, -2)


def from_tiles(tiles: Tensor, n: int, k: int) -> Tensor:
    """Put tiles (…, I, J, p, q) back into a matrix (…, n, k); the inverse of `to_tiles`, padding cut off."""
    rows, columns, p, q = tiles.shape[-4:]
    matrix = tiles.transpose(-3, -2).reshape(*tiles.shape[:-4], rows * p, columns * q)
    return matrix[..., :n, :k]
