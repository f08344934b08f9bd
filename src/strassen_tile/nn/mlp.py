"""STLMLP: two or three STL layers with an activation between, run as one operator where no gradient is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from strassen_tile.errors import ConfigError, ShapeError
from strassen_tile.nn.base import TileLayer
from strassen_tile.nn.config import STLConfig
from strassen_tile.nn.fusion import check_norm, norm_of, undisturbed
from strassen_tile.nn.linear import STLLinear
from strassen_tile.ops.functional import autocasts, check
from strassen_tile.ops.fused import mlp
from strassen_tile.ops.linear import ACTIVATIONS
from strassen_tile.tiling import as_samples


class Roles(NamedTuple):
    """Which child of a block does what in down(act(up(x))), or in down(act(gate(x))·up(x)).

    Attributes:
        up, down, gate: names of the layers; gate is None where the block has none.
        activation: "relu", "gelu", "gelu_tanh", "silu" or "none". In a table of blocks (`fuse_mlps`) it may also be the
            name of the block's attribute that holds the activation.
    """

    up: str = "up"
    down: str = "down"
    gate: str | None = None
    activation: str = "gelu"

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of up, down and, if there is one, gate."""
        return (self.up, self.down) if self.gate is None else (self.up, self.down, self.gate)


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
        roles: the names of the layers, which are other than these after `from_layers`, and the activation.

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

    norm: nn.Module | None
    roles: Roles

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
        out = in_features if out_features is None else out_features
        sizes = {"gate": (in_features, hidden_features)} if gated else {}
        sizes |= {"up": (in_features, hidden_features), "down": (hidden_features, out)}
        layers = {
            name: STLLinear(*size, bias, config=config, device=device, dtype=dtype) for name, size in sizes.items()
        }
        self._assemble(layers, Roles(gate="gate" if gated else None, activation=activation), norm)

    @classmethod
    def from_layers(cls, layers: Mapping[str, nn.Module], roles: Roles, *, norm: nn.Module | None = None) -> STLMLP:
        """The MLP of existing STL layers. They become its children under the names given, so a state dict keeps its keys.

        Args:
            layers: name → layer, of all names in `roles` and no other.
            roles: which of them does what, and the activation.
            norm: as in the constructor.

        Raises:
            ConfigError: an unknown activation, another norm, names that are not those of the roles or cannot be taken, or
                a layer that is no STL layer.
            ShapeError: layers that do not follow each other.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._assemble(layers, roles, norm)
        made.training = layers[roles.up].training
        return made

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
        linears = {"up": up, "down": down} if gate is None else {"gate": gate, "up": up, "down": down}
        layers = {name: STLLinear.from_linear(linear, config) for name, linear in linears.items()}
        roles = Roles(gate=None if gate is None else "gate", activation=activation)
        return cls.from_layers(layers, roles, norm=norm).train(up.training)

    def _assemble(self, layers: Mapping[str, nn.Module], roles: Roles, norm: nn.Module | None) -> None:
        if not isinstance(roles, Roles) or not isinstance(layers, Mapping) or not all(layers):
            raise ConfigError(f"from_layers takes a dict of name → layer, and Roles; got {layers!r} and {roles!r}")
        if roles.activation not in tuple(ACTIVATIONS):
            raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {roles.activation!r}")
        if len(set(roles.layers)) < len(roles.layers) or set(layers) != set(roles.layers):
            raise ConfigError(f"layers must be named as in {roles}, each once; got {', '.join(layers) or 'none'}")
        sizes: dict[str, tuple[int, int]] = {}
        for name, layer in layers.items():
            if not isinstance(name, str) or not isinstance(layer, TileLayer):
                raise ConfigError(f"{name} must be an STLLinear; got {type(layer).__name__}: convert it first")
            if "." in name or name in ("norm", "roles") or hasattr(self, name):
                raise ConfigError(f"a layer cannot be called {name!r}: it must be the name of a child, and a free one")
            sizes[name] = layer.in_features, layer.out_features
        (features, hidden), (taken, _), *gate = (sizes[name] for name in roles.layers)
        if hidden != taken:
            raise ShapeError(f"{roles.up} makes {hidden} features, but {roles.down} takes {taken}")
        if gate and gate[0] != (features, hidden):
            made = f"{gate[0][0]}→{gate[0][1]} and {features}→{hidden}"
            raise ShapeError(f"{roles.gate} and {roles.up} must be alike; got {made}")
        check_norm(norm, features)
        self.norm, self.roles = norm, roles
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor | None = None, **by_name: Tensor) -> Tensor:
        """(…, N, K) → (…, N, M). Callers of a block whose place it takes may call x by another name.

        Raises:
            ShapeError: a 2-D input if rows mix.
        """
        given = [*([] if x is None else [x]), *by_name.values()]
        if len(given) != 1:
            raise TypeError(f"forward() takes one tensor; got {len(given)}")
        x = given[0]
        norm, roles = self.norm, self.roles
        up, down, *gate = layers = [getattr(self, name) for name in roles.layers]
        if _can_fuse(x, layers, norm):
            return _fused(x, layers, norm, roles.activation)
        x = x if norm is None else norm(x)
        activate = ACTIVATIONS[roles.activation]
        y: Tensor = down(activate(gate[0](x)) * up(x) if gate else activate(up(x)))
        return y

    def extra_repr(self) -> str:
        """The activation, and whether it is gated."""
        return f"activation={self.roles.activation!r}, gated={self.roles.gate is not None}"


def why_apart(layers: list[Any]) -> str | None:
    """Why layers (up, down, and gate if there is one) can never run as one operator; None if they can."""
    up, down, *gate = layers
    for layer in layers:
        if type(layer) is not STLLinear:
            return f"a layer is not an STLLinear but of class {type(layer).__name__}"
        if layer.norm is not None:
            return "a layer has a norm of its own"
        if layer.config is not up.config and layer.config != up.config:
            return "its layers have different configs"
    if up.config.backend != "auto":
        return f"backend={up.config.backend!r} runs layers one by one"
    fit = all(layer.out_features == down.in_features and layer.in_features == up.in_features for layer in (up, *gate))
    return None if fit else "its layers do not follow each other"


def _can_fuse(x: Tensor, layers: list[Any], norm: nn.Module | None) -> bool:
    """Whether the layers can run as one operator on x, and nothing is lost."""
    return why_apart(layers) is None and all(layer.can_join(x) for layer in layers) and undisturbed(x, layers, norm)


def _fused(x: Tensor, layers: list[Any], norm: nn.Module | None, activation: str) -> Tensor:
    """The layers (up, down, and gate if there is one), the norm and the activation as one operator on x."""
    up, down, *gate = layers
    up.check_input(x)
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype
    x, weights = x.to(dtype), [layer.weights(dtype) for layer in layers]
    for layer in (weights[0], *weights[2:]):
        check(x, layer.encoded_weight, layer.encoder, layer.decoder, layer.bias, up.out_features)
    hidden, last = x.new_empty(0, 0, up.out_features), weights[1]
    check(hidden, last.encoded_weight, last.encoder, last.decoder, last.bias, down.out_features)
    y = mlp(
        as_samples(x), weights[0], weights[1], up.out_features, down.out_features,
        gate=weights[2] if gate else None, norm=norm_of(norm, x), activation=activation,
    )  # fmt: skip
    return y.view(*x.shape[:-1], down.out_features)
