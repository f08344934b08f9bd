"""The whole pass, activation(decode(encode(x) @ Ŵ) + bias): composed of the primitives, and as one differentiable function.

Requires: as `ops/eager.py`. With dY given and X̂ = encode(X, E), Ŷ = X̂ Ŵ, Y = decode(Ŷ, D) + bias:

    dŶ = encode(dY, D)    dŴ = X̂ᴴ dŶ    dX̂ = dŶ Ŵᴴ    dX = decode(dX̂, E)    dE = correlate(X, dX̂)
    dD = correlate(dY, Ŷ)    dbias = Σ dY

conjugates as in `ops/gradients.py`. Of the forward pass only Ŷ is worth keeping: to encode again is cheaper than to store.
A device that can keep X̂ and Ŷ out of memory brings passes of its own; `composed` ones serve the others, and wherever a pass is
differentiated again, under torch.func, or carries tangents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from strassen_tile.ops import schemas
from strassen_tile.ops.gradients import below_autograd, correlate, decode, encode, forward_mode, learns
from strassen_tile.tiling import tile_count

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def linear(
    x: Tensor,
    encoded_weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    columns: int,
    activation: str = "none",
    recompute: bool = False,
) -> Tensor:
    """activation(decode(encode(x) @ Ŵ) + bias): x (B, N, K) → (B, N, columns). Differentiable in all tensors.

    Without a gradient to come, the activation is applied as the output is written. Where the decoder will be asked for
    a gradient, Ŷ is kept for it (r/ps times the size of y), unless `recompute`: then the backward pass encodes and
    multiplies once more.
    """
    if transformed():
        return composed(x, encoded_weight, encoder, decoder, bias, columns, activation)
    if learns(x, encoded_weight, encoder, decoder, bias):
        keep = not recompute and decoder.requires_grad
        y: Tensor = Linear.apply(x, encoded_weight, encoder, decoder, bias, columns, keep)  # type: ignore[no-untyped-call]
        return y if activation == "none" else ACTIVATIONS[activation](y)
    with below_autograd():
        return schemas.linear(x, encoded_weight, encoder, decoder, bias, columns, activation)  # type: ignore[no-any-return]


def transformed() -> bool:
    """Whether `torch.func` transforms are on, or tangents may be on their way."""
    return torch._C._are_functorch_transforms_active() or forward_mode()


class Linear(Function):
    """The pass without an activation. Never under torch.func, so that `forward` may keep what it likes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        encoded_weight: Tensor,
        encoder: Tensor,
        decoder: Tensor,
        bias: Tensor | None,
        columns: int,
        keep: bool,
    ) -> Tensor:
        kept = None
        with below_autograd():
            if keep:
                y, kept = schemas.linear_forward(x, encoded_weight, encoder, decoder, bias, columns)
            else:
                y = schemas.linear(x, encoded_weight, encoder, decoder, bias, columns, "none")
        ctx.save_for_backward(x, encoded_weight, encoder, decoder, kept)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, e, d, kept = ctx.saved_tensors
        wants = ctx.needs_input_grad[:5]
        again = torch.is_grad_enabled() or forward_mode()  # it is to be differentiated
        backward = composed_backward if again else schemas.linear_backward
        gradients = backward(grad, x, w, e, d, None if again else kept, wants)
        return (*(g if wanted else None for g, wanted in zip(gradients, wants, strict=True)), None, None)


def composed(
    x: Tensor,
    encoded_weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    columns: int,
    activation: str = "none",
) -> Tensor:
    """`linear`, primitive by primitive."""
    return ACTIVATIONS[activation](composed_forward(x, encoded_weight, encoder, decoder, bias, columns)[0])


def composed_forward(
    x: Tensor, encoded_weight: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, columns: int
) -> tuple[Tensor, Tensor]:
    """The pass without an activation, and Ŷ's r·B·I·L numbers in an order that the device's backward pass knows."""
    products = torch.bmm(encode(x, encoder), encoded_weight)
    y = decode(products, decoder, x.shape[0], x.shape[1], columns)
    return y if bias is None else y + bias, products.view(products.numel())


def composed_backward(
    grad: Tensor,
    x: Tensor,
    encoded_weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    kept: Tensor | None,
    wants: Sequence[bool],
) -> tuple[Tensor, ...]:
    """dX, dŴ, dE, dD and dbias, an empty tensor for each that `wants` does not name. Without `kept`, Ŷ is made anew."""
    wants_x, wants_weight, wants_encoder, wants_decoder, wants_bias = wants
    (p, q), s = encoder.shape[-2:], decoder.shape[-1]
    dx, dw, de, dd, db = (x.new_empty(0) for _ in wants)  # outputs of an operator must not be one tensor
    encoded = encode(x, encoder) if wants_weight or (wants_decoder and kept is None) else x
    if wants_x or wants_weight or wants_encoder:
        grad_products = encode(grad, decoder.conj())
        if wants_x or wants_encoder:
            grad_encoded = torch.bmm(grad_products, encoded_weight.mH)
            dx = decode(grad_encoded, encoder.conj(), *x.shape) if wants_x else dx
            de = correlate(x.conj(), grad_encoded, (p, q), encoder.ndim == 4) if wants_encoder else de
        dw = torch.bmm(encoded.mH, grad_products) if wants_weight else dw
    if wants_decoder:
        r, _, l = encoded_weight.shape  # noqa: E741 - the tile index L
        rows = x.shape[0] * tile_count(x.shape[1], p)
        products = torch.bmm(encoded, encoded_weight) if kept is None else kept.view(r, rows, l)
        dd = correlate(grad, products.conj(), (p, s), decoder.ndim == 4)
    return dx, dw, de, dd, grad.sum(dim=(0, 1)) if wants_bias else db


def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """`schemas.linear_forward`, which a training pass that was exported calls, with its gradients."""
    if transformed() or learns(x, *arguments[:4]):
        return composed_forward(x, *arguments)
    with below_autograd():
        return schemas.linear_forward(x, *arguments)  # type: ignore[no-any-return]


def _backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    if transformed() or learns(grad, *arguments[:5]):
        x, w, e, d, _, wants = arguments
        return composed_backward(grad, x, w, e, d, None, wants)
    with below_autograd():
        return schemas.linear_backward(grad, *arguments)  # type: ignore[no-any-return]


for _operator, _composed, _differentiable in (
    (schemas.linear, composed, linear),
    (schemas.linear_forward, composed_forward, _forward),
    (schemas.linear_backward, composed_backward, _backward),
):
    schemas.register_kernel(_operator, _composed, "CompositeExplicitAutograd")
    schemas.register_kernel(_operator, _differentiable, "Autograd")
