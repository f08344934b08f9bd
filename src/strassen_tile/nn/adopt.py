"""Blocks of other classes that run as an `STLMLP` where nobody would notice, and as themselves everywhere else."""

from __future__ import annotations

import copyreg
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from strassen_tile.nn.linear import STLLinear
from strassen_tile.nn.mlp import STLMLP, Roles, can_be_one_step, layers_of, one_step
from strassen_tile.nn.reading import recognise
from strassen_tile.nn.reads import Read

_ADOPTION, _KIND = "_strassen_tile_mlp", "_strassen_tile_kind"
_classes: dict[type[nn.Module], type[nn.Module]] = {}


class _Adoption(NamedTuple):
    roles: Roles
    reads: tuple[Read, ...]


class _Adopted(nn.Module):
    """A block of somebody else's class that computes an MLP: in one step where that is all it does, else as it always did."""

    def extra_repr(self) -> str:
        """As the block's own."""
        return str(_kind_of(self).extra_repr(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        if not isinstance(made, tuple) or made[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return made
        _, (_, *arguments), state, *rest = made
        if isinstance(state, dict):  # a copy is looked at anew: what it reads may be another's by then
            state = {key: value for key, value in state.items() if key != _ADOPTION}
        return (_blank, (_kind_of(self), *arguments), state, *rest)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        kind = _kind_of(self)
        object.__setattr__(self, "__class__", kind)
        adopt(self, {name: m for name, m in self._modules.items() if type(m) is STLLinear})


def _kind_of(block: nn.Module) -> Any:
    return getattr(type(block), _KIND)


def _forward(kind: Any) -> Any:
    """The forward of the class derived from `kind`, with the signature of that of `kind`."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x, adoption = args[0] if len(args) == 1 and not kwargs else None, self.__dict__.get(_ADOPTION)
        if adoption is None or self.training or type(x) is not Tensor or torch._C._is_torch_function_mode_enabled():
            return kind.forward(self, *args, **kwargs)
        if not all(read.holds(self) for read in adoption.reads):
            return kind.forward(self, *args, **kwargs)
        layers = layers_of(self, adoption.roles)
        if not can_be_one_step(x, layers, None):
            return kind.forward(self, *args, **kwargs)
        return one_step(x, layers, None, adoption.roles.activation)

    return forward


def _new(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """A slice of a Sequential is made by calling its class: one of its own."""
    return getattr(cls, _KIND)(*args, **kwargs) if args or kwargs else object.__new__(cls)


def _adopted_class(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _classes:
        names = {_KIND: kind, "forward": _forward(kind), "__module__": __name__}
        if issubclass(kind, nn.Sequential):
            names["__new__"] = _new
        _classes[kind] = type(f"STL{kind.__name__}", (_Adopted, kind, STLMLP), names)
    return _classes[kind]


def _blank(kind: Any, *arguments: Any) -> nn.Module:
    made: nn.Module = kind.__new__(kind, *arguments)
    object.__setattr__(made, "__class__", _adopted_class(kind))
    return made


def adopt(block: nn.Module, layers: dict[str, nn.Module]) -> bool:
    """Let a block whose children `layers` are STL layers run them as an `STLMLP`, if that is what it does with them.

    Only the class of the block changes: to one made of its own and `STLMLP`. Names, children, hooks and whatever it does in
    training stay. While anything that its forward reads is not what it was, it runs that forward. `release` undoes it.

    Returns:
        Whether it does, and its class allows it.
    """
    found = recognise(block, layers)
    if found is None:
        return False
    try:
        object.__setattr__(block, "__class__", _adopted_class(type(block)))
    except Exception:  # classes may forbid being derived from, in ways of their own
        return False
    block.__dict__[_ADOPTION] = _Adoption(*found)
    return True


def release(block: nn.Module) -> None:
    """Undo `adopt`. A class that others have since derived from it stays, and runs the block's own forward."""
    block.__dict__.pop(_ADOPTION, None)
    kind = getattr(type(block), _KIND, None)
    if kind is not None and type(block) is _classes.get(kind):
        object.__setattr__(block, "__class__", kind)
