"""Products in fp8 (e4m3), for inference: X̂ and Ŵ are rounded channel by channel, each channel by a scale of its own.

Ŵ[k] by its largest entry; X̂[k] by a bound of it, max|X|·‖E_k‖₁, so that nothing overflows and one maximum over X serves all
channels. That a bound is loose costs nothing: e4m3 has the same relative precision from 2⁻⁶ to 448.
Sums are float32, Ŷ and the rest are of the dtype of x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from strassen_tile.errors import BackendError
from strassen_tile.ops import fused, generic, library
from strassen_tile.tiling import tile_count

FP8, LARGEST = torch.float8_e4m3fn, 448.0
_ALIGNED = 16  # sides that fp8 products take


class Rounded(NamedTuple):
    """Ŵ in fp8.

    Attributes:
        values: (r, L, J), each channel transposed, as fp8 products want it; sides padded with zeros to multiples of 16.
        scale: (r,) float32: Ŵ[k] ≈ scale[k]·values[k]ᵀ.
    """

    values: Tensor
    scale: Tensor


def rounded(encoded_weight: Tensor) -> Rounded:
    """Ŵ (r, J, L), each channel in fp8."""
    r, j, l = encoded_weight.shape  # noqa: E741 - the tile index L
    scale = _scale(encoded_weight.abs().amax(dim=(1, 2)) if j * l else encoded_weight.new_zeros(r))
    values = encoded_weight.new_zeros(r, _aligned(l), _aligned(j), dtype=FP8)
    values[:, :l, :j] = (encoded_weight.float() / scale[:, None, None]).mT.to(FP8)
    return Rounded(values, scale)


def scale_of_input(x: Tensor, encoder: Tensor) -> Tensor:
    """Of each channel of X̂, (r,) float32: |X̂[k]| ≤ max|X|·‖E_k‖₁."""
    largest = torch.linalg.vector_norm(x, float("inf")) if x.numel() else x.new_zeros(())
    return _scale(largest.float() * encoder.float().abs().sum(dim=(1, 2)))


def encode(x: Tensor, encoder: Tensor, scale: Tensor) -> Tensor:
    """X̂/scale in fp8 (r, B·I, J), J padded with zeros to a multiple of 16."""
    encoded = generic.encode(x.float(), encoder.float()) / scale[:, None, None]
    values = empty_input(encoded.shape[0], encoded.shape[1], encoded.shape[2], x)
    values[:, :, : encoded.shape[2]] = encoded.to(FP8)
    return values


def empty_input(r: int, total: int, tiles: int, like: Tensor) -> Tensor:
    """Room for X̂ in fp8; what is beyond its tiles is zero."""
    width = _aligned(tiles)
    make = like.new_empty if width == tiles else like.new_zeros
    return make(r, total, width, dtype=FP8)


def products(encoded: Tensor, input_scale: Tensor, weight: Rounded, tiles: int, dtype: torch.dtype) -> Tensor:
    """Ŷ (r, B·I, L) of L = `tiles` columns: r products, one after the other, since fp8 has no batched one."""
    (r, total, _), width = encoded.shape, weight.values.shape[1]
    made = encoded.new_empty(r, total, width, dtype=dtype)
    for k in range(r if total * width else 0):
        torch._scaled_mm(
            encoded[k],
            weight.values[k].mT,
            scale_a=input_scale[k],
            scale_b=weight.scale[k],
            out_dtype=dtype,
            out=made[k],
        )
    return made[:, :, :tiles]


def linear(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    columns: int,
) -> Tensor:
    """`library.fp8_linear` where there are no kernels."""
    input_scale = scale_of_input(x, encoder)
    encoded = encode(x, encoder, input_scale)
    made = products(encoded, input_scale, Rounded(values, scale), tile_count(columns, decoder.shape[2]), x.dtype)
    y = generic.decode(made, decoder, x.shape[0], x.shape[1], columns)
    return y if bias is None else y + bias


def fp8_linear(
    x: Tensor, weight: Rounded, encoder: Tensor, decoder: Tensor, bias: Tensor | None, columns: int
) -> Tensor:
    """decode(encode(x) @ Ŵ) + bias with both factors of the products in fp8: x (B, N, K) → (B, N, columns).

    Raises:
        BackendError: a gradient would be asked for, or a GPU has no fp8.
    """
    if fused.learns(x, encoder, decoder, bias):
        raise BackendError(
            "products in fp8 are for inference: call under torch.no_grad(), or undo the quantisation to train"
        )
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        name = torch.cuda.get_device_name(x.device)
        raise BackendError(f"products in fp8 need an NVIDIA GPU of compute capability 8.9 or later; this is {name}")
    return library.fp8_linear(x, *weight, encoder, decoder, bias, columns)  # type: ignore[no-any-return]


def _scale(largest: Tensor) -> Tensor:
    return (largest.float() / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


library.register_kernel(library.fp8_linear, linear, "CompositeExplicitAutograd")
