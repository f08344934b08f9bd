"""Gradients and vmap rules of the operators, each made of the others.

With Y = decode(Ŷ, D) and X̂ = encode(X, E):  dX = decode(dX̂, E),  dE = correlate(X, dX̂),  dŶ = encode(dY, D),
dD = correlate(dY, Ŷ). Since backwards are built from these same functions, gradients of any order exist. Complex
arguments follow PyTorch's convention: the gradient of a·b in a is g·conj(b).

Forward-mode differentiation goes another way: a `jvp` here would break `torch.compile(fullgraph=True)`, so while it is on,
the same sums are done by `ops/eager.py` in PyTorch's own operators, which carry tangents.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from strassen_tile.ops import eager, schemas
from strassen_tile.tiling import tile_count


def forward_mode() -> bool:
    """Whether tangents may be on their way: in a `forward_ad.dual_level`, or under `torch.func.jvp` and what is made of it."""
    return forward_ad._current_level >= 0


def _map_samples(function: Callable[..., Tensor], info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    """Vmap by a loop over samples: for a batch of factors, which no kernel takes."""
    if info.batch_size == 0:  # the shape of a sample's result is still asked for
        one = (
            a.new_zeros(a.movedim(d, 0).shape[1:]) if d is not None else a for a, d in zip(args, in_dims, strict=True)
        )
        return torch.stack([function(*one)])[:0], 0
    return torch.stack([
        function(*(a.select(d, i) if d is not None else a for a, d in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]), 0  # fmt: skip


class Encode(Function):
    """(x (B, N, K), encoder (r, p, q) or (J, r, p, q)) → (r, B·I, J)."""

    @staticmethod
    def forward(x: Tensor, encoder: Tensor) -> Tensor:
        return schemas.encode(x, encoder)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, encoder = ctx.saved_tensors
        return (
            decode(grad, encoder.conj(), *x.shape) if ctx.needs_input_grad[0] else None,
            correlate(x.conj(), grad, encoder.shape[-2:], encoder.ndim == 4) if ctx.needs_input_grad[1] else None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, encoder: Tensor) -> tuple[Tensor, int]:
        if in_dims[1] is not None:
            return _map_samples(encode, info, in_dims, x, encoder)
        samples = x.movedim(in_dims[0], 0)
        rows = samples.shape[1] * tile_count(samples.shape[2], encoder.shape[-2])
        return encode(samples.flatten(0, 1), encoder).unflatten(1, (info.batch_size, rows)), 1


class Decode(Function):
    """(encoded (r, B·I, L), decoder (r, p, s) or (L, r, p, s), B, N, M) → (B, N, M)."""

    @staticmethod
    def forward(encoded: Tensor, decoder: Tensor, batch: int, rows: int, columns: int) -> Tensor:
        return schemas.decode(encoded, decoder, batch, rows, columns)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        encoded, decoder = ctx.saved_tensors
        per_column = decoder.ndim == 4
        return (
            encode(grad, decoder.conj()) if ctx.needs_input_grad[0] else None,
            correlate(grad, encoded.conj(), decoder.shape[-2:], per_column) if ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, encoded: Tensor, decoder: Tensor, batch: int, rows: int, columns: int
    ) -> tuple[Tensor, int]:
        if in_dims[1] is not None:
            return _map_samples(decode, info, in_dims, encoded, decoder, batch, rows, columns)
        samples = encoded.movedim(in_dims[0], 1).flatten(1, 2)
        y = decode(samples, decoder, info.batch_size * batch, rows, columns)
        return y.unflatten(0, (info.batch_size, batch)), 0


class Correlate(Function):
    """(x (B, N, K), encoded (r, B·I, J), (p, q), per_column) → (r, p, q) or (J, r, p, q)."""

    @staticmethod
    def forward(x: Tensor, encoded: Tensor, tile: tuple[int, int], per_column: bool) -> Tensor:
        return schemas.correlate(x, encoded, tile, per_column)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, encoded = ctx.saved_tensors
        return (
            decode(encoded.conj(), grad, *x.shape) if ctx.needs_input_grad[0] else None,
            encode(x.conj(), grad) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, x: Tensor, encoded: Tensor, tile: tuple[int, int], per_column: bool
    ) -> tuple[Tensor, int]:
        return _map_samples(correlate, info, (*in_dims[:2], None, None), x, encoded, tile, per_column)


def encode(x: Tensor, encoder: Tensor) -> Tensor:
    """X̂[k, I, J] = ⟨E_k, X_IJ⟩: x (B, N, K) → (r, B·I, J). Differentiable in both."""
    if forward_mode():
        return eager.encode(x, encoder)
    return Encode.apply(x, encoder)  # type: ignore[no-any-return, no-untyped-call]


def decode(encoded: Tensor, decoder: Tensor, batch: int, rows: int, columns: int) -> Tensor:
    """Y_IL = Σ_k Ŷ[k, I, L] D_k: encoded (r, B·I, L) → (batch, rows, columns). Differentiable in both tensors."""
    if forward_mode():
        return eager.decode(encoded, decoder, batch, rows, columns)
    return Decode.apply(encoded, decoder, batch, rows, columns)  # type: ignore[no-any-return, no-untyped-call]


def correlate(x: Tensor, encoded: Tensor, tile: tuple[int, int], per_column: bool) -> Tensor:
    """C_k = Σ_IJ X̂[k, I, J] X_IJ: (r, p, q), or (J, r, p, q) if per column tile. Differentiable in both tensors."""
    if forward_mode():
        return eager.correlate(x, encoded, tile, per_column)
    return Correlate.apply(x, encoded, tuple(tile), per_column)  # type: ignore[no-any-return, no-untyped-call]


def learns(*tensors: Tensor | None) -> bool:
    """Whether a gradient of any of them may be asked for."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def below_autograd() -> contextlib.AbstractContextManager[object]:
    """Inside, operators run without a look at gradients: the question has been answered. A graph being traced asks again."""
    return contextlib.nullcontext() if torch.compiler.is_dynamo_compiling() else torch._C._AutoDispatchBelowAutograd()


def _differentiable(function: Callable[..., Tensor], operator: Any) -> Callable[..., Tensor]:
    """What a primitive does under the Autograd key: a call through `torch.ops` has gradients and tangents too."""

    def kernel(*args: Any) -> Tensor:
        if forward_mode() or learns(*(a for a in args[:2])):
            return function(*args)
        with below_autograd():
            return operator(*args)  # type: ignore[no-any-return]

    return kernel


for _function, _operator in ((encode, schemas.encode), (decode, schemas.decode), (correlate, schemas.correlate)):
    schemas.register_kernel(_operator, _differentiable(_function, _operator), "Autograd")
