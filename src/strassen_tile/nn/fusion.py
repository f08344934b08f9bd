"""When several layers may run as one operator, and what that operator is told of their norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from strassen_tile.errors import ConfigError
from strassen_tile.ops.functional import autocasts
from strassen_tile.ops.fused import Norm
from strassen_tile.ops.gradients import learns

_NORMS = (nn.LayerNorm, nn.RMSNorm)
_GLOBAL_HOOKS = (
    hooks._global_forward_hooks,
    hooks._global_forward_pre_hooks,
    hooks._global_backward_hooks,
    hooks._global_backward_pre_hooks,
)


def check_norm(norm: nn.Module | None, features: int) -> None:
    """Raise ConfigError unless `norm` is a LayerNorm or RMSNorm of that many features, or None."""
    if norm is None:
        return
    if not isinstance(norm, _NORMS) or tuple(norm.normalized_shape) != (features,):
        raise ConfigError(f"norm must be an nn.LayerNorm or nn.RMSNorm over {features} features; got {norm}")


def norm_of(module: nn.Module | None, x: Tensor) -> Norm:
    """What the module does to x, as numbers."""
    if module is None:
        return Norm()
    if isinstance(module, nn.LayerNorm):
        return Norm("layer", module.weight, module.bias, module.eps)
    assert isinstance(module, nn.RMSNorm)
    eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps  # of the dtype that PyTorch computes it in
    return Norm("rms", module.weight, None, eps if module.eps is None else module.eps)


def undisturbed(x: Tensor, layers: Sequence[nn.Module], norm: nn.Module | None) -> bool:
    """Whether the layers can run as one operator and nothing is lost: no gradient is needed, no hook waits for their calls.

    A norm under autocast is computed in float32, so it runs on its own.
    """
    modules = [*layers, *([] if norm is None else [norm])]
    if norm is not None and (autocasts(x) or type(norm) not in _NORMS):  # another class may do more
        return False
    if any(_GLOBAL_HOOKS) or any(map(has_own_hooks, modules)):
        return False
    return not torch.is_grad_enabled() or not learns(x, *(p for m in modules for p in m.parameters()))


def has_own_hooks(module: nn.Module) -> bool:
    """Whether somebody watches this module's calls, has compiled it, or has put a forward of their own on it."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or "forward" in vars(module) or module._compiled_call_impl is not None
