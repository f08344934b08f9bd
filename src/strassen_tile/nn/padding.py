"""Padding rows must not reach real ones: the mask that says which rows of a batch are padding.

Tiles hold p neighbouring rows, so the first padding rows share a tile with the last real ones. Zeroed, they are what
the operator itself pads a ragged sequence with, and the output of a real row no longer depends on the padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from strassen_tile.errors import ShapeError, shape_text


class PaddingMask:
    """The mask (B, N), True for real rows, shared by the layers of one model while it runs.

    Attached to a model it follows the argument `attention_mask` of its calls; a model without one is called inside
    `with padding(mask): …`. Checkpointed layers, which run again during the backward pass, get the mask of the call that
    the pass belongs to.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.past = 0  # rows of the sequence that a cache holds already
        self._held = False  # by a `with`
        self._outer: list[tuple[nn.Module, Tensor | None, int]] = []  # what each call in progress goes back to
        self._finished: list[Tensor | None] = []  # masks of calls that a backward pass may still come to
        self._replayed = False

    def attach(self, model: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Follow the calls of `model`, and of transformers' models inside it, which may be called past it.

        The handles detach again.
        """
        handles = []
        for module in model.modules():
            if module is not model and not hasattr(module, "get_input_embeddings"):
                continue
            names = list(inspect.signature(module.forward).parameters)
            if module is model or "attention_mask" in names:
                position = names.index("attention_mask") if "attention_mask" in names else None
                handles.append(module.register_forward_pre_hook(partial(self._enter, position), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
        return handles

    @contextmanager
    def __call__(self, mask: Tensor) -> Iterator[None]:
        """Hold `mask` (B, N), True or 1 for real rows, for the calls made inside."""
        before = self.mask, self._held
        self.mask, self._held = self._checked(mask), True
        try:
            yield
        finally:
            self.mask, self._held = before

    def zero(self, x: Tensor) -> Tensor:
        """`x` (B, N, K) with its padding rows set to zero."""
        mask = self.current()
        if mask is None:
            return x
        if x.shape[:-1] != mask.shape:
            raise ShapeError(
                f"the padding mask is {shape_text(mask.shape)}, but a row-mixing layer got {shape_text(x.shape)}: it "
                "cannot be told which rows are padding. Keep that layer dense (filter_fn) or use mixing='none'"
            )
        return x.masked_fill(~mask.unsqueeze(-1), 0)

    def current(self) -> Tensor | None:
        """The mask of the call in progress, or of the one that a checkpointed layer runs again for."""
        return self.mask if self._outer or self._held else self._replay()

    def check_start(self, tile_rows: int) -> None:
        """Raise ShapeError if the rows of this call, which continue a cached sequence, start in the middle of a tile."""
        if self.past % tile_rows:
            raise ShapeError(
                f"a cache holds {self.past} rows, so this call starts in the middle of a tile of {tile_rows} rows, whose "
                "first ones are gone. Run the whole sequence (use_cache=False), or use mixing='none'"
            )

    def _enter(self, position: int | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._outer.append((module, self.mask, self.past))
        mask = kwargs.get("attention_mask")
        if position is not None and position < len(args):
            mask = args[position]
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self.mask = self._checked(mask)
        elif isinstance(mask, Tensor) and self.mask is None:
            raise ShapeError(
                f"attention_mask {shape_text(mask.shape)} does not say which rows are padding: pass one of shape (B, N), or "
                "call the model inside `with conversion.padding(mask)`"
            )
        elif mask is None and len(self._outer) > 1 and not self._held:
            self.mask = None  # a model inside, run without a mask: the outer one is of other rows
        cache = kwargs.get("past_key_values")
        self.past = 0 if cache is None else int(cache.get_seq_length())

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not any(entry[0] is module for entry in self._outer):
            return  # another hook failed before this call was entered
        if len(self._outer) == 1 and not torch.compiler.is_compiling():
            self._finish(self.mask)
        left = None
        while left is not module:
            left, self.mask, self.past = self._outer.pop()

    def _finish(self, mask: Tensor | None) -> None:
        if not torch.is_grad_enabled() or _in_backward():
            return
        if self._replayed:
            self._finished, self._replayed = [], False
        if not any(mask is other for other in self._finished):
            self._finished = [*self._finished[-1:], mask]

    def _replay(self) -> Tensor | None:
        if torch.compiler.is_compiling() or not _in_backward():
            return None
        self._replayed = True
        if len(self._finished) > 1:
            raise ShapeError(
                "a checkpointed layer runs again, and it cannot be told which of several calls, with different padding, it "
                "belongs to: call backward() after each, and run what needs no gradient under torch.no_grad()"
            )
        return self._finished[0] if self._finished else None

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


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
