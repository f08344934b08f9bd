"""The whole pass as one differentiable step, and what a training step keeps of it.

Without a gradient to come, `library.linear` may keep X̂ and Ŷ out of memory altogether. With one, Ŷ is kept where the
decoder learns, for its gradient; or, on request, nothing but the arguments. Gradients of gradients, those under
torch.func, and tangents go through the composed operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from strassen_tile.ops import composed, library
from strassen_tile.ops.autograd import differentiable, forward_mode


class Linear(Function):
    """decode(encode(x) @ Ŵ) + bias as one step; with `keep`, Ŷ is its second output, for the backward pass alone."""

    @staticmethod
    def forward(
        x: Tensor,
        encoded_weight: Tensor,
        encoder: Tensor,
        decoder: Tensor,
        bias: Tensor | None,
        columns: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        if keep:
            return library.linear_forward(x, encoded_weight, encoder, decoder, bias, columns)  # type: ignore[no-any-return]
        return library.linear(x, encoded_weight, encoder, decoder, bias, columns, "none"), x.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # or zeros as large as Ŷ would be made for it
        ctx.save_for_backward(*inputs[:4], output[1])
        ctx.keep = inputs[6]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        x, w, e, d, kept = ctx.saved_tensors
        wants = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled() or forward_mode():  # to be differentiated again
            gradients = composed.linear_backward(grad, x, w, e, d, None, wants)
        else:
            gradients = library.linear_backward(grad, x, w, e, d, kept if ctx.keep else None, wants)
        return (*(g if wanted else None for g, wanted in zip(gradients, wants, strict=True)), None, None)


def linear(
    x: Tensor,
    encoded_weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    columns: int,
    activation: str = "none",
    *,
    recompute: bool = False,
) -> Tensor:
    """activation(decode(encode(x) @ Ŵ) + bias): x (B, N, K) → (B, N, columns). Differentiable in all tensors.

    Without a gradient to come, the activation is applied as the output is written. Where the decoder will be asked for
    a gradient, Ŷ is kept for it (r/ps times the size of y), unless `recompute`: then the backward pass encodes and
    multiplies once more.
    """
    tensors = (x, encoded_weight, encoder, decoder, bias)
    if torch._C._are_functorch_transforms_active() or forward_mode():
        return composed.linear(*tensors, columns, activation)
    if not learns(*tensors):
        return library.linear(*tensors, columns, activation)  # type: ignore[no-any-return]
    keep = not recompute and decoder.requires_grad
    return composed.ACTIVATIONS[activation](Linear.apply(*tensors, columns, keep)[0])  # type: ignore[no-untyped-call]


def learns(*tensors: Tensor | None) -> bool:
    """Whether a gradient of any of them may be asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _forward(
    x: Tensor, encoded_weight: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, columns: int
) -> tuple[Tensor, Tensor]:
    if torch._C._are_functorch_transforms_active() or forward_mode():
        return composed.linear_forward(x, encoded_weight, encoder, decoder, bias, columns)
    return Linear.apply(x, encoded_weight, encoder, decoder, bias, columns, True)  # type: ignore[no-any-return, no-untyped-call]


def _backward(
    grad: Tensor,
    x: Tensor,
    encoded_weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    kept: Tensor | None,
    wants: Sequence[bool],
) -> tuple[Tensor, ...]:
    return composed.linear_backward(grad, x, encoded_weight, encoder, decoder, None, wants)


for _operator, _function in (
    (library.linear, linear),
    (library.linear_forward, _forward),  # what an exported training forward calls
    (library.linear_backward, _backward),
):
    library.register_kernel(_operator, differentiable(_function, _operator), "Autograd")
