"""`stl_linear` and `stl_matmul`: validate, dispatch.

Requires: all tensors on one device and of one dtype (under autocast, floating-point ones are cast as for `F.linear`).
Backends: "cpu" (CPU tensors), "triton" (CUDA tensors, a tile and dtype its kernels take), "reference" (any device; the
einsum definition, slow), "auto" (the fastest that can).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from strassen_tile.basis import Basis
from strassen_tile.errors import BackendError, ConfigError, ShapeError, shape_text
from strassen_tile.ops.cpu import panels as _panels  # noqa: F401 - registers the CPU's kernels
from strassen_tile.ops.cuda import passes as cuda
from strassen_tile.ops.gradients import encode
from strassen_tile.ops.linear import ACTIVATIONS, linear
from strassen_tile.tiling import as_samples, tile_count

Backend = Literal["auto", "reference", "cpu", "triton"]
Activation = Literal["none", "relu", "gelu", "gelu_tanh", "silu"]
Linear = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, int], Tensor]
_backends: dict[str, Linear] = {}


def register_backend(name: str, linear: Linear) -> None:
    """Make `linear(x, encoded_weight, encoder, decoder, bias, out_features)` the backend called `name`."""
    _backends[name] = linear


def stl_linear(
    x: Tensor,
    encoded_weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int | None = None,
    activation: Activation = "none",
    backend: Backend = "auto",
    recompute: bool = False,
) -> Tensor:
    """activation(Y + bias), Y_IL = Σ_k D_k · Σ_J ⟨E_k, X_IJ⟩ Ŵ[k, J, L]: the Strassen-Tile operator on an encoded weight.

    Args:
        x: (…, N, K). Tiles are cut along N and K; every leading index is a sample of its own, padded on its own.
        encoded_weight: Ŵ (r, ⌈K/q⌉, ⌈M/s⌉).
        encoder: E (r, p, q), or (⌈K/q⌉, r, p, q) for one a column tile.
        decoder: D (r, p, s), or (⌈M/s⌉, r, p, s) for one an output tile.
        bias: (M,) or None.
        out_features: M; by default a whole number of tiles, ⌈M/s⌉·s.
        activation: applied to the result, in inference as it is written: "none", "relu", "gelu", "gelu_tanh", "silu".
        backend: "auto" chooses; any other runs or raises.
        recompute: what a training step keeps for its backward pass beside the arguments. By default Ŷ (r/ps times the
            size of y) if the decoder learns; if True nothing, and the backward pass multiplies once more.

    Returns:
        (…, N, M), contiguous, of the dtype of x (of autocast's where that is on).

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit together.
        ConfigError: an unknown activation.
        BackendError: the named backend does not exist or cannot run these arguments.
    """
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if autocasting(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, encoded_weight, encoder, decoder = (
            a.to(dtype) if autocasts(a) else a for a in (x, encoded_weight, encoder, decoder)
        )
        bias = bias.to(dtype) if bias is not None and autocasts(bias) else bias
    columns = check(x, encoded_weight, encoder, decoder, bias, out_features)
    chosen = _choose(backend, x, encoder, decoder)
    if chosen is not None:
        return ACTIVATIONS[activation](chosen(x, encoded_weight, encoder, decoder, bias, columns))
    y = linear(as_samples(x), encoded_weight, encoder, decoder, bias, columns, activation, recompute=recompute)
    return y.view(*x.shape[:-1], columns)


def stl_matmul(x: Tensor, w: Tensor, basis: Basis, *, backend: Backend = "auto") -> Tensor:
    """X @ w by the bilinear algorithm of `basis`: equal if it is exact, an approximation otherwise.

    Args:
        x: (…, N, K); every leading index is a sample of its own.
        w: (K, M).
        basis: its factors are rounded to the dtype of x.
        backend: as for `stl_linear`.

    Returns:
        (…, N, M). Differentiable in x and w. An exact basis agrees with x @ w to about u·√(3·kappa) in relative norm,
        u the unit roundoff of the dtype.

    Raises:
        ShapeError: w is not a (K, M) matrix for this x, or dtypes or devices differ.
    """
    if w.ndim != 2 or x.ndim < 2 or x.shape[-1] != w.shape[0]:
        raise ShapeError(
            f"stl_matmul takes x (…, N, K) and w (K, M); got x {shape_text(x.shape)} and w {shape_text(w.shape)}"
        )
    if x.dtype != w.dtype and not autocasting(x):
        raise ShapeError(f"x and w must have one dtype; got {x.dtype} and {w.dtype}: convert one with .to(…)")
    if not (w.is_floating_point() or w.is_complex()):
        raise ShapeError(f"stl_matmul takes floating-point or complex tensors; got {w.dtype}")
    factors = (basis.encoder, basis.weight_encoder, basis.decoder)
    encoder, weight_encoder, decoder = (factor.to(w.device, w.dtype) for factor in factors)
    encoded_weight = encode(w.unsqueeze(0), weight_encoder)
    return stl_linear(x, encoded_weight, encoder, decoder, out_features=w.shape[1], backend=backend)


def autocasts(x: Tensor) -> bool:
    """Whether x is cast in a product under autocast, as `F.linear` would cast it: floating-point numbers, but for float64."""
    return autocasting(x) and x.is_floating_point() and x.dtype != torch.float64


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    if not torch._C._is_any_autocast_enabled():  # the usual case, at a fifth of the cost
        return False
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # "meta" has no autocast


def _choose(backend: str, x: Tensor, encoder: Tensor, decoder: Tensor) -> Linear | None:
    """The registered backend of that name; None for the operators of `ops`."""
    if backend == "auto":
        return None
    if backend == "cpu":
        if x.device.type != "cpu":
            raise BackendError(f"backend 'cpu' was asked for, but x is on {x.device}; move it or use backend='auto'")
        return None
    if backend == "triton":
        if (reason := cuda.refusal(x, encoder, decoder)) is not None:
            raise BackendError(f"backend 'triton' was asked for, but {reason}; or use backend='auto'")
        return None
    if backend in _backends:
        return _backends[backend]
    known = ", ".join(sorted({"auto", "cpu", "triton", *_backends}))
    raise BackendError(f"backend {backend!r} is not available; available here: {known}")


def check(
    x: Tensor, encoded_weight: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, out_features: int | None
) -> int:
    """M, once everything fits together."""
    if not (x.is_floating_point() or x.is_complex()):
        raise ShapeError(f"x must be floating-point or complex; got {x.dtype}: convert it with .to(…)")
    if x.ndim < 2:
        raise ShapeError(f"x must be (…, N, K) with at least two dimensions; got {shape_text(x.shape)}")
    if encoded_weight.ndim != 3:
        raise ShapeError(f"encoded_weight must be (r, ⌈K/q⌉, ⌈M/s⌉); got {shape_text(encoded_weight.shape)}")
    r, j, l = encoded_weight.shape  # noqa: E741 - the tile index L
    for name, factor, lead in (("encoder", encoder, j), ("decoder", decoder, l)):
        if factor.ndim not in (3, 4) or factor.shape[-3] != r or (factor.ndim == 4 and factor.shape[0] != lead):
            raise ShapeError(
                f"{name} must be (r, ·, ·) or ({lead}, r, ·, ·) with r = {r} as in encoded_weight "
                f"{shape_text(encoded_weight.shape)}; got {shape_text(factor.shape)}"
            )
    (p, q), (p_out, s), k = encoder.shape[-2:], decoder.shape[-2:], x.shape[-1]
    if p != p_out:
        raise ShapeError(f"encoder and decoder disagree on p: tiles of {p}×{q} in, {p_out}×{s} out")
    if tile_count(k, q) != j:
        raise ShapeError(
            f"x {shape_text(x.shape)} has K = {k} features, {tile_count(k, q)} tiles of {q}, but encoded_weight "
            f"{shape_text(encoded_weight.shape)} was made for {j}"
        )
    m = l * s if out_features is None else out_features
    if m < 0 or tile_count(m, s) != l:
        raise ShapeError(f"out_features = {m} needs {tile_count(m, s)} tiles of {s}, but encoded_weight has {l}")
    if bias is not None and (bias.ndim != 1 or bias.shape[0] != m):
        raise ShapeError(f"bias must be ({m},); got {shape_text(bias.shape)}")
    others = {"encoded_weight": encoded_weight, "encoder": encoder, "decoder": decoder, "bias": bias}
    for name, tensor in others.items():
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ShapeError(
                f"x is {x.dtype} on {x.device}, but {name} is {tensor.dtype} on {tensor.device}; use .to(…), or autocast"
            )
    return m
