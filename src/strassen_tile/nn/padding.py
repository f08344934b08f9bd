"""Padding rows must not reach real ones: the mask that says which rows of a batch are padding.

Tiles hold p neighbouring rows, so the first padding rows share a tile with the last real ones. Zeroed, they are what
the operator itself pads a ragged sequence with, and the output of a real row no longer depends on the padding.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from strassen_tile.errors import ShapeError
from strassen_tile.nn import calls, frames, past
from strassen_tile.nn.asking import ask, check_describes
from strassen_tile.nn.calls import Call
from strassen_tile.nn.direct import Direct
from strassen_tile.nn.masks import OTHERS, ROWS, SIGNALS, Takes, real_rows, takes_of
from strassen_tile.nn.reading import said


class PaddingMask:
    """Which rows are real, for the layers of one model: asked by each in each call.

    Attached to a model it follows the masks that its calls are given: `attention_mask`, 1 for real rows, or
    `src_key_padding_mask`, True for padding, each (B, N). A model without one is called inside `with padding(mask): …`.
    What a call says is for that call: other threads and tasks do not see it, and a checkpointed layer that runs again in the
    backward pass sees the mask of the call it belongs to. A copy of the model has a `PaddingMask` of its own.

    Args:
        tiles: whether rows mix in tiles, which begin at row 0: padding then has to stand on the right, and a row of the batch
            must be one sequence. Without, as for token mixes alone, it may stand on the left, and documents may be packed.
        ahead: whether rows see later ones. Without, a mask of who sees whom (B, 1, N, n), as of static caches, says it too.
    """

    def __init__(self, tiles: bool = True, ahead: bool = True) -> None:
        self.tiles, self.ahead = tiles, ahead
        self._key = uuid.uuid4().hex
        self._seen = False  # any mask, in a call that was run as it stands
        self._traced = False  # any mask, in a call that was compiled
        self._holds = False  # there has been a `with`

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_key"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        vars(self).update(state)

    def attach(self, model: nn.Module) -> list[torch.utils.hooks.RemovableHandle | Direct]:
        """Follow the calls of `model` and of the modules inside it that take a mask, which may be called past it.

        Parts of a transformers model are followed only then: what it hands down to them is a mask in forms of its own.

        Returns:
            Handles that detach again.
        """
        handles: list[torch.utils.hooks.RemovableHandle | Direct] = []
        whole: list[str] = []  # transformers' models
        for name, module in model.named_modules():
            takes = takes_of(module, module is model)
            has_embeddings = hasattr(module, "get_input_embeddings")
            inside = any(f"{name}.".startswith(f"{outer}.".lstrip(".")) for outer in whole)
            if has_embeddings:
                whole.append(name)
            takes = takes._replace(part=inside and not has_embeddings)
            told = bool(takes.positions.keys() & {*ROWS, *OTHERS})
            if module is not model:
                layers = any(getattr(layer, "padding", None) is self for layer in module.modules())
                if not layers or not (told or (has_embeddings and getattr(module, "main_input_name", "") in SIGNALS)):
                    continue
            handles.append(module.register_forward_pre_hook(partial(self._enter, takes), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
            if (told or module is model) and not takes.part:
                handles.append(Direct(module, partial(_followed, module)))
        return handles

    @contextmanager
    def __call__(self, mask: Tensor) -> Iterator[None]:
        """Hold `mask` (B, N), True or 1 for real rows, for the calls made inside by this thread or task."""
        real, frame = real_rows(mask, anywhere=not self.tiles), None
        self._seen = self._holds = True
        if not torch.compiler.is_dynamo_compiling():
            frame = calls.anchor(self._key)
            if frame is None:
                calls.hold(self._key, real)
                try:
                    yield
                finally:
                    calls.let_go(self._key, real)
                return
        outer, compiling = calls.top(self._key), torch.compiler.is_dynamo_compiling()
        length, cache = (0, None) if outer is None else (outer.past, outer.cache)
        call = Call(self._key, None, real, real, length, "", compiling, frame, cache=cache)
        if outer is not None:
            call.kept, call.ran = outer.kept, outer.ran
        calls.push(call)
        try:
            yield
        finally:
            calls.remove(call)

    @property
    def mask(self) -> Tensor | None:
        """The mask (B, N) of what runs now, True for real rows."""
        return self.current()

    @property
    def past(self) -> int:
        """Rows of the sequence that a cache holds already."""
        call = calls.top(self._key)
        if call is None or not call.past:
            return 0
        if not torch.compiler.is_dynamo_compiling():
            call = calls.live(self._key)
        return 0 if call is None else call.past

    def zero(self, x: Tensor) -> Tensor:
        """`x` (B, N, K) with its padding rows set to zero."""
        return self.apart(x)[0]

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """`x` (B, N, K) with its padding rows set to zero, and (B, N) which document each row is of, if there are several.

        Raises:
            ShapeError: what is known is of another number of rows.
        """
        rows = self.current(x)
        if rows is None:
            return x, None
        if (length := self.past) and rows.shape[-1] == length + x.shape[-2]:  # of the sequence; x goes on from a cache
            rows = rows[:, length:]
        if rows.dtype != torch.bool and rows.shape[0] == 1:
            rows = rows.expand(x.shape[0], -1)
        check_describes(rows, x)
        documents = None if rows.dtype == torch.bool else rows
        return x.masked_fill((rows == 0).unsqueeze(-1), 0), documents

    def with_past(self, layer: str, x: Tensor, wanted: int, keep: bool) -> Tensor:
        """X (B, N, K) after the last rows, at most `wanted`, of what `layer` was fed ahead of it: (B, n + N, K).

        Args:
            layer: a name that is its own.
            keep: whether those of x are to be kept, if the call turns out to have a cache.

        Raises:
            ShapeError: as `past.before`.
        """
        compiling, call = torch.compiler.is_dynamo_compiling(), calls.top(self._key)
        if call is None or (call.cache is None and (not keep or compiling)):
            return x
        if not compiling and (call := calls.live(self._key)) is None:
            return x
        key = layer, call.ran.get(layer, 0)
        if not call.ran and not compiling:
            past.check_written(call.cache, call.past)
        call.ran[layer] = key[1] + 1
        rows = past.before(call.cache, key, x, call.past, wanted)
        whole = x if rows is None else torch.cat([rows, x], dim=1)
        call.kept[key] = past.kept_of(whole, x.shape[1], call.past + x.shape[1], wanted)
        told = self.current(x)
        if rows is None or told is None or told.shape[-1] != call.past + x.shape[1]:
            return whole
        # By the mask of this call, whatever one before it said.
        hidden = told[:, call.past - rows.shape[1] : call.past] == 0
        return torch.cat([rows.masked_fill(hidden.unsqueeze(-1), 0), x], dim=1)

    def current(self, x: Tensor | None = None) -> Tensor | None:
        """The mask (B, N) of the call in progress, or of the one that a checkpointed layer runs again for.

        Args:
            x: (B, N, K) what the layer got. A compiled graph that does not know the mask asks for it each time it runs.

        Raises:
            ShapeError: it cannot be told.
        """
        if not torch.compiler.is_dynamo_compiling():
            return calls.resolve(self._key, self._traced) if self._seen else None
        call = calls.top(self._key)
        if call is not None:
            real = calls.rows(call)
            if real is not None or not call.traced or not self._holds:
                return real
        elif not self._seen:
            return None
        if x is None:
            raise ShapeError("a compiled graph cannot be asked for its padding mask outside a layer")
        return ask(x.detach(), self._key)

    def check_no_past(self) -> None:
        """Raise ShapeError if the rows of this call go on from a cache: rows before them would have seen them."""
        if length := self.past:
            raise ShapeError(
                f"a cache holds {length} rows, the last of which would have seen those of this call: a symmetric token mix "
                "wants the whole sequence (use_cache=False); token_mix='causal' goes on from a cache"
            )

    def check_start(self, tile_rows: int) -> None:
        """Raise ShapeError if the rows of this call, which continue a cached sequence, start in the middle of a tile."""
        length = self.past
        if length % tile_rows:
            raise ShapeError(
                f"a cache holds {length} rows, so this call starts in the middle of a tile of {tile_rows} rows, whose "
                "first ones are gone. Run the whole sequence (use_cache=False), or use mixing='none'"
            )

    def _enter(self, takes: Takes, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        compiling = torch.compiler.is_dynamo_compiling()
        if takes.part and (compiling or calls.top(self._key) is not None or frames.in_backward()):
            return  # of a call that said what is padding
        outer = calls.top(self._key) if compiling else calls.live(self._key)
        given = {name: args[at] for name, at in takes.positions.items() if at < len(args)} | kwargs
        held = outer.held if outer is not None else None if compiling else calls.held(self._key)
        inherits = outer is not None and not takes.own_rows
        length, cache = (outer.past, outer.cache) if outer is not None and inherits else (0, None)
        if given.get("past_key_values") is not None:
            cache = given["past_key_values"]
            length = int(cache.get_seq_length())
        real, unclear = said(
            type(module).__name__, takes, given, outer, held, length, tiles=self.tiles, ahead=self.ahead
        )
        if real is not None or unclear:
            if compiling:
                self._traced = True
            else:
                self._seen = True
        frame: FrameType | None = None if compiling else sys._getframe(1)
        call = Call(self._key, module, real, held, length, unclear, compiling, frame, cache)
        if inherits and outer is not None and cache is outer.cache:
            call.kept, call.ran = outer.kept, outer.ran
        calls.push(call)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        call = calls.pop(self._key, module)
        if call is not None and call.kept and not torch.compiler.is_dynamo_compiling():
            past.remember(past.cache_in(output) if call.cache is None else call.cache, call.kept)
        if call is not None and call.real is not None and isinstance(output, Generator | Coroutine | AsyncGenerator):
            raise ShapeError(
                f"{type(module).__name__}.forward runs after its call has ended (it is a generator or a coroutine), when its "
                "padding mask is gone: run it inside `with strassen_tile.padding(model, mask)`"
            )


def _followed(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return any(getattr(getattr(hook, "func", None), "__func__", None) is PaddingMask._enter for hook in hooks)


for _hook in (PaddingMask._enter, PaddingMask._leave):
    frames.run_as_it_stands(_hook)
