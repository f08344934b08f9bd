"""Whole passes on the CPU in panels of tile rows, so that X̂, Ŷ and their gradients never exist as a whole.

Requires: as `ops/eager.py`; what the compiled kernels take (`ops/cpu/tiles.py`) is theirs.

What costs time beside the products is memory: first touched, it is faulted in page by page, slower than the arithmetic
on it. So matrices are read and written once, and what lies between is a panel's, in a workspace kept from call to call.

    forward    X panel → X̂ → Ŷ → Y panel
    backward   dY panel → dŶ → dX̂ → dX panel;  dŴ += X̂ᴴ dŶ;  dE += ⟨X, dX̂⟩;  dD += ⟨dY, Ŷ⟩

A panel is a few whole samples or a part of one: a matrix like any other. Memory beside arguments and results: 64 MiB at
most in inference, 128 MiB in training, whatever the dtype, tile, scope and strides of x and dY. It holds a workspace a
thread, and what steps without a compiled kernel need for a moment. Beyond it, from the forward to the backward pass, Ŷ
where the decoder learns; in the backward pass in 16 bits, a float32 sum of dŴ if there are several panels; a copy of Ŵ
that is not contiguous. A panel has one tile row at least, which complex numbers or very many features may push beyond.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from strassen_tile.ops import schemas
from strassen_tile.ops.cpu.sums import Correlation, WeightSum
from strassen_tile.ops.cpu.tiles import (
    decode_into,
    encode,
    encode_into,
    huge_pages,
    rows_are_dense,
    rows_dense,
    supports,
)
from strassen_tile.ops.linear import composed_backward
from strassen_tile.tiling import tile_count

# Of a panel. In training each panel also adds to all of dŴ, so that fewer, larger ones pay.
INFERENCE_BYTES = 64 << 20
TRAINING_BYTES = 128 << 20
_SMALL = 1 << 18  # numbers in X̂ and Ŷ that are not worth a panel
_held = threading.local()
_IN_PLACE: Mapping[str, Callable[[Tensor], object]] = {
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_tanh": partial(torch.ops.aten.gelu_.default, approximate="tanh"),
    "silu": torch.ops.aten.silu_.default,
}


class _Panel(NamedTuple):
    """Some rows of some samples, `count` tile rows from the `first` of all on, and space for their X̂ and Ŷ."""

    samples: slice
    rows: slice
    first: int
    tile_rows: int
    x_side: Tensor
    y_side: Tensor

    def of(self, matrix: Tensor) -> Tensor:
        """Its part of a matrix (B, N, K)."""
        return matrix[self.samples, self.rows]

    def part_of(self, kept: Tensor) -> Tensor:
        """Its Ŷ in `kept`, where panel follows panel."""
        r, _, l = self.y_side.shape  # noqa: E741 - the tile index L
        return kept[r * self.first * l :][: r * self.tile_rows * l].view_as(self.y_side)


def forward(
    x: Tensor,
    encoded_weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    columns: int,
    activation: str,
) -> Tensor:
    """`schemas.linear`."""
    if _is_small(x, encoded_weight, encoder):
        return _at_once(x, encoded_weight, encoder, decoder, bias, columns, activation)[0]
    return _in_panels(x, encoded_weight, encoder, decoder, bias, columns, None, activation)


def forward_keeping(
    x: Tensor, encoded_weight: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, columns: int
) -> tuple[Tensor, Tensor]:
    """`schemas.linear_forward`; Ŷ is kept panel by panel."""
    if _is_small(x, encoded_weight, encoder):
        y, products = _at_once(x, encoded_weight, encoder, decoder, bias, columns, "none")
        return y, products.view(-1)
    r, _, l = encoded_weight.shape  # noqa: E741 - the tile index L
    kept = x.new_empty(r * x.shape[0] * tile_count(x.shape[1], encoder.shape[-2]) * l)
    return _in_panels(x, encoded_weight, encoder, decoder, bias, columns, kept), kept


def backward(
    grad: Tensor,
    x: Tensor,
    encoded_weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    kept: Tensor | None,
    wants: Sequence[bool],
) -> tuple[Tensor, ...]:
    """`schemas.linear_backward`."""
    panels = list(_panels(x, grad, encoded_weight, encoder, decoder, TRAINING_BYTES))
    if not panels or 0 in encoded_weight.shape:
        return composed_backward(grad, x, encoded_weight, encoder, decoder, kept, wants)
    wants_x, wants_weight, wants_encoder, wants_decoder, wants_bias = wants
    encoded_weight = encoded_weight.contiguous()
    transposed, e_conj, d_conj = encoded_weight.mH, encoder.conj(), decoder.conj()
    dx = x.new_empty(x.shape if wants_x else 0)
    weight_sum = WeightSum(encoded_weight, len(panels)) if wants_weight else None
    e_sum = Correlation(x, encoder.shape) if wants_encoder else None
    d_sum = Correlation(x, decoder.shape) if wants_decoder else None
    for panel in panels:
        x_part, grad_part, a, b = rows_dense(panel.of(x)), rows_dense(panel.of(grad)), panel.x_side, panel.y_side
        if d_sum is not None:
            products = b if kept is None else panel.part_of(kept)
            if kept is None:
                encode_into(a, x_part, encoder)
                torch.bmm(a, encoded_weight, out=b)
            d_sum.add(grad_part, products.conj())
        if wants_x or wants_weight or wants_encoder:
            encode_into(b, grad_part, d_conj)
        if weight_sum is not None:
            encode_into(a, x_part, encoder)
            weight_sum.add(a.mH, b)
        if wants_x or wants_encoder:
            torch.bmm(b, transposed, out=a)
        if wants_x:
            decode_into(panel.of(dx), a, e_conj)
        if e_sum is not None:
            e_sum.add(x_part.conj(), a)
        del x_part, grad_part  # which may be copies, before the next ones are made
    return (
        dx,
        x.new_empty(0) if weight_sum is None else weight_sum.total(),
        x.new_empty(0) if e_sum is None else e_sum.total(x.dtype),
        x.new_empty(0) if d_sum is None else d_sum.total(x.dtype),
        grad.sum(dim=(0, 1)) if wants_bias else x.new_empty(0),
    )


def _is_small(x: Tensor, encoded_weight: Tensor, encoder: Tensor) -> bool:
    """Whether X̂ and Ŷ are so small that an allocator gives their memory sooner than it is cut out of the workspace."""
    r, j, l = encoded_weight.shape  # noqa: E741 - the tile index L
    batch, rows, _ = x.shape
    numbers = batch * -(-rows // encoder.shape[-2]) * r * (j + l)
    return numbers <= _SMALL and numbers * x.element_size() <= INFERENCE_BYTES


def _at_once(
    x: Tensor,
    encoded_weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    columns: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Y and Ŷ."""
    products = torch.bmm(encode(x, encoder), encoded_weight)
    y = x.new_empty(x.shape[0], x.shape[1], columns)
    if y.numel():
        decode_into(y, products, decoder, bias)
    if activation != "none":
        _IN_PLACE[activation](y)
    return y, products


def _in_panels(
    x: Tensor,
    encoded_weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    columns: int,
    kept: Tensor | None,
    activation: str = "none",
) -> Tensor:
    y = x.new_empty(x.shape[0], x.shape[1], columns)
    if not y.numel():
        return y
    most = INFERENCE_BYTES if kept is None else TRAINING_BYTES
    encoded_weight = encoded_weight.contiguous()
    for panel in _panels(x, y, encoded_weight, encoder, decoder, most):
        products = panel.y_side if kept is None else panel.part_of(kept)
        encode_into(panel.x_side, rows_dense(panel.of(x)), encoder)
        torch.bmm(panel.x_side, encoded_weight, out=products)
        decode_into(panel.of(y), products, decoder, bias)
        if activation != "none":  # while the panel is in cache
            _IN_PLACE[activation](panel.of(y))
    return y


def _panels(
    x: Tensor, y: Tensor, encoded_weight: Tensor, encoder: Tensor, decoder: Tensor, most: int
) -> Iterator[_Panel]:
    """The panels of x (B, N, K) and y (B, N, M), of `most` bytes at most if a tile row allows it."""
    (r, j, l), (p, q), s = encoded_weight.shape, encoder.shape[-2:], decoder.shape[-1]  # noqa: E741 - the tile index L
    batch, rows, k = x.shape
    a_sample = tile_count(rows, p)
    numbers = r * (j + l)
    if not (supports(x, encoder.shape) and supports(x, decoder.shape)):
        numbers += 2 * r * max(j, l) + 3 * p * max(j * q, l * s)  # tiles, padded and regrouped, and one result more
    numbers += p * ((0 if rows_are_dense(x) else k) + (0 if rows_are_dense(y) else y.shape[2]))
    if not batch * rows:
        return
    bytes_a_row = numbers * x.element_size()
    samples, height = panel_rows(batch, a_sample * bytes_a_row, most), panel_rows(a_sample, bytes_a_row, most)
    space = _workspace(r * samples * height * (j + l), x)
    for sample in range(0, batch, samples):
        some = min(samples, batch - sample)
        for i in range(0, a_sample, height):
            count = some * min(height, a_sample - i)
            yield _Panel(
                slice(sample, sample + some),
                slice(i * p, min((i + height) * p, rows)),
                sample * a_sample + i * some,
                count,
                space[: r * count * j].view(r, count, j),
                space[r * count * j :][: r * count * l].view(r, count, l),
            )


def panel_rows(total: int, bytes_a_row: int, most: int) -> int:
    """Tile rows a panel, or samples: as many as `most` bytes hold, at least one, in panels of equal size."""
    return tile_count(total, tile_count(total, max(1, most // max(1, bytes_a_row))))


def _workspace(numel: int, like: Tensor) -> Tensor:
    """`numel` numbers that belong to this thread until its next pass."""
    size = numel * like.element_size()
    buffer: Tensor | None = getattr(_held, "buffer", None)
    if buffer is None or buffer.numel() < size:
        buffer = _held.buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        huge_pages(buffer)
    return buffer[:size].view(like.dtype)


for _operator, _kernel in (
    (schemas.linear, forward),
    (schemas.linear_forward, forward_keeping),
    (schemas.linear_backward, backward),
):
    schemas.register_kernel(_operator, _kernel, "CPU")
