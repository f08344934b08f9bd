"""Two layers with an activation between them, as transformers have them, as one step.

mlp      down(act(up(x)))
gated    down(act(gate(x))·up(x)), gate and up being one layer of twice the width: one encode serves both
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from strassen_tile.ops import fused, library
from strassen_tile.ops.autograd import differentiable
from strassen_tile.ops.composed import ACTIVATIONS


class Weights(NamedTuple):
    """The tensors of one layer."""

    encoded_weight: Tensor
    encoder: Tensor
    decoder: Tensor
    bias: Tensor | None


def two_passes(
    x: Tensor,
    up: Tensor,
    up_encoder: Tensor,
    up_decoder: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_encoder: Tensor,
    down_decoder: Tensor,
    down_bias: Tensor | None,
    hidden: int,
    columns: int,
    activation: str,
    gated: bool,
) -> Tensor:
    """X (B, N, K) → (B, N, columns) by way of `hidden` features, layer by layer. Differentiable in all tensors."""
    first = Weights(up, up_encoder, up_decoder, up_bias)
    if gated:
        gate, value = fused.linear(x, *first, 2 * hidden).chunk(2, dim=-1)
        between = ACTIVATIONS[activation](gate) * value
    else:
        between = fused.linear(x, *first, hidden, activation)
    return fused.linear(between, down, down_encoder, down_decoder, down_bias, columns)


def mlp(
    x: Tensor, up: Weights, down: Weights, hidden: int, columns: int, *, activation: str, gated: bool = False
) -> Tensor:
    """As `two_passes`; without a gradient to come, a device may keep what lies between out of memory."""
    if torch._C._are_functorch_transforms_active() or fused.learns(x, *up, *down):
        return two_passes(x, *up, *down, hidden, columns, activation, gated)
    return library.mlp(x, *up, *down, hidden, columns, activation, gated)  # type: ignore[no-any-return]


library.register_kernel(library.mlp, two_passes, "CompositeExplicitAutograd")
library.register_kernel(library.mlp, differentiable(two_passes, library.mlp), "Autograd")
