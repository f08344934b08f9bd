"""A compiled graph asks for its padding mask each time it runs, by an operator: what it was traced with is of another call."""

from __future__ import annotations

import torch
from torch import Tensor

from strassen_tile.errors import ShapeError, shape_text
from strassen_tile.nn import calls

_library = torch.library.Library("strassen_tile", "FRAGMENT")
_library.define(
    "real_rows(Tensor x, str key) -> Tensor", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
)


def ask(x: Tensor, key: str) -> Tensor:
    """(B, N) of x (B, N, K): the mask of the call in progress for the model of this key, ones without one."""
    asked: Tensor = torch.ops.strassen_tile.real_rows(x, key)
    return asked


def check_describes(mask: Tensor, x: Tensor) -> None:
    """Raise ShapeError unless the mask is of the rows of x."""
    if x.shape[:-1] != mask.shape:
        raise ShapeError(
            f"the padding mask is {shape_text(mask.shape)}, but a row-mixing layer got {shape_text(x.shape)}: it "
            "cannot be told which rows are padding, or where documents end. Keep that layer dense (filter_fn) or use "
            "mixing='none'"
        )


def _ask(x: Tensor, key: str) -> Tensor:
    real = calls.resolve(key, traced=True)
    if real is None:
        return x.new_ones(x.shape[:-1], dtype=torch.long)
    check_describes(real, x)
    return real.long().clone()


_library.impl("real_rows", _ask, "CompositeExplicitAutograd")


@torch.library.register_fake("strassen_tile::real_rows")  # type: ignore[untyped-decorator]
def _ask_shape(x: Tensor, key: str) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.long)
