"""Parameter groups for an optimiser: what decays, and which learning rate encoders take."""

from __future__ import annotations

from typing import Any

from torch import nn

from strassen_tile.errors import ConfigError
from strassen_tile.nn.linear import STLLinear


def param_groups(
    model: nn.Module, lr: float, weight_decay: float, *, encoder_lr: float | None = None
) -> list[dict[str, Any]]:
    """Groups for `torch.optim` optimisers; every trainable parameter is in exactly one.

    "weights": matrices, dense and encoded, with `weight_decay`. "encoders": encoders and decoders of STL layers, no
    decay (they are a change of basis: shrinking them only rescales the layer), at `encoder_lr`. "rest": biases, norms
    and other vectors, no decay.

    Args:
        model: any module.
        lr: of weights and rest.
        weight_decay: of weights.
        encoder_lr: of encoders; `lr` by default.

    Raises:
        ConfigError: a negative rate or decay, or a model without trainable parameters.
    """
    if min(lr, weight_decay, encoder_lr or 0.0) < 0:
        raise ConfigError(f"rates must be >= 0; got lr={lr}, weight_decay={weight_decay}, encoder_lr={encoder_lr}")
    factors = {id(p) for m in model.modules() if isinstance(m, STLLinear) for p in (m.encoder, m.decoder)}
    members: dict[str, list[nn.Parameter]] = {"weights": [], "encoders": [], "rest": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "encoders" if id(parameter) in factors else "weights" if parameter.ndim >= 2 else "rest"
            members[kind].append(parameter)
    if not any(members.values()):
        raise ConfigError("the model has no trainable parameters")
    rates = {"weights": lr, "encoders": lr if encoder_lr is None else encoder_lr, "rest": lr}
    return [
        {"name": kind, "params": params, "lr": rates[kind], "weight_decay": weight_decay if kind == "weights" else 0.0}
        for kind, params in members.items()
        if params
    ]
