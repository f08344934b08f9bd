"""The operator in terms of PyTorch's own ones: for programs that are to run where this package is not.

Traced with sizes that stand for others, so nothing is decided by a size: what may have to be padded is, by nothing at times,
and what may have to be copied is. Requires: as `ops/eager.py`, which is faster where it is run as it stands.

In two forms with the same values. With one encoder for all tiles, encoding is a convolution whose stride is its size, and
decoding is a transposed one: onnxruntime takes half of the time for these that it takes for permuting tiles, PyTorch on the
CPU twice as long.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from strassen_tile.ops import schemas
from strassen_tile.ops.linear import ACTIVATIONS
from strassen_tile.tiling import tile_count


def encode(x: Tensor, encoder: Tensor) -> Tensor:
    """X̂[k, I, J] = ⟨E_k, X_IJ⟩: x (B, N, K), encoder (r, p, q) or (J, r, p, q) → (r, B·I, J)."""
    (batch, n, k), (r, p, q) = x.shape, encoder.shape[-3:]
    rows, columns = tile_count(n, p), tile_count(k, q)
    tiles = F.pad(x, (0, columns * q - k, 0, rows * p - n)).view(batch, rows, p, columns, q)
    if encoder.ndim == 4:
        flat = _copied(tiles.permute(3, 0, 1, 2, 4)).view(columns, batch * rows, p * q)
        return _copied((flat @ encoder.reshape(columns, r, p * q).mT).permute(2, 1, 0))
    flat = _copied(tiles.permute(2, 4, 0, 1, 3)).view(p * q, batch * rows * columns)
    return (encoder.reshape(r, p * q) @ flat).view(r, batch * rows, columns)


def decode(encoded: Tensor, decoder: Tensor, batch: int, rows: int, columns: int) -> Tensor:
    """Y_IL = Σ_k Ŷ[k, I, L] D_k: encoded (r, B·I, L), decoder (r, p, s) or (L, r, p, s) → (B, rows, columns)."""
    (r, total, l), (p, s) = encoded.shape, decoder.shape[-2:]  # noqa: E741 - the tile index L
    i = tile_count(rows, p)
    if decoder.ndim == 4:
        flat = _copied(encoded.permute(2, 1, 0)) @ decoder.reshape(l, r, p * s)  # (L, B·I, ps)
        tiles = flat.view(l, batch, i, p, s).permute(1, 2, 3, 0, 4)
    else:
        flat = decoder.reshape(r, p * s).mT @ encoded.view(r, total * l)
        tiles = flat.view(p, s, batch, i, l).permute(2, 3, 0, 4, 1)
    return _cut(_copied(tiles).view(batch, i * p, l * s), rows, columns)


def linear(
    x: Tensor,
    encoded_weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    columns: int,
    activation: str = "none",
    *,
    convolutions: bool = False,
) -> Tensor:
    """activation(decode(encode(x) @ Ŵ) + bias), as `ops.linear.linear`: x (B, N, K) → (B, N, columns)."""
    encoding, decoding = (encode_by_convolution, decode_by_convolution) if convolutions else (encode, decode)
    y = decoding(torch.bmm(encoding(x, encoder), encoded_weight), decoder, x.shape[0], x.shape[1], columns)
    return ACTIVATIONS[activation](y if bias is None else y + bias)


def encode_by_convolution(x: Tensor, encoder: Tensor) -> Tensor:
    """As `encode`."""
    if encoder.ndim == 4:
        return encode(x, encoder)
    (batch, n, k), (_, p, q) = x.shape, encoder.shape
    rows, columns = tile_count(n, p), tile_count(k, q)
    image = F.pad(x, (0, columns * q - k, 0, rows * p - n)).view(1, 1, batch * rows * p, columns * q)
    return F.conv2d(image, encoder.unsqueeze(1), stride=(p, q)).squeeze(0)


def decode_by_convolution(encoded: Tensor, decoder: Tensor, batch: int, rows: int, columns: int) -> Tensor:
    """As `decode`."""
    if decoder.ndim == 4:
        return decode(encoded, decoder, batch, rows, columns)
    p, s = decoder.shape[1:]
    image = F.conv_transpose2d(encoded.unsqueeze(0), decoder.unsqueeze(1), stride=(p, s))
    return _cut(image.view(batch, tile_count(rows, p) * p, encoded.shape[2] * s), rows, columns)


def decompositions(*, convolutions: bool = False) -> dict[Any, Callable[..., Tensor]]:
    """Operator → what it is made of, for `ExportedProgram.run_decompositions`."""
    return {
        schemas.linear: partial(linear, convolutions=convolutions),
        schemas.encode: encode_by_convolution if convolutions else encode,
        schemas.decode: decode_by_convolution if convolutions else decode,
    }


def _cut(y: Tensor, rows: int, columns: int) -> Tensor:
    """Without the padding; contiguous, as the graph was traced to have it."""
    return _copied(y[:, :rows, :columns])


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
