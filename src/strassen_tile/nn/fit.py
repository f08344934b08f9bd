"""Ŵ for a dense weight: in closed form from the factors, and by least squares on calibration inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from strassen_tile.basis import Basis
from strassen_tile.errors import ConfigError, ShapeError, shape_text
from strassen_tile.ops.gradients import decode, encode
from strassen_tile.tiling import as_integer, as_samples, to_tiles

_RIDGE = 1e-6  # of the mean diagonal: keeps Ŵ bounded where random terms are nearly dependent
_BLOCK = 2**16  # entries of a weight that are widened to float64 at a time
_CHUNK = 2**24  # entries of Gram matrices at a time


def check_calibration(inputs: object, rounds: object, features: int) -> None:
    """Refuse inputs that nothing can be fitted to, with a ShapeError, and rounds that cannot be done, with a ConfigError."""
    count = as_integer(rounds)
    if count is None or count < 0:
        raise ConfigError(f"rounds must be an integer of 0 or more; got {rounds!r}")
    if inputs is None:
        return
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.is_meta:
        kind = f"{inputs.dtype} on {inputs.device}" if isinstance(inputs, Tensor) else type(inputs)
        raise ShapeError(f"inputs must be a tensor of real floating-point numbers; got {kind}")
    if inputs.ndim < 2 or inputs.shape[-1] != features:
        raise ShapeError(f"inputs must be (…, N, {features}); got {shape_text(inputs.shape)}")
    if not math.isfinite(mean_square(inputs.detach().reshape(math.prod(inputs.shape[:-1]), features))):
        raise ShapeError(
            "inputs hold NaN, infinity, or numbers whose squares overflow float64: nothing can be fitted to them"
        )


def mean_square(weight: Tensor) -> float:
    """Of all entries, summed in float64, a block of rows at a time."""
    sums = [block.double().square().sum() for block in weight.split(_rows_a_block(weight))] if weight.numel() else []
    return float(sum(sums)) / max(1, weight.numel())


def encode_weight_into(
    encoded: Tensor, weight: Tensor, encoder: Tensor, decoder: Tensor, basis: Basis | None = None
) -> None:
    """`encode_weight` in float64 into `encoded`, of any dtype, a block of column tiles at a time."""
    q = encoder.shape[-1]
    tiles = max(1, _rows_a_block(weight) // q)
    for first in range(0, encoded.shape[1], tiles):
        part = slice(first, first + tiles)
        block = weight[first * q : (first + tiles) * q].double()
        encoded[:, part] = encode_weight(block, encoder[part] if encoder.ndim == 4 else encoder, decoder, basis)


def _rows_a_block(weight: Tensor) -> int:
    return max(1, _BLOCK // max(1, weight.shape[1]))


def encode_weight(weight: Tensor, encoder: Tensor, decoder: Tensor, basis: Basis | None = None) -> Tensor:
    """Ŵ (r, J, L) that makes the layer closest to `weight` on Gaussian inputs.

    With a `basis` it is Ŵ[k] = ⟨F_k, W_JL⟩. Otherwise the least-squares weight encoder for E_J and D_L is applied:
    Ŵ_JL = (G_E ∘ G_D)⁻¹ h with h_k = ⟨E_kᵀ D_k, W_JL⟩, the normal equations of ‖W_JL − Σ_k Ŵ_k E_kᵀ D_k‖ summed over
    the rows of a tile.

    Args:
        weight: (K, M) in maths, that is `linear.weight.T`.
        encoder: (r, p, q) or (J, r, p, q).
        decoder: (r, p, s) or (L, r, p, s).
        basis: whose factors E and D are, if they are one's.
    """
    if basis is not None:
        return encode(weight.unsqueeze(0), basis.weight_encoder.to(weight.device, weight.dtype))
    (r, _, q), s = encoder.shape[-3:], decoder.shape[-1]
    # A tile that hangs over the edge is fitted where the matrix is; what lies beyond is multiplied by zero or cut off.
    if ragged := weight.shape[0] % q:
        whole, edge = weight.split([weight.shape[0] - ragged, ragged], dim=0)
        first, last = (encoder[:-1], encoder[-1:]) if encoder.ndim == 4 else (encoder, encoder)
        parts = encode_weight(whole, first, decoder), encode_weight(edge, last[..., :ragged], decoder)
        return torch.cat(parts, dim=1)
    if ragged := weight.shape[1] % s:
        whole, edge = weight.split([weight.shape[1] - ragged, ragged], dim=1)
        first, last = (decoder[:-1], decoder[-1:]) if decoder.ndim == 4 else (decoder, decoder)
        parts = encode_weight(whole, encoder, first), encode_weight(edge, encoder, last[..., :ragged])
        return torch.cat(parts, dim=2)
    tiles = to_tiles(weight, q, s)  # (J, L, q, s)
    columns, outputs = tiles.shape[:2]
    if not tiles.numel():
        return weight.new_zeros(r, columns, outputs)
    e = encoder.expand(columns, *encoder.shape[-3:]) if encoder.ndim == 3 else encoder
    d = decoder.expand(outputs, *decoder.shape[-3:]) if decoder.ndim == 3 else decoder
    gram_d = d.flatten(2) @ d.flatten(2).mT
    shared = encoder.ndim == 3 and decoder.ndim == 3
    encoded = weight.new_empty(columns, outputs, r)
    step = max(1, _CHUNK // max(1, outputs * r * r))
    for start in range(0, columns, step):
        part = slice(start, start + step)
        target = torch.einsum("jkaq,lkas,jlqs->jlk", e[part], d, tiles[part])
        gram_e = e[part].flatten(2) @ e[part].flatten(2).mT
        gram = gram_e[:1] * gram_d[:1] if shared else gram_e[:, None] * gram_d[None]
        ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
        gram = gram + ridge * torch.eye(r, dtype=gram.dtype, device=gram.device)
        if shared:  # one system, many right-hand sides
            encoded[part] = torch.linalg.solve(gram[0], target.flatten(0, 1).mT).mT.reshape(target.shape)
        else:
            encoded[part] = torch.linalg.solve(gram, target.unsqueeze(-1)).squeeze(-1)
    return encoded.permute(2, 0, 1).contiguous()


def calibrate(
    inputs: Tensor, weight: Tensor, encoder: Tensor, decoder: Tensor, start: Tensor, *, iterations: int = 100
) -> Tensor:
    """Ŵ that minimises ‖layer(x) − x @ weight‖ over calibration inputs, from `start`, by conjugate gradients.

    The columns of output tiles are separate least-squares problems with one matrix A: (r·J) unknowns each. A and its
    transpose are the operator's own encode, products and decode, so no matrix is formed and any size fits; where the
    inputs leave Ŵ undetermined it stays as close to `start` as it was (CGLS, Björck 1996, §7.4).

    Args:
        inputs: (…, N, K) calibration activations.
        weight: (K, M) in maths.
        encoder, decoder: fixed.
        start: (r, J, L).
        iterations: at most; fewer when every problem's gradient has fallen by 1e-6.
    """
    x = as_samples(inputs)
    target = x @ weight
    encoded_input = encode(x, encoder)

    def apply(encoded_weight: Tensor) -> Tensor:
        return decode(torch.bmm(encoded_input, encoded_weight), decoder, *target.shape)

    def transposed(residual: Tensor) -> Tensor:
        return torch.bmm(encoded_input.mT, encode(residual, decoder))

    def energy(y: Tensor) -> Tensor:  # ‖·‖² of each output tile's problem, (L,)
        return torch.stack([tile.square().sum() for tile in y.split(decoder.shape[-1], dim=-1)])

    solution = start.clone()
    residual = target - apply(solution)
    gradient = transposed(residual)
    direction = gradient
    norm = gradient.square().sum(dim=(0, 1))
    first = norm
    for _ in range(iterations):
        if bool((norm <= 1e-12 * first).all()):
            break
        image = apply(direction)
        step = norm / energy(image).clamp_min(torch.finfo(norm.dtype).tiny)
        solution = solution + step * direction
        columns = step.repeat_interleave(decoder.shape[-1])[: image.shape[-1]]
        residual = residual - columns * image
        gradient = transposed(residual)
        previous, norm = norm, gradient.square().sum(dim=(0, 1))
        direction = gradient + norm / previous.clamp_min(torch.finfo(norm.dtype).tiny) * direction
    return solution
