"""A short convolution over the rows of each sample, depthwise: each feature has taps of its own.

Y[n, k] = Σ_t W[k, t] X[n + t − before, k], rows outside the sample counted as zeros; with the residual X[n, k] besides. It is
linear in X and in W, and the gradient of each is made of the same two operators, so that gradients of any order exist.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

from strassen_tile.ops.cpu import taps as cpu
from strassen_tile.ops.gradients import _map_samples, below_autograd, forward_mode, learns

_library = torch.library.Library("strassen_tile", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define("taps(Tensor x, Tensor weight, SymInt before, bool residual) -> Tensor", tags=_tags)
_library.define("taps_correlate(Tensor grad, Tensor x, SymInt taps, SymInt before) -> Tensor", tags=_tags)


def convolve_rows(x: Tensor, weight: Tensor, before: int, *, residual: bool = True) -> Tensor:
    """X (B, N, K) convolved along its rows with weight (K, T), differentiably.

    Args:
        before: how many of the taps look back, from 0 to T − 1.
        residual: whether X itself is added.
    """
    if forward_mode() or x.is_complex() or weight.is_complex():
        return shifted_sum(x, weight, before, residual=residual)
    if torch._C._are_functorch_transforms_active() or learns(x, weight):
        return _Convolve.apply(x, weight, before, residual)  # type: ignore[no-any-return, no-untyped-call]
    with below_autograd():
        return torch.ops.strassen_tile.taps(x, weight, before, residual)  # type: ignore[no-any-return]


def shifted_sum(x: Tensor, weight: Tensor, before: int, *, residual: bool, same: Tensor | None = None) -> Tensor:
    """The same in PyTorch's own operators, tap by tap.

    Args:
        same: (B, N, T), which taps count in which rows; None: all.
    """
    n, taps = x.shape[-2], weight.shape[-1]
    rows = F.pad(x, (0, 0, before, taps - 1 - before))
    total = x if residual else torch.zeros_like(x)
    for tap in range(taps):
        seen = rows[..., tap : tap + n, :] * weight[:, tap]
        total = total + (seen if same is None else torch.where(same[..., tap : tap + 1], seen, 0))
    return total


def _convolve(x: Tensor, weight: Tensor, before: int, residual: bool) -> Tensor:
    if cpu.supports(x):
        return cpu.convolve(x, weight, before, residual)
    if x.is_cuda and (kernels := _triton()) is not None and kernels.supports(x):
        return kernels.convolve(x, weight, before, residual)  # type: ignore[no-any-return]
    # Two dimensions, features last in memory: for these PyTorch has the fastest code on a CPU.
    rows = F.pad(x, (0, 0, before, weight.shape[-1] - 1 - before))
    grid = rows.unsqueeze(1).movedim(-1, 1)
    y = F.conv2d(grid, weight.to(x.dtype).unsqueeze(1).unsqueeze(1), groups=weight.shape[0])
    y = y.movedim(1, -1).reshape(x.shape)
    return (x + y if residual else y).contiguous()


def _correlate(grad: Tensor, x: Tensor, taps: int, before: int) -> Tensor:
    if cpu.supports(grad, x) and grad.dtype == x.dtype:
        return cpu.correlate(grad, x, taps, before)
    if x.is_cuda and (kernels := _triton()) is not None and kernels.supports(x) and grad.dtype == x.dtype:
        return kernels.correlate(grad, x, taps, before)  # type: ignore[no-any-return]
    n, kept = x.shape[1], _kept(x.dtype)
    grad, rows = grad.to(kept), F.pad(x.to(kept), (0, 0, before, taps - 1 - before))
    return torch.stack([(grad * rows[:, tap : tap + n]).sum((0, 1)) for tap in range(taps)], dim=-1)


@lru_cache(maxsize=1)
def _triton() -> ModuleType | None:
    """The module of Triton's kernels; None without triton. Imported when the first tensor on a GPU comes."""
    try:
        from strassen_tile.ops.cuda import taps
    except ImportError:
        return None
    return taps


def _kept(dtype: torch.dtype) -> torch.dtype:
    """What long sums are kept in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


@torch.library.register_fake("strassen_tile::taps")  # type: ignore[untyped-decorator]
def _convolve_shape(x: Tensor, weight: Tensor, before: int, residual: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("strassen_tile::taps_correlate")  # type: ignore[untyped-decorator]
def _correlate_shape(grad: Tensor, x: Tensor, taps: int, before: int) -> Tensor:
    return x.new_empty(x.shape[-1], taps, dtype=_kept(x.dtype))


for _name, _kernel in (("taps", _convolve), ("taps_correlate", _correlate)):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")


@register_flop_formula(torch.ops.strassen_tile.taps)  # type: ignore[untyped-decorator, unused-ignore]
def _convolve_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return int(2 * x[0] * x[1] * x[2] * weight[1])


@register_flop_formula(torch.ops.strassen_tile.taps_correlate)  # type: ignore[untyped-decorator, unused-ignore]
def _correlate_flops(grad: Any, x: Any, taps: int, *_: Any, **__: Any) -> int:
    return int(2 * x[0] * x[1] * x[2] * taps)


class _Convolve(Function):
    """(x (B, N, K), weight (K, T), before, residual) → (B, N, K)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, before: int, residual: bool) -> Tensor:
        return torch.ops.strassen_tile.taps(x, weight, before, residual)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.before, ctx.residual = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        taps = weight.shape[-1]
        return (
            convolve_rows(grad, weight.flip(-1), taps - 1 - ctx.before, residual=ctx.residual)
            if ctx.needs_input_grad[0]
            else None,
            _Correlate.apply(grad, x, taps, ctx.before).to(weight.dtype) if ctx.needs_input_grad[1] else None,  # type: ignore[no-untyped-call]
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor, before: int, residual: bool) -> tuple[Tensor, int]:
        if in_dims[1] is not None:
            return _map_samples(_Convolve.apply, info, in_dims, x, weight, before, residual)
        samples = x.movedim(in_dims[0], 0)
        y = convolve_rows(samples.flatten(0, 1), weight, before, residual=residual)
        return y.unflatten(0, samples.shape[:2]), 0


class _Correlate(Function):
    """(grad (B, N, K), x (B, N, K), T, before) → (K, T): Σ_n grad[n, k] x[n + t − before, k]."""

    @staticmethod
    def forward(grad: Tensor, x: Tensor, taps: int, before: int) -> Tensor:
        return torch.ops.strassen_tile.taps_correlate(grad, x, taps, before)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, x, ctx.taps, ctx.before = inputs
        ctx.save_for_backward(grad, x)

    @staticmethod
    def backward(ctx: Any, sums: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = ctx.saved_tensors
        return (
            convolve_rows(x, sums, ctx.before, residual=False) if ctx.needs_input_grad[0] else None,
            convolve_rows(grad, sums.flip(-1), ctx.taps - 1 - ctx.before, residual=False)
            if ctx.needs_input_grad[1]
            else None,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
        return _map_samples(_Correlate.apply, info, in_dims, *arguments)
