"""The operator's kernels in plain PyTorch: what runs on a device that has none of its own.

Requires: x (B, N, K), encoded (r, B·I, J), factors (r, p, q) or one a column tile (J, r, p, q); one dtype and device.
Any dtype torch.matmul takes, complex included; any strides; any size, 0 included.

Each is one gather or scatter of tiles and one small matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from strassen_tile.ops import schemas
from strassen_tile.tiling import from_tiles, tile_count, to_tiles


def encode(x: Tensor, encoder: Tensor) -> Tensor:
    """X̂[k, I, J] = ⟨E_k, X_IJ⟩: (r, B·I, J), contiguous."""
    r, p, q = encoder.shape[-3:]
    batch, rows, columns = x.shape[0], tile_count(x.shape[1], p), tile_count(x.shape[2], q)
    tiles = to_tiles(x, p, q)  # (B, I, J, p, q), a view unless padded
    if encoder.ndim == 4:
        flat = tiles.permute(2, 0, 1, 3, 4).reshape(columns, batch * rows, p * q)
        encoded = flat @ encoder.reshape(columns, r, p * q).mT  # (J, B·I, r)
        return encoded.permute(2, 1, 0).contiguous()
    flat = tiles.permute(3, 4, 0, 1, 2).reshape(p * q, batch * rows * columns)
    return (encoder.reshape(r, p * q) @ flat).view(r, batch * rows, columns)


def decode(encoded: Tensor, decoder: Tensor, batch: int, rows: int, columns: int) -> Tensor:
    """Y_IL = Σ_k Ŷ[k, I, L] D_k: (batch, rows, columns) with the padding cut, contiguous."""
    r, p, s = decoder.shape[-3:]
    i, l = tile_count(rows, p), encoded.shape[2]  # noqa: E741 - the tile index L
    if decoder.ndim == 4:
        flat = encoded.permute(2, 1, 0) @ decoder.reshape(l, r, p * s)  # (L, B·I, ps)
        tiles = flat.view(l, batch, i, p, s).permute(1, 2, 0, 3, 4)
    else:
        flat = decoder.reshape(r, p * s).mT @ encoded.reshape(r, batch * i * l)
        tiles = flat.view(p, s, batch, i, l).permute(2, 3, 4, 0, 1)
    return from_tiles(tiles, rows, columns).contiguous()


def correlate(x: Tensor, encoded: Tensor, tile: Sequence[int], per_column: bool) -> Tensor:
    """C_k = Σ_IJ X̂[k, I, J] X_IJ, the gradient of `encode` and `decode` in their factor: (r, p, q) or (J, r, p, q)."""
    p, q = tile
    r, rows, columns = encoded.shape
    tiles = to_tiles(x, p, q)
    if per_column:
        flat = tiles.permute(2, 0, 1, 3, 4).reshape(columns, rows, p * q)
        return (encoded.permute(2, 0, 1) @ flat).view(columns, r, p, q)
    flat = tiles.permute(3, 4, 0, 1, 2).reshape(p * q, rows * columns)
    return (encoded.reshape(r, rows * columns) @ flat.mT).view(r, p, q)


for _operator, _kernel in ((schemas.encode, encode), (schemas.decode, decode), (schemas.correlate, correlate)):
    schemas.register_kernel(_operator, _kernel, "CompositeExplicitAutograd")
