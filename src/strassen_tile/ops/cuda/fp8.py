"""Products in fp8 (e4m3), for inference: X̂ and Ŵ are rounded with a scale for each channel, and X̂ for each tile row.

    Ŵ[k] = weight scale[k] · values[k]ᵀ                  by the largest entry of the channel
    X̂[k, I] = encoder scale[k] · row scale[I] · values   by a bound, max|X_I|·‖E_k‖₁ over the p rows of tile row I

A bound, so that nothing overflows and one maximum a row serves all channels; that it is loose costs nothing, e4m3 having the
same relative precision from 2⁻⁶ to 448. By tile row, so that no sample, and no row beyond a tile, changes what another one
is rounded to. What is not finite stays in its place likewise: a row of x with a NaN spoils its tile row, a NaN in Ŵ the
columns of its output tile, as without fp8.

Row scales and the largest weight leave the products and come back as Y is decoded. Still Ŷ may be J·‖E_k‖₁·448, more than
float16 holds: for float16 it is kept in float32, twice the bytes. Sums are float32, and so is Y until its bias is added.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from strassen_tile.errors import BackendError, ShapeError
from strassen_tile.ops import eager, schemas
from strassen_tile.ops.gradients import below_autograd, forward_mode, learns
from strassen_tile.tiling import tile_count

FP8, LARGEST = torch.float8_e4m3fn, 448.0
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNED = 16  # sides that fp8 products take


class Rounded(NamedTuple):
    """Ŵ in fp8, and all scales that do not depend on x.

    Attributes:
        values: (r, L, J), each channel transposed, as fp8 products want it; sides padded with zeros to multiples of 16.
        scale: (r,) float32, of each channel as a part of the largest.
        largest: () float32, the largest scale: Ŵ[k] ≈ largest · scale[k] · values[k]ᵀ.
        encoder_scale: (r,) float32, that of X̂[k] where max|X_I| is 1.
    """

    values: Tensor
    scale: Tensor
    largest: Tensor
    encoder_scale: Tensor


def rounded(encoded_weight: Tensor, encoder: Tensor) -> Rounded:
    """Ŵ (r, J, L), each channel in fp8, for an encoder (r, p, q)."""
    r, j, l = encoded_weight.shape  # noqa: E741 - the tile index L
    wide = encoded_weight.float()
    wide = wide.where(wide.isfinite(), torch.nan)  # fp8 has no infinity
    scale = _scale(wide.nan_to_num().abs().amax(dim=(1, 2)) if j * l else wide.new_zeros(r))
    values = encoded_weight.new_zeros(r, _aligned(l), _aligned(j), dtype=FP8)
    values[:, :l, :j] = (wide / scale[:, None, None]).mT.to(FP8)
    largest = scale.amax()
    return Rounded(values, scale / largest, largest, _scale(encoder.float().abs().sum(dim=(1, 2))))


def scale_of_rows(x: Tensor, p: int) -> Tensor:
    """max|X_I| over the p rows of each tile row, (B·I,) float32. Not zero, so that it can be divided by."""
    largest = torch.linalg.vector_norm(x, float("inf"), dim=2) if x.shape[2] else x.new_zeros(x.shape[:2])
    beyond = -x.shape[1] % p
    row_scale = F.pad(largest, (0, beyond)).view(-1, p) if largest.numel() else largest.view(0, p)
    return row_scale.amax(dim=1).float().clamp_min(torch.finfo(torch.float32).tiny)


def power_of(rows: Tensor) -> Tensor:
    """The largest power of two in each: x is divided by it before it is encoded, which is exact, and cannot overflow then."""
    return (rows.view(torch.int32) & 0x7F800000).view(torch.float32)


def scale_of_result(rows: Tensor, largest: Tensor) -> Tensor:
    """√(rows·largest): to be multiplied by twice, since the product itself may be beyond float32 though the result is not."""
    return rows.sqrt() * largest.sqrt()


def encode(x: Tensor, encoder: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    """X̂/(scale·rows) in fp8 (r, B·I, J), J padded with zeros to a multiple of 16."""
    power, p = power_of(rows), encoder.shape[1]
    encoded = eager.encode(x.float() / of_rows(power, x, p), encoder.float())
    encoded = encoded / (rows / power)[:, None] / scale[:, None, None]
    r, total, tiles = encoded.shape
    values = empty_input(r, total, tiles, x)
    values[:, :, : encoded.shape[2]] = encoded.to(FP8)
    return values


def of_rows(row_scale: Tensor, x: Tensor, p: int) -> Tensor:
    """A number a tile row (B·I,) as one for each row of x (B, N, K): (B, N, 1)."""
    batch, n, _ = x.shape
    return row_scale.view(batch, tile_count(n, p)).repeat_interleave(p, dim=1)[:, :n, None]


def empty_input(r: int, total: int, tiles: int, like: Tensor) -> Tensor:
    """Room for X̂ in fp8; what is beyond its tiles is zero."""
    width = _aligned(tiles)
    make = like.new_empty if width == tiles else like.new_zeros
    return make(r, total, width, dtype=FP8)


def products(encoded: Tensor, weight: Rounded, tiles: int, dtype: torch.dtype) -> Tensor:
    """Ŷ (r, B·I, L) of L = `tiles` columns, by r products in turn; to be multiplied by the row scales and `weight.largest`.

    Of `dtype`, or of float32 where that is float16.
    """
    (r, total, shared), width = encoded.shape, weight.values.shape[1]
    dtype = torch.float32 if dtype == torch.float16 else dtype
    if not shared:
        return encoded.new_zeros(r, total, tiles, dtype=dtype)
    made = encoded.new_empty(r, total, width, dtype=dtype)
    for k in range(r if total * width else 0):
        torch._scaled_mm(
            encoded[k],
            weight.values[k].mT,
            scale_a=weight.encoder_scale[k],
            scale_b=weight.scale[k],
            out_dtype=dtype,
            out=made[k],
            use_fast_accum=True,  # on Hopper; usual in inference
        )
    return made[:, :, :tiles]


def linear(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    largest: Tensor,
    encoder_scale: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    columns: int,
) -> Tensor:
    """`schemas.fp8_linear` where there are no kernels."""
    batch, n, _ = x.shape
    p, s = decoder.shape[1:]
    rows = scale_of_rows(x, p)
    encoded = encode(x, encoder, encoder_scale, rows)
    made = products(encoded, Rounded(values, scale, largest, encoder_scale), tile_count(columns, s), x.dtype)
    back = of_rows(scale_of_result(rows, largest), x, p)
    y = eager.decode(made.float(), decoder.float(), batch, n, columns) * back * back
    return (y if bias is None else y + bias).to(x.dtype)


def fp8_linear(
    x: Tensor, weight: Rounded, encoder: Tensor, decoder: Tensor, bias: Tensor | None, columns: int
) -> Tensor:
    """decode(encode(x) @ Ŵ) + bias with both factors of the products in fp8: x (B, N, K) → (B, N, columns).

    Raises:
        ShapeError: x is not float32, bfloat16 or float16.
        BackendError: a gradient would be asked for, a GPU has no fp8, or `weight` is not in it.
    """
    if x.dtype not in _DTYPES:
        raise ShapeError(
            f"products in fp8 take x in float32, bfloat16 or float16; got {x.dtype}: convert it with .to(…)"
        )
    if weight.values.dtype != FP8:
        raise BackendError(f"the rounded weight must be {FP8}; got {weight.values.dtype}: quantise the layer again")
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        name = torch.cuda.get_device_name(x.device)
        raise BackendError(f"products in fp8 need an NVIDIA GPU of compute capability 8.9 or later; this is {name}")
    if torch._C._are_functorch_transforms_active():
        raise BackendError("products in fp8 are for inference, not for torch.func")
    return schemas.fp8_linear(x, *weight, encoder, decoder, bias, columns)  # type: ignore[no-any-return]


def _refusing(x: Tensor, *arguments: Any) -> Tensor:
    tensors = [a for a in (x, *arguments) if isinstance(a, Tensor)]
    if learns(*tensors):
        raise BackendError(
            "products in fp8 are for inference: call under torch.no_grad(), or undo the quantisation to train"
        )
    if forward_mode() and any(forward_ad.unpack_dual(a).tangent is not None for a in tensors):
        raise BackendError("products in fp8 are for inference and carry no tangents: undo the quantisation for jvp")
    with below_autograd():
        return schemas.fp8_linear(x, *arguments)  # type: ignore[no-any-return]


def _scale(largest: Tensor) -> Tensor:
    return (largest.float() / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


schemas.register_kernel(schemas.fp8_linear, linear, "CompositeExplicitAutograd")
schemas.register_kernel(schemas.fp8_linear, _refusing, "Autograd")
