"""Layers of a transformer block fused, for inference: what lies between them need not reach memory.

norm_linear   linear(norm(x))
mlp           down(act(up(norm(x)))), or gated: down(act(gate(norm(x)))·up(norm(x)))

Where a gradient is to come, and on devices without kernels of their own, they are composed: one layer after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from strassen_tile.ops import schemas
from strassen_tile.ops.gradients import below_autograd, learns
from strassen_tile.ops.linear import linear, transformed


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


def composed_norm_linear(
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
    return linear(normed, encoded_weight, encoder, decoder, bias, columns, activation)


def composed_mlp(
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
        gates = linear(x, *Weights(*gate), hidden, activation)  # type: ignore[arg-type]
        between = gates * linear(x, *first, hidden)
    else:
        between = linear(x, *first, hidden, activation)
    return linear(between, *last, columns)


def norm_linear(x: Tensor, norm: Norm, layer: Weights, columns: int, activation: str = "none") -> Tensor:
    """activation(linear(norm(x))): x (B, N, K) → (B, N, columns)."""
    return _norm_linear(x, *norm, *layer, columns, activation)


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
    return _mlp(x, *(norm or Norm()), up, gate or (), down, hidden, columns, activation)


def _chosen(composed: Callable[..., Tensor], operator: Any) -> Callable[..., Tensor]:
    """`operator` if nothing learns and nothing is transformed, else what it is composed of."""

    def run(*arguments: Any) -> Tensor:
        tensors = (
            a for argument in arguments for a in (argument if isinstance(argument, list | tuple) else (argument,))
        )
        if transformed() or learns(*(t for t in tensors if isinstance(t, Tensor))):
            return composed(*arguments)
        with below_autograd():
            return operator(*arguments)  # type: ignore[no-any-return]

    return run


_norm_linear = _chosen(composed_norm_linear, schemas.norm_linear)
_mlp = _chosen(composed_mlp, schemas.mlp)

for _operator, _composed, _differentiable in (
    (schemas.norm_linear, composed_norm_linear, _norm_linear),
    (schemas.mlp, composed_mlp, _mlp),
):
    schemas.register_kernel(_operator, _composed, "CompositeExplicitAutograd")
    schemas.register_kernel(_operator, _differentiable, "Autograd")
