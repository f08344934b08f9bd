"""STLMLP: two STL layers with an activation between, run as one step where nothing has to be kept for a gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from strassen_tile.errors import ConfigError, ShapeError
from strassen_tile.nn.config import STLConfig
from strassen_tile.nn.linear import STLLinear
from strassen_tile.ops.composed import ACTIVATIONS
from strassen_tile.ops.functional import check
from strassen_tile.ops.mlp import Weights, mlp
from strassen_tile.tiling import as_samples


class STLMLP(nn.Module):
    """The MLP of a transformer block: down(act(up(x))), or gated: down(act(gate(x))·up(x)).

    On a GPU, in inference, the hidden features never reach memory: one kernel decodes, activates and encodes for the
    second layer. With a gradient to come, under autocast, or while a padding mask is active, the layers run one by one.

    Input (…, N, K), output (…, N, M), rows as for `STLLinear`.

    Attributes:
        up: `STLLinear` to the hidden features; if gated to twice as many, gate first, so that one encoder serves both.
        down: `STLLinear` from them.

    Args:
        in_features: K.
        hidden_features: between the layers.
        out_features: M; K by default.
        activation: "relu", "gelu", "gelu_tanh", "silu" or "none".
        gated: whether there is a gate.
        bias: whether both layers have one.
        config: of both layers.
        device, dtype: of the parameters.

    Raises:
        ConfigError: an unknown activation.
    """

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_activation(activation)
        self.activation, self.gated = activation, gated
        width, out = hidden_features * (2 if gated else 1), in_features if out_features is None else out_features
        self.up = STLLinear(in_features, width, bias, config=config, device=device, dtype=dtype)
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
    ) -> STLMLP:
        """The MLP that takes over from dense layers, fitted as `STLLinear.from_linear` does.

        Raises:
            ConfigError: an unknown activation.
            ShapeError: layers that do not follow each other, or a gate unlike `up`.
        """
        _check_activation(activation)
        if up.out_features != down.in_features:
            raise ShapeError(f"up makes {up.out_features} features, but down takes {down.in_features}")
        first = up if gate is None else _side_by_side(gate, up)
        made = cls(0, 0, activation=activation, gated=gate is not None, config=config)
        made.up, made.down = STLLinear.from_linear(first, config), STLLinear.from_linear(down, config)
        return made.train(up.training)

    def forward(self, x: Tensor) -> Tensor:
        """(…, N, K) → (…, N, M). Raises ShapeError for a 2-D input if rows mix."""
        if not self._in_one_step(x):
            between = self.up(x)
            if self.gated:
                gate, value = between.chunk(2, dim=-1)
                between = ACTIVATIONS[self.activation](gate) * value
            else:
                between = ACTIVATIONS[self.activation](between)
            apart: Tensor = self.down(between)
            return apart
        self.up.check_input(x)
        first, second = (Weights(layer.encoded_weight, *layer.factors(), layer.bias) for layer in (self.up, self.down))
        check(x, *first, self.up.out_features)
        hidden, columns = self.down.in_features, self.down.out_features
        y = mlp(as_samples(x), first, second, hidden, columns, activation=self.activation, gated=self.gated)
        return y.view(*x.shape[:-1], columns)

    def _in_one_step(self, x: Tensor) -> bool:
        device = x.device.type
        casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return not casts and all(
            layer.padding is None and layer.config.backend == "auto" and not layer.config.recompute
            for layer in (self.up, self.down)
        )

    def extra_repr(self) -> str:
        """The activation, and whether it is gated."""
        return f"activation={self.activation!r}, gated={self.gated}"


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")


def _side_by_side(gate: nn.Linear, up: nn.Linear) -> nn.Linear:
    """One dense layer whose output is gate's and then up's."""
    if gate.weight.shape != up.weight.shape or (gate.bias is None) != (up.bias is None):
        raise ShapeError(
            f"gate and up must be alike; got weights {tuple(gate.weight.shape)} and {tuple(up.weight.shape)}, biases "
            f"{gate.bias is not None} and {up.bias is not None}"
        )
    with torch.device("meta"):
        both = nn.Linear(up.in_features, 2 * up.out_features, up.bias is not None)
    both.weight = nn.Parameter(torch.cat([gate.weight, up.weight]).detach(), up.weight.requires_grad)
    if up.bias is not None:
        both.bias = nn.Parameter(torch.cat([gate.bias, up.bias]).detach(), up.bias.requires_grad)
    return both.train(up.training)
