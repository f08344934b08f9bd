"""Padding rows must not reach real ones: the mask that says which rows of a batch are padding.

Tiles hold p neighbouring rows, so the first padding rows share a tile with the last real ones. Zeroed, they are what
the operator itself pads a ragged sequence with, and the output of a real row no longer depends on the padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from strassen_tile.errors import ShapeError, shape_text


class PaddingMask:
    """The mask (B, N), True for real rows, shared by the layers of one model while it runs.

    As a forward pre-hook of the model it takes the mask from the keyword argument `attention_mask`; a model without
    one is called inside `with padding(mask): …`.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def attach(self, model: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Follow the `attention_mask` of `model`'s calls; the handles detach again."""
        return [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    @contextmanager
    def __call__(self, mask: Tensor) -> Iterator[None]:
        """Hold `mask` (B, N), True or 1 for real rows, for the calls made inside."""
        before = self.mask
        self.mask = self._checked(mask)
        try:
            yield
        finally:
            self.mask = before

    def zero(self, x: Tensor) -> Tensor:
        """`x` (B, N, K) with its padding rows set to zero."""
        if self.mask is None:
            return x
        if x.shape[:-1] != self.mask.shape:
            raise ShapeError(
                f"the padding mask is {shape_text(self.mask.shape)}, but a row-mixing layer got {shape_text(x.shape)}: it "
                "cannot be told which rows are padding. Keep that layer dense (filter_fn) or use mixing='none'"
            )
        return x.masked_fill(~self.mask.unsqueeze(-1), 0)

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self.mask = self._checked(mask)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.mask = None

    @staticmethod
    def _checked(mask: Tensor) -> Tensor:
        if mask.ndim != 2:
            raise ShapeError(f"a padding mask is (B, N); got {shape_text(mask.shape)}")
        real = mask != 0
        # Padding on the left shifts where tiles begin, so outputs would depend on how much there is. Looking at the
        # values costs a synchronisation, and a traced graph has none to look at.
        if not torch.compiler.is_compiling() and bool((real[:, 1:] & ~real[:, :-1]).any()):
            raise ShapeError(
                "the mask has padding before real rows; pad on the right (tokenizer.padding_side = 'right')"
            )
        return real
