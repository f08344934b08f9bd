"""STLMLP: two or three STL layers with an activation between, run as one step where nothing has to be kept for a gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from strassen_tile.errors import ConfigError, ShapeError
from strassen_tile.nn.config import STLConfig
from strassen_tile.nn.linear import STLLinear
from strassen_tile.nn.steps import check_norm, norm_of, undisturbed
from strassen_tile.ops.functional import autocasts, check
from strassen_tile.ops.fused import mlp
from strassen_tile.ops.linear import ACTIVATIONS
from strassen_tile.tiling import as_samples


class Roles(NamedTuple):
    """Which child does what in down(act(up(x))) or down(act(gate(x))·up(x))."""

    up: str
    down: str
    gate: str | None
    activation: str


class STLMLP(nn.Module):
    """The MLP of a transformer block: down(act(up(x))), or gated: down(act(gate(x))·up(x)).

    On a GPU, in inference, the hidden features never reach memory: one kernel decodes, activates and encodes for the
    second layer; gate and up share one reading of x. With a gradient to come, with hooks on a layer, or while there are
    padding rows to zero, the layers run one by one.

    Input (…, N, K), output (…, N, M), rows as for `STLLinear`.

    Attributes:
        up, down: `STLLinear` to the hidden features and from them.
        gate: `STLLinear` as `up`; only if gated.
        norm: of the input, or None.

    Args:
        in_features: K.
        hidden_features: between the layers.
        out_features: M; K by default.
        activation: "relu", "gelu", "gelu_tanh", "silu" or "none".
        gated: whether there is a gate.
        bias: whether the layers have one.
        config: of all layers.
        norm: an `nn.LayerNorm` or `nn.RMSNorm` before them, as in `STLLinear`.
        device, dtype: of the parameters.

    Raises:
        ConfigError: an unknown activation, another norm.
    """

    _roles: Roles

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        config: STLConfig | None = None,
        norm: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        self._roles = Roles("up", "down", "gate" if gated else None, activation)
        check_norm(norm, in_features)
        self.norm = norm
        out = in_features if out_features is None else out_features
        for name in ("gate", "up") if gated else ("up",):
            layer = STLLinear(in_features, hidden_features, bias, config=config, device=device, dtype=dtype)
            self.add_module(name, layer)
        self.down = STLLinear(hidden_features, out, bias, config=config, device=device, dtype=dtype)

    @classmethod
    def from_linears(
        cls,
        up: nn.Linear,
        down: nn.Linear,
        config: STLConfig | None = None,
        *,
        gate: nn.Linear | None = None,
        activation: str = "gelu",
        norm: nn.Module | None = None,
    ) -> STLMLP:
        """The MLP that takes over from dense layers, fitted as `STLLinear.from_linear` does.

        Raises:
            ConfigError: an unknown activation, another norm.
            ShapeError: layers that do not follow each other, or a gate unlike `up`.
        """
        if up.out_features != down.in_features:
            raise ShapeError(f"up makes {up.out_features} features, but down takes {down.in_features}")
        if gate is not None and gate.weight.shape != up.weight.shape:
            raise ShapeError(
                f"gate and up must be alike; got weights {tuple(gate.weight.shape)} and {tuple(up.weight.shape)}"
            )
        check_norm(norm, up.in_features)
        made = cls(0, 0, activation=activation, gated=gate is not None, config=config)
        made.norm = norm
        for name, linear in (("gate", gate), ("up", up), ("down", down)):
            if linear is not None:
                setattr(made, name, STLLinear.from_linear(linear, config))
        return made.train(up.training)

    def forward(self, x: Tensor) -> Tensor:
        """(…, N, K) → (…, N, M). Raises ShapeError for a 2-D input if rows mix."""
        norm, roles = self.norm, self._roles
        up, down, *gate = layers = layers_of(self, roles)
        if can_be_one_step(x, layers, norm):
            return one_step(x, layers, norm, roles.activation)
        x = x if norm is None else norm(x)
        activate = ACTIVATIONS[roles.activation]
        y: Tensor = down(activate(gate[0](x)) * up(x) if gate else activate(up(x)))
        return y

    def extra_repr(self) -> str:
        """The activation, and whether it is gated."""
        return f"activation={self._roles.activation!r}, gated={self._roles.gate is not None}"


def layers_of(module: nn.Module, roles: Roles) -> list[Any]:
    """up, down and, if there is one, gate."""
    return [getattr(module, name) for name in roles[:3] if name is not None]


def can_be_one_step(x: Tensor, layers: list[Any], norm: nn.Module | None) -> bool:
    """Whether the layers follow each other as one operator would run them, and nothing would be lost."""
    if not all(type(layer) is STLLinear and layer.norm is None for layer in layers):
        return False
    up, down, *gate = layers
    fit = all(layer.out_features == down.in_features and layer.in_features == up.in_features for layer in (up, *gate))
    alike = fit and all(layer.config == up.config and layer.can_join(x) for layer in layers)
    return alike and undisturbed(x, layers, norm)


def one_step(x: Tensor, layers: list[Any], norm: nn.Module | None, activation: str) -> Tensor:
    """The layers (up, down, and gate if there is one), the norm and the activation as one operator on x."""
    up, down, *gate = layers
    up.check_input(x)
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype
    x, weights = x.to(dtype), [layer.weights(dtype) for layer in layers]
    for layer in (weights[0], *weights[2:]):
        check(x, layer.encoded_weight, layer.encoder, layer.decoder, layer.bias, up.out_features)
    y = mlp(
        as_samples(x), weights[0], weights[1], up.out_features, down.out_features,
        gate=weights[2] if gate else None, norm=norm_of(norm, x), activation=activation,
    )  # fmt: skip
    return y.view(*x.shape[:-1], down.out_features)
