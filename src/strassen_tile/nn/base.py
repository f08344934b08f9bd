"""What all layers of this kind share: which inputs they take, what padding rows mean to them, what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from strassen_tile import cost
from strassen_tile.errors import ShapeError, shape_text
from strassen_tile.nn.config import Mixing, Scope, STLConfig
from strassen_tile.nn.padding import PaddingMask
from strassen_tile.nn.token_mix import TAPS, TokenMix, TokenMixKind


class TileLayer(nn.Module):
    """A layer (…, N, K) → (…, N, M) whose product is the Strassen-Tile operator.

    Attributes:
        in_features, out_features: K and M.
        config: what kind of operator.
        padding: set by `convert`: which rows of a batch are padding.
        token_mix: what mixes the rows ahead of the product; None if the config has none.
        meaning: a buffer without numbers whose shape says what those of the others mean.
    """

    bias: Tensor | None
    meaning: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: STLConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(in_features, out_features) < 0:
            raise ShapeError(f"features must be >= 0; got in_features={in_features}, out_features={out_features}")
        self.in_features, self.out_features, self.config = in_features, out_features, config
        self.padding: PaddingMask | None = None
        kind = config.token_mix
        self.token_mix = None if kind == "none" else TokenMix(in_features, kind, device=device, dtype=dtype)
        self.register_buffer("meaning", torch.empty(self._meaning(), device=device))

    def _meaning(self) -> tuple[int, ...]:
        """What the numbers of the layer mean, as the shape of a tensor without any.

        Kept in that form it stands in every format of state dicts, and no averaging, cast or move changes it; it is of floats
        because averages of models are taken of whatever a state dict holds.
        """
        mixing = get_args(Mixing).index(self.config.mixing if self.config.mixes_in_tiles else "none")
        scope, token_mix = get_args(Scope).index(self.config.encoder_scope), self.config.token_mix
        more = (
            () if token_mix == "none" else (get_args(TokenMixKind).index(token_mix),)
        )  # files of before have no such number
        return 0, mixing, scope, *self.config.pqs, self.in_features, self.out_features, *more

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As other modules do, unless the numbers mean something else here: that is an error. Older files do not say."""
        here, like = self._meaning(), state_dict.get(f"{prefix}encoder")
        device = like.device if isinstance(like, Tensor) else None
        given = state_dict.get(f"{prefix}meaning", torch.empty(here, device=device))
        name = prefix.rstrip(".") or "the layer"
        if not isinstance(given, Tensor):
            error_msgs.append(
                f"{name}: `meaning` must be a tensor without numbers, as the layer's own state_dict() has it; got {given!r}"
            )
        elif f"{prefix}weight" in state_dict and f"{prefix}encoded_weight" not in state_dict:
            error_msgs.append(  # whatever `strict` says: the layer would stay as it was started
                f"{name}: this is an STL layer, and what is loaded has the weight of a dense one; convert after loading"
            )
        elif tuple(given.shape) == here:
            state_dict[f"{prefix}meaning"] = given.to(self.meaning.dtype)  # it was of bools once
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        else:
            error_msgs.append(
                f"{name}: the numbers are those of another layer, {_explained(given.shape)}; this one is {_explained(here)}. "
                "Build it with the config that the file was saved under"
            )

    @property
    def itemsize(self) -> int:
        """Bytes a number of the encoded operands."""
        raise NotImplementedError

    def cost(self, rows: int, batch: int = 1) -> cost.Cost:
        """Cost of `batch` samples of `rows` rows."""
        tile, scope = self.config.pqs, self.config.encoder_scope
        features = self.in_features, self.out_features
        product = cost.linear(
            rows, *features, tile, self.config.rank, batch=batch, itemsize=self.itemsize, encoder_scope=scope
        )
        if self.token_mix is None:
            return product
        return cost.with_mix(product, rows, self.in_features, TAPS, batch=batch, itemsize=self.itemsize)

    def has_padding(self, x: Tensor) -> bool:
        """Whether rows of `x` may have to be zeroed now."""
        both_ways = self.config.mixes_in_tiles and self.config.mixing == "sequence"
        return self.padding is not None and both_ways and self.padding.current(x) is not None

    def mixed(self, x: Tensor) -> Tensor:
        """`x` (…, N, K) as the product takes it: after the token mix, its padding rows zeroed where a tile would let others
        see them. (In causal tiles rows see nothing behind them, padding included.)
        """
        if self.token_mix is not None:
            x = self.token_mix(x, self.padding)
        if self.padding is None or not self.config.mixes_in_tiles or self.config.mixing != "sequence":
            return x
        return self.padding.zero(x)

    def check_input(self, x: Tensor) -> None:
        """Raise ShapeError if `x` has other features, is 2-D though the rows of a tile depend on each other, or continues a
        cached sequence in the middle of a tile.
        """
        if x.ndim and x.shape[-1] != self.in_features:  # a tile would pad what is missing
            raise ShapeError(f"x must have {self.in_features} features; got {shape_text(x.shape)}")
        if not self.config.mixes_rows:
            return
        if x.ndim < 3:
            raise ShapeError(
                f"a 2-D input {shape_text(x.shape)} is a batch of rows, and this layer ({self._mixes()}: samples would leak "
                "into each other. For one sequence pass x.unsqueeze(0); for independent rows use mixing='none' and no token "
                "mix, or keep the layer dense"
            )
        if self.padding is not None:
            self.padding.check_start(self.config.pqs[0])

    def _mixes(self) -> str:
        if not self.config.mixes_in_tiles:
            return f"token_mix={self.config.token_mix!r}) mixes neighbouring rows"
        return f"mixing={self.config.mixing!r}, tile {self.config.tile}) mixes the {self.config.pqs[0]} rows of a tile"

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, config={self.config!r}"


def follows_padding(layer: nn.Module) -> bool:
    """Whether what a layer does to real rows depends on which rows of its input are padding."""
    if isinstance(layer, TileLayer):
        return layer.config.mixes_rows
    return getattr(layer, "follows_padding", False) is True


@contextmanager
def padding(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Hold `mask` (B, N), True or 1 for real rows, for what this thread or task calls of `model`, or of a copy of one, inside.

    For models that take no mask, or none that says which rows are padding. What a call says itself goes before it. Of several
    blocks that one thread or task has open, also in generators whose steps alternate, the one opened last counts.

    Raises:
        ShapeError: another shape, padding on the left, or row-mixing layers that no `PaddingMask` was made for.
    """
    layers: list[Any] = [layer for layer in model.modules() if follows_padding(layer)]
    if any(layer.padding is None for layer in layers):
        raise ShapeError(
            f"{type(model).__name__} has row-mixing layers that follow no mask; give them one: `layer.padding = mask = "
            "PaddingMask()` for each, then `mask.attach(model)`. `convert` does that itself"
        )
    with ExitStack() as stack:
        for handle in {id(layer.padding): layer.padding for layer in layers}.values():
            if handle is not None:
                stack.enter_context(handle(mask))
        yield


def only(x: Tensor | None, input: Tensor | None) -> Tensor:
    """The one of the two that was given: callers of `nn.Linear` may call it `input`."""
    given = input if x is None else x
    if given is None or (x is not None and input is not None):
        raise TypeError("forward() takes one tensor, as its first argument or as input=")
    return given


def _explained(meaning: Sequence[int]) -> str:
    try:
        _, mixing, scope, p, q, s, features, outputs, token_mix = (*meaning, 0)[:9]
        return (
            f"{features}→{outputs} with mixing={get_args(Mixing)[mixing]!r}, tile=({p}, {q}, {s}), "
            f"encoder_scope={get_args(Scope)[scope]!r}, token_mix={get_args(TokenMixKind)[token_mix]!r}"
        )
    except (ValueError, IndexError):
        return f"of a kind unknown here {shape_text(meaning)}"
