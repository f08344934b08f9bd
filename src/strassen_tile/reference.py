"""The definition, in einsum: what every other path is tested against.

Y_IL = Σ_k D_k · Σ_J ⟨E_k, X_IJ⟩⟨F_k, W_JL⟩ (Ailon et al. 2025, arXiv 2503.12211, eq. 2). Requires: one dtype and
device for all arguments; any dtype einsum takes, float64 and complex included. Differentiable through autograd.
"""

from __future__ import annotations

from torch import Tensor, einsum

from strassen_tile.basis import Basis
from strassen_tile.tiling import from_tiles, to_tiles


def encode(x: Tensor, encoder: Tensor) -> Tensor:
    """X̂[k, …, I, J] = ⟨E_k, X_IJ⟩ for x (…, N, K) and encoder (r, p, q), or (J, r, p, q) for one encoder a column tile."""
    tiles = to_tiles(x, *encoder.shape[-2:])
    return einsum("...ijab,kab->k...ij" if encoder.ndim == 3 else "...ijab,jkab->k...ij", tiles, encoder)


def decode(encoded: Tensor, decoder: Tensor, rows: int, columns: int) -> Tensor:
    """Y_IL = Σ_k Ŷ[k, …, I, L] D_k for decoder (r, p, s), or (L, r, p, s); (…, rows, columns) with the padding cut."""
    tiles = einsum("k...il,kab->...ilab" if decoder.ndim == 3 else "k...il,lkab->...ilab", encoded, decoder)
    return from_tiles(tiles, rows, columns)


def stl_linear(
    x: Tensor,
    encoded_weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int | None = None,
) -> Tensor:
    """X (…, N, K), encoded_weight (r, ⌈K/q⌉, ⌈M/s⌉) → (…, N, M); arguments as in `strassen_tile.stl_linear`."""
    columns = encoded_weight.shape[-1] * decoder.shape[-1] if out_features is None else out_features
    products = einsum("k...ij,kjl->k...il", encode(x, encoder), encoded_weight)
    y = decode(products, decoder, x.shape[-2], columns)
    return y if bias is None else y + bias


def stl_matmul(x: Tensor, w: Tensor, basis: Basis) -> Tensor:
    """X (…, N, K), w (K, M) → (…, N, M); the basis is rounded to the dtype of x."""
    factors = (basis.encoder, basis.weight_encoder, basis.decoder)
    encoder, weight_encoder, decoder = (factor.to(x.device, x.dtype) for factor in factors)
    return stl_linear(x, encode(w, weight_encoder), encoder, decoder, out_features=w.shape[-1])
