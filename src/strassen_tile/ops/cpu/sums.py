"""What a backward pass adds up over its panels: in float32 where storage has 16 bits, since many small terms would be lost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from strassen_tile.ops import schemas
from strassen_tile.ops.cpu.tiles import call, correlation_sums, correlation_total, supports


class Correlation:
    """A sum of correlations of one shape, (r, p, q) or (J, r, p, q): in float32 where storage has 16 bits."""

    def __init__(self, like: Tensor, factor: Sequence[int]) -> None:
        self._compiled, self._factor = supports(like, factor), tuple(factor)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self._sums = correlation_sums(factor) if self._compiled else like.new_zeros(self._factor, dtype=dtype)

    def add(self, x: Tensor, encoded: Tensor) -> None:
        """Add that of `x` (B, N, K), its rows dense, with `encoded` (r, B·I, J), contiguous."""
        if self._compiled:
            call("correlate", x, encoded, self._sums, per_tile=len(self._factor) == 4)
        else:
            self._sums += schemas.correlate(x, encoded, self._factor[-2:], len(self._factor) == 4)

    def total(self, dtype: torch.dtype) -> Tensor:
        """The sum."""
        return (correlation_total(self._sums, self._factor) if self._compiled else self._sums).to(dtype)


class WeightSum:
    """dŴ over the panels: in place; in 16 bits by way of a float32 sum, since many small terms would be lost."""

    def __init__(self, like: Tensor, panels: int) -> None:
        self._result = like.new_empty(like.shape)
        wide = torch.promote_types(like.dtype, torch.float32)
        self._sum = like.new_zeros(like.shape, dtype=wide) if wide != like.dtype and panels > 1 else None
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
