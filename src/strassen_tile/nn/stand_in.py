"""What an STL layer shows as its `weight`: shape, dtype and device of a dense one, and an error to whoever computes with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from strassen_tile.errors import ShapeError

# Initialisers that models apply to every layer they know by name (T5): the layer has a start of its own.
_STARTS = {"normal_", "uniform_", "zero_", "fill_", "trunc_normal_", "kaiming_uniform_", "detach", "alias"}


class DenseWeight(Tensor):
    """A tensor (M, K) without numbers. Its attributes can be read; an operation on it raises ShapeError."""

    @staticmethod
    def __new__(cls, rows: int, columns: int, like: Tensor) -> DenseWeight:
        """Of `rows` × `columns`, with the dtype and device of `like`."""
        return Tensor._make_wrapper_subclass(cls, (rows, columns), dtype=like.dtype, device=like.device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override] # by the name torch calls it by
        return f"DenseWeight({tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r}: there is none)"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """No number is ever asked of it."""
        name = func._schema.name.rpartition("::")[2]
        if name in _STARTS:
            return args[0]
        raise ShapeError(
            f"an STL layer has no dense weight (M, K) to apply {name} to: it multiplies by encoded_weight. Call the layer, or "
            "leave it dense (convert's filter_fn)"
        )


def dense_weight(rows: int, columns: int, like: Tensor) -> Tensor:
    """A `DenseWeight`; while a model is traced, which knows no such tensors, an empty one (rows, 0)."""
    if torch.compiler.is_dynamo_compiling():
        return like.new_empty((rows, 0))
    weight = DenseWeight(rows, columns, like)
    weight._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers starts no such tensor anew
    return weight
