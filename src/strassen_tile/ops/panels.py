"""Whole passes on the CPU in panels of tile rows, so that X̂, Ŷ and their gradients never exist as a whole.

Requires: as `ops/cpu.py`; anything else is composed (`ops/composed.py`).

What costs time beside the products is memory: first touched, it is faulted in page by page, slower than the arithmetic
on it. So matrices are read and written once, and what lies between is a panel's, in a workspace kept from call to call.

    forward    X panel → X̂ → Ŷ → Y panel
    backward   dY panel → dŶ → dX̂ → dX panel;  dŴ += X̂ᵀ dŶ;  dE += ⟨X, dX̂⟩;  dD += ⟨dY, Ŷ⟩

Memory beside arguments and results: one workspace a thread, 64 MiB at most (128 MiB once it has trained); from the forward
to the backward pass Ŷ where the decoder learns; for bfloat16, in the backward pass, a float32 sum of dŴ if there are
several panels. Matrices whose rows are not dense are copied first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from strassen_tile.ops import composed, library
from strassen_tile.ops.cpu import as_factor, empty_sums, huge_pages, rows_dense, step, supports, total_of
from strassen_tile.tiling import tile_count

# Of a panel's X̂ and Ŷ. In training each panel also adds to all of dŴ, so that fewer, larger ones pay.
INFERENCE_BYTES = 64 << 20
TRAINING_BYTES = 128 << 20
_held = threading.local()
_IN_PLACE: Mapping[str, Callable[[Tensor], object]] = {
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_tanh": partial(torch.ops.aten.gelu_.default, approximate="tanh"),
    "silu": torch.ops.aten.silu_.default,
}


@dataclass(frozen=True)
class _Panels:
    """How a pass over `total` tile rows is cut: r channels of j tiles a row in X̂ and of l tiles in Ŷ."""

    r: int
    j: int
    l: int  # noqa: E741 - the tile index L
    total: int
    height: int
    workspace: Tensor

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(first tile row, how many) of each panel."""
        for first in range(0, self.total, self.height):
            yield first, min(self.height, self.total - first)

    def x_side(self, count: int) -> Tensor:
        """Room for a panel's X̂ or dX̂."""
        return self.workspace[: self.r * count * self.j].view(self.r, count, self.j)

    def y_side(self, count: int) -> Tensor:
        """Room for a panel's Ŷ or dŶ, beside that of `x_side`."""
        start = self.r * count * self.j
        return self.workspace[start : start + self.r * count * self.l].view(self.r, count, self.l)

    def part_of(self, kept: Tensor, first: int, count: int) -> Tensor:
        """A panel's Ŷ in `kept`, where panel follows panel."""
        start = self.r * first * self.l
        return kept[start : start + self.r * count * self.l].view(self.r, count, self.l)


def linear(
    x: Tensor,
    encoded_weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    columns: int,
    activation: str,
) -> Tensor:
    """As `composed.linear`: memory beside the output is one workspace."""
    if not _fits(x, encoder, decoder):
        return composed.linear(x, encoded_weight, encoder, decoder, bias, columns, activation)
    return _forward(x, encoded_weight, encoder, decoder, bias, columns, None, activation)


def linear_forward(
    x: Tensor, encoded_weight: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, columns: int
) -> tuple[Tensor, Tensor]:
    """As `composed.linear_forward`; Ŷ is kept panel by panel."""
    if not _fits(x, encoder, decoder):
        return composed.linear_forward(x, encoded_weight, encoder, decoder, bias, columns)
    r, _, l = encoded_weight.shape  # noqa: E741 - the tile index L
    kept = x.new_empty(r * x.shape[0] * tile_count(x.shape[1], encoder.shape[1]) * l)
    return _forward(x, encoded_weight, encoder, decoder, bias, columns, kept), kept


def linear_backward(
    grad: Tensor,
    x: Tensor,
    encoded_weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    kept: Tensor | None,
    wants: Sequence[bool],
) -> tuple[Tensor, ...]:
    """As `composed.linear_backward`."""
    panels = _panels(x, encoded_weight, encoder, TRAINING_BYTES) if _fits(x, encoder, decoder) else None
    if panels is None or 0 in (panels.total, panels.j, panels.l):
        return composed.linear_backward(grad, x, encoded_weight, encoder, decoder, kept, wants)
    wants_x, wants_weight, wants_encoder, wants_decoder, wants_bias = wants
    grad, x, transposed = rows_dense(grad), rows_dense(x), encoded_weight.contiguous().mT
    e, d = as_factor(encoder), as_factor(decoder)
    dx = x.new_empty(x.shape if wants_x else 0)
    weight_sum = _Sum(encoded_weight, len(list(panels))) if wants_weight else None
    e_sums, d_sums = empty_sums(encoder.shape), empty_sums(decoder.shape)
    for first, count in panels:
        a, b = panels.x_side(count), panels.y_side(count)
        if wants_decoder:
            products = b if kept is None else panels.part_of(kept, first, count)
            if kept is None:
                step("encode", x, a, e, first, count)
                torch.bmm(a, encoded_weight, out=b)
            step("correlate", grad, products, d_sums, first, count)
        if wants_x or wants_weight or wants_encoder:
            step("encode", grad, b, d, first, count)
        if weight_sum is not None:
            step("encode", x, a, e, first, count)
            weight_sum.add(a.mT, b)
        if wants_x or wants_encoder:
            torch.bmm(b, transposed, out=a)
        if wants_x:
            step("decode", dx, a, e, first, count)
        if wants_encoder:
            step("correlate", x, a, e_sums, first, count)
    return (
        dx,
        x.new_empty(0) if weight_sum is None else weight_sum.total(),
        total_of(e_sums, x.dtype) if wants_encoder else x.new_empty(0),
        total_of(d_sums, x.dtype) if wants_decoder else x.new_empty(0),
        grad.sum(dim=(0, 1)) if wants_bias else x.new_empty(0),
    )


class _Sum:
    """dŴ over the panels: in place in float32; for bfloat16 in a float32 sum, since many small terms would be lost."""

    def __init__(self, like: Tensor, panels: int) -> None:
        self._result = like.new_empty(like.shape)
        widened = like.dtype != torch.float32 and panels > 1
        self._sum = like.new_zeros(like.shape, dtype=torch.float32) if widened else None
        self._first = True

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add a @ b."""
        if self._sum is not None:
            for k, channel in enumerate(self._sum):
                channel += torch.mm(a[k], b[k], out=self._result[k])
        elif self._first:
            torch.bmm(a, b, out=self._result)
        else:
            self._result.baddbmm_(a, b)
        self._first = False

    def total(self) -> Tensor:
        return self._result if self._sum is None else self._result.copy_(self._sum)


def _forward(
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
    if 0 in y.shape:
        return y
    panels = _panels(x, encoded_weight, encoder, INFERENCE_BYTES if kept is None else TRAINING_BYTES)
    x, encoded_weight = rows_dense(x), encoded_weight.contiguous()
    e, d = as_factor(encoder), as_factor(decoder)
    added = None if bias is None else bias.float().contiguous()
    for first, count in panels:
        encoded = panels.x_side(count)
        products = panels.y_side(count) if kept is None else panels.part_of(kept, first, count)
        step("encode", x, encoded, e, first, count)
        torch.bmm(encoded, encoded_weight, out=products)
        step("decode", y, products, d, first, count, added)
        if activation != "none":  # while the panel is in cache
            for rows in _rows_of(y, encoder.shape[1], first, count):
                _IN_PLACE[activation](rows)
    return y


def _rows_of(y: Tensor, p: int, first: int, count: int) -> Iterator[Tensor]:
    """The rows of y (B, N, M) that tile rows first … first + count cover, sample by sample."""
    a_sample = tile_count(y.shape[1], p)
    for sample in range(first // a_sample, (first + count - 1) // a_sample + 1):
        start, end = (min(max(i - sample * a_sample, 0), a_sample) * p for i in (first, first + count))
        yield y[sample, start:end]


def _fits(x: Tensor, encoder: Tensor, decoder: Tensor) -> bool:
    return supports(x, encoder.shape) and supports(x, decoder.shape)


def _panels(x: Tensor, encoded_weight: Tensor, encoder: Tensor, most: int) -> _Panels:
    (r, j, l), p = encoded_weight.shape, encoder.shape[1]  # noqa: E741 - the tile index L
    total = x.shape[0] * tile_count(x.shape[1], p)
    height = panel_rows(total, r * (j + l) * x.element_size(), most) if total else 1
    return _Panels(r, j, l, total, height, _workspace(r * height * (j + l), x))


@lru_cache(maxsize=1024)
def panel_rows(total: int, bytes_a_row: int, most: int) -> int:
    """Tile rows a panel: as many as `most` bytes hold, at least one, in panels of equal height."""
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
    (library.linear, linear),
    (library.linear_forward, linear_forward),
    (library.linear_backward, linear_backward),
):
    library.register_kernel(_operator, _kernel, "CPU")
