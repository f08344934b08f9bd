"""Blocks of other classes that run as an `STLMLP` where nobody would notice, and as themselves everywhere else."""

from __future__ import annotations

import copyreg
from typing import Any, NamedTuple

from torch import Tensor, nn

from strassen_tile.nn.mlp import STLMLP, Roles, can_be_one_step, layers_of, one_step
from strassen_tile.nn.steps import has_hooks

_ADOPTION = "_strassen_tile_mlp"
_classes: dict[type[nn.Module], type[_Adopted]] = {}


class Read(NamedTuple):
    """An attribute that a block's forward depends on, and what it was when the block was recognised."""

    owner: Any
    name: str
    value: Any

    def holds(self) -> bool:
        """Whether it is that still, and nobody listens to it or has turned its training mode on."""
        if self.name == "__len__":  # of the children of a Sequential
            return bool(len(self.owner._modules) == self.value)
        found = getattr(self.owner, self.name, None)
        if isinstance(found, nn.Module):
            return found is self.value and not found.training and not has_hooks(found)
        return bool(found == self.value)


class _Adoption(NamedTuple):
    roles: Roles
    reads: tuple[Read, ...]


class _Adopted(nn.Module):
    """A block of somebody else's class that computes an MLP: in one step where that is all it does, else as it always did."""

    _kind: type[nn.Module]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """One of the block's own class: a slice of a Sequential is made by calling the class."""
        return cls._kind(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's own."""
        x, adoption = args[0] if len(args) == 1 and not kwargs else None, self.__dict__.get(_ADOPTION)
        if adoption is not None and isinstance(x, Tensor) and not self.training:
            layers = layers_of(self, adoption.roles)
            if all(read.holds() for read in adoption.reads) and can_be_one_step(x, layers, None):
                return one_step(x, layers, None, adoption.roles.activation)
        return self._kind.forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        if isinstance(made, tuple) and made[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_blank, (self._kind, *made[1][1:]), *made[2:])
        return made


def _adopted_class(kind: type[nn.Module]) -> type[_Adopted]:
    if kind not in _classes:
        _classes[kind] = type(f"STL{kind.__name__}", (_Adopted, kind, STLMLP), {"_kind": kind, "__module__": __name__})
    return _classes[kind]


def _blank(kind: type[nn.Module], *arguments: Any) -> nn.Module:
    return nn.Module.__new__(_adopted_class(kind), *arguments)


def adopt(block: nn.Module, roles: Roles, reads: tuple[Read, ...]) -> bool:
    """Let a block of another class, whose children of these roles are STL layers, run them as an `STLMLP`.

    Only the class of the block changes: to one made of its own and `STLMLP`. Names, children, hooks and whatever it does in
    training stay. While anything that its forward reads is not what it was, it runs that forward. `release` undoes it.

    Returns:
        Whether its class allows that.
    """
    try:
        object.__setattr__(block, "__class__", _adopted_class(type(block)))
    except Exception:  # classes may forbid being derived from, in ways of their own
        return False
    block.__dict__[_ADOPTION] = _Adoption(roles, reads)
    return True


def release(block: nn.Module) -> None:
    """Undo `adopt`. A class that others have since derived from it stays, and runs the block's own forward."""
    block.__dict__.pop(_ADOPTION, None)
    if (kind := getattr(type(block), "_kind", None)) is not None and type(block) is _classes.get(kind):
        object.__setattr__(block, "__class__", kind)
