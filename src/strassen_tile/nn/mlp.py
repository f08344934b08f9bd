"""STLMLP: two or three STL layers with an activation between, run as one step where nothing has to be kept for a gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from strassen_tile.errors import ConfigError, ShapeError
from strassen_tile.nn.config import STLConfig
from strassen_tile.nn.linear import STLLinear
from strassen_tile.nn.steps import check_norm, has_hooks, norm_of, undisturbed
from strassen_tile.ops.chains import Weights, mlp
from strassen_tile.ops.composed import ACTIVATIONS
from strassen_tile.ops.functional import autocasts, check
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
        self._roles = _roles("up", "down", "gate" if gated else None, activation)
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
        norm, (up, down, gate) = self.norm, self._layers()
        if self._in_one_step(x, norm):
            return self._one_step(x, norm)
        x = x if norm is None else norm(x)
        activate = ACTIVATIONS[self._roles.activation]
        y: Tensor = down(activate(up(x)) if gate is None else activate(gate(x)) * up(x))
        return y

    def extra_repr(self) -> str:
        """The activation, and whether it is gated."""
        return f"activation={self._roles.activation!r}, gated={self._roles.gate is not None}"

    def _layers(self) -> tuple[Any, Any, Any]:
        up, down, gate, _ = self._roles
        return getattr(self, up), getattr(self, down), None if gate is None else getattr(self, gate)

    def _in_one_step(self, x: Tensor, norm: nn.Module | None) -> bool:
        layers = [layer for layer in self._layers() if layer is not None]
        plain = all(type(layer) is STLLinear and layer.norm is None and layer.can_join() for layer in layers)
        return plain and undisturbed(x, layers, norm)

    def _one_step(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        up, down, gate = self._layers()
        up.check_input(x)
        dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x) else None
        x = x if dtype is None else x.to(dtype)
        first, last = _weights(up, dtype), _weights(down, dtype)
        other = None if gate is None else _weights(gate, dtype)
        for layer in (first, other):
            if layer is not None:
                check(x, *layer, up.out_features)
        y = mlp(
            as_samples(x), first, last, up.out_features, down.out_features,
            gate=other, norm=norm_of(norm, x), activation=self._roles.activation,
        )  # fmt: skip
        return y.view(*x.shape[:-1], down.out_features)


def _weights(layer: STLLinear, dtype: torch.dtype | None) -> Weights:
    weights = layer.weights()
    return weights if dtype is None else Weights(*(t if t is None else t.to(dtype) for t in weights))  # type: ignore[arg-type]


class _Adopted(STLMLP):
    """A block of somebody else's class that computes an MLP: in one step where that is all it does, else as it always did."""

    _kind: type[nn.Module]
    _others: tuple[nn.Module, ...]  # the children beside the layers, as they were when the block was recognised

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """One of the block's own class: a slice of a Sequential is made by calling the class."""
        return cls._kind(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(x, Tensor) and self._unchanged() and self._in_one_step(x, None):
            return self._one_step(x, None)
        return self._kind.forward(self, *args, **kwargs)

    def _unchanged(self) -> bool:
        """Whether the block is in eval mode and its other children are still those that were looked at."""
        others = [child for name, child in self._modules.items() if name not in self._roles and child is not None]
        if self.training or len(others) != len(self._others):
            return False
        return all(
            child is seen and not child.training and not has_hooks(child)
            for child, seen in zip(others, self._others, strict=True)
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self._kind,), self.__dict__


_classes: dict[type[nn.Module], type[_Adopted]] = {}


def _adopted_class(kind: type[nn.Module]) -> type[_Adopted]:
    if kind not in _classes:
        _classes[kind] = type(f"STL{kind.__name__}", (_Adopted, kind), {"_kind": kind, "__module__": __name__})
    return _classes[kind]


def _blank(kind: type[nn.Module]) -> nn.Module:
    return nn.Module.__new__(_adopted_class(kind))


def adopt(block: nn.Module, roles: Roles) -> None:
    """Let a block of another class, whose children of these roles are STL layers, run them as an `STLMLP`.

    Only the class of the block changes: to one made of `STLMLP` and its own. Names, children and hooks stay, and so does
    what it does in training. `release` undoes it.
    """
    others = tuple(child for name, child in block._modules.items() if name not in roles and child is not None)
    block.__class__ = _adopted_class(type(block))
    assert isinstance(block, _Adopted)
    block._roles, block._others = roles, others


def release(block: nn.Module) -> None:
    """Undo `adopt`."""
    assert isinstance(block, _Adopted)
    kind: type = block._kind
    del block._roles, block._others
    block.__class__ = kind


def _roles(up: str, down: str, gate: str | None, activation: str) -> Roles:
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    return Roles(up, down, gate, activation)
