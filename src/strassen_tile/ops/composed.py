"""Whole passes composed of the operators: what runs where a device has no fused ones, and what is differentiable again.

Requires: as `ops/generic.py`. With dY given and X̂ = encode(X, E), Ŷ = X̂ Ŵ, Y = decode(Ŷ, D) + bias:

    dŶ = encode(dY, D)    dŴ = X̂ᴴ dŶ    dX̂ = dŶ Ŵᴴ    dX = decode(dX̂, E)    dE = correlate(X, dX̂)
    dD = correlate(dY, Ŷ)    dbias = Σ dY

conjugates as in `ops/autograd.py`. Of the forward pass only Ŷ is worth keeping: to encode again is cheaper than to store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from strassen_tile.ops import library
from strassen_tile.ops.autograd import correlate, decode, encode
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
) -> Tensor:
    """activation(decode(encode(x) @ Ŵ) + bias): (B, N, columns)."""
    return ACTIVATIONS[activation](linear_forward(x, encoded_weight, encoder, decoder, bias, columns)[0])


def linear_forward(
    x: Tensor, encoded_weight: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, columns: int
) -> tuple[Tensor, Tensor]:
    """`linear` without an activation, and Ŷ's r·B·I·L numbers in an order that the device's `linear_backward` knows."""
    products = torch.bmm(encode(x, encoder), encoded_weight)
    y = decode(products, decoder, x.shape[0], x.shape[1], columns)
    return y if bias is None else y + bias, products.view(products.numel())


def linear_backward(
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


for _operator, _kernel in (
    (library.linear, linear),
    (library.linear_forward, linear_forward),
    (library.linear_backward, linear_backward),
):
    library.register_kernel(_operator, _kernel, "CompositeExplicitAutograd")
