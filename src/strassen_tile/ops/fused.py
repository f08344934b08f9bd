"""The whole forward pass as one step, and what a training step keeps of it.

Without a gradient to come, `library.linear` may keep X̂ and Ŷ out of memory altogether. With one, the pass is composed of
the differentiable operators, which keep them; or, on request, only the arguments are kept and the rest is made anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from strassen_tile.ops import library
from strassen_tile.ops.autograd import correlate, decode, differentiable, encode, multiply


class Linear(Function):
    """decode(encode(x) @ Ŵ) + bias as one step that keeps only its arguments; the backward pass makes X̂ and Ŷ anew."""

    @staticmethod
    def forward(
        x: Tensor, encoded_weight: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, columns: int
    ) -> Tensor:
        return library.linear(x, encoded_weight, encoder, decoder, bias, columns)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, encoded_weight, encoder, decoder = ctx.saved_tensors
        wants_x, wants_weight, wants_encoder, wants_decoder, wants_bias, _ = ctx.needs_input_grad
        grad_products = encode(grad, decoder.conj())
        encoded = encode(x, encoder) if wants_weight or wants_decoder else None
        dx = de = dd = dw = None
        if wants_x or wants_encoder:
            grad_encoded = multiply(grad_products, encoded_weight.mH)
            dx = decode(grad_encoded, encoder.conj(), *x.shape) if wants_x else None
            de = correlate(x.conj(), grad_encoded, encoder.shape[-2:], encoder.ndim == 4) if wants_encoder else None
        if encoded is not None and wants_weight:
            dw = multiply(encoded.mH, grad_products)
        if encoded is not None and wants_decoder:
            products = multiply(encoded, encoded_weight).conj()
            dd = correlate(grad, products, decoder.shape[-2:], decoder.ndim == 4)
        return dx, dw, de, dd, grad.sum(dim=(0, 1)) if wants_bias else None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        *tensors, columns = args
        given = [i for i, tensor in enumerate(tensors) if tensor is not None]  # a bias may be missing

        def one(*sample: Tensor) -> Tensor:
            found: dict[int, Tensor] = dict(zip(given, sample, strict=True))
            return _compose(found[0], found[1], found[2], found[3], found.get(4), columns)

        mapped: Any = torch.func.vmap(one, in_dims=tuple(in_dims[i] for i in given))
        return mapped(*(tensors[i] for i in given)), 0


def linear(
    x: Tensor,
    encoded_weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    columns: int,
    *,
    recompute: bool,
) -> Tensor:
    """decode(encode(x) @ Ŵ) + bias: x (B, N, K) → (B, N, columns). Differentiable in all tensors.

    Where a gradient will be asked for, X̂ and Ŷ are kept for it (r/pq and r/ps times the size of x and y), unless
    `recompute`: then only the arguments are, and the backward pass encodes and multiplies once more.
    """
    tensors = (x, encoded_weight, encoder, decoder, bias)
    if recompute or not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return Linear.apply(*tensors, columns)  # type: ignore[no-any-return, no-untyped-call]
    return _compose(x, encoded_weight, encoder, decoder, bias, columns)


def _compose(
    x: Tensor, encoded_weight: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, columns: int
) -> Tensor:
    products = multiply(encode(x, encoder), encoded_weight)
    y = decode(products, decoder, x.shape[0], x.shape[1], columns)
    return y if bias is None else y + bias


library.register_kernel(library.linear, differentiable(Linear, library.linear), "Autograd")
