"""Steps of a transformer block in a row, for inference: what lies between them need not reach memory.

norm_linear   linear(norm(x))
mlp           down(act(up(norm(x)))), or gated: down(act(gate(norm(x)))·up(norm(x)))

Where a gradient is to come, and on devices without kernels of their own, they are the steps one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from strassen_tile.ops import fused, library
from strassen_tile.ops.autograd import differentiable, forward_mode


class Weights(NamedTuple):
    """The tensors of one layer."""

    encoded_weight: Tensor
    encoder: Tensor
    decoder: Tensor
    bias: Tensor | None


class Norm(NamedTuple):
    """What comes before the first encode.

    Attributes:
        kind: "layer" (LayerNorm), "rms" (RMSNorm) or "none".
        scale, shift: (K,) each; None where the norm has none.
        eps: added to the variance, or to the mean square.
    """

    kind: str = "none"
    scale: Tensor | None = None
    shift: Tensor | None = None
    eps: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """The norm of x (…, K) over its features."""
        if self.kind == "none":
            return x
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], self.scale, self.shift, self.eps)
        y = F.rms_norm(x, x.shape[-1:], self.scale, self.eps)
        return y if self.shift is None else y + self.shift


def linear_by_steps(
    x: Tensor,
    norm: str,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    encoded_weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    columns: int,
    activation: str,
) -> Tensor:
    """`norm_linear`, differentiable in all tensors."""
    normed = Norm(norm, scale, shift, eps)(x)
    return fused.linear(normed, encoded_weight, encoder, decoder, bias, columns, activation)


def mlp_by_steps(
    x: Tensor,
    norm: str,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    up: Sequence[Tensor | None],
    gate: Sequence[Tensor | None],
    down: Sequence[Tensor | None],
    hidden: int,
    columns: int,
    activation: str,
) -> Tensor:
    """`mlp`, differentiable in all tensors."""
    x = Norm(norm, scale, shift, eps)(x)
    first, last = Weights(*up), Weights(*down)  # type: ignore[arg-type] # only the bias can be None
    if gate:
        gates = fused.linear(x, *Weights(*gate), hidden, activation)  # type: ignore[arg-type]
        between = gates * fused.linear(x, *first, hidden)
    else:
        between = fused.linear(x, *first, hidden, activation)
    return fused.linear(between, *last, columns)


def norm_linear(x: Tensor, norm: Norm, layer: Weights, columns: int, activation: str = "none") -> Tensor:
    """activation(linear(norm(x))): x (B, N, K) → (B, N, columns)."""
    if _by_steps(x, *norm[1:3], *layer):
        return linear_by_steps(x, *norm, *layer, columns, activation)
    return library.norm_linear(x, *norm, *layer, columns, activation)  # type: ignore[no-any-return]


def mlp(
    x: Tensor,
    up: Weights,
    down: Weights,
    hidden: int,
    columns: int,
    *,
    gate: Weights | None = None,
    norm: Norm | None = None,
    activation: str,
) -> Tensor:
    """X (B, N, K) → (B, N, columns) by way of `hidden` features; the activation is that of `gate` if there is one."""
    first, norm = gate or (), norm or Norm()
    if _by_steps(x, *norm[1:3], *up, *first, *down):
        return mlp_by_steps(x, *norm, up, first, down, hidden, columns, activation)
    return library.mlp(x, *norm, up, first, down, hidden, columns, activation)  # type: ignore[no-any-return]


def _by_steps(*tensors: Tensor | None) -> bool:
    return torch._C._are_functorch_transforms_active() or forward_mode() or fused.learns(*tensors)


for _operator, _function in ((library.norm_linear, linear_by_steps), (library.mlp, mlp_by_steps)):
    library.register_kernel(_operator, _function, "CompositeExplicitAutograd")
    library.register_kernel(_operator, differentiable(_function, _operator), "Autograd")
