"""Blocks of other classes that run as an `STLMLP` where nobody would notice, and as themselves everywhere else."""

from __future__ import annotations

import copyreg
from typing import Any, NamedTuple

from torch import Tensor, nn

from strassen_tile.nn.mlp import STLMLP, Roles, can_be_one_step, layers_of, one_step
from strassen_tile.nn.steps import has_hooks


class _Adopted(nn.Module):
    """A block of somebody else's class that computes an MLP: in one step where that is all it does, else as it always did."""

    _kind: type[nn.Module]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """One of the block's own class: a slice of a Sequential is made by calling the class."""
        return cls._kind(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's own."""
        x, adoption = args[0] if len(args) == 1 and not kwargs else None, self.__dict__.get(_ADOPTION)
        if adoption is not None and isinstance(x, Tensor) and not self.training and adoption.holds(self):
            layers = layers_of(self, adoption.roles)
            if can_be_one_step(x, layers, None):
                return one_step(x, layers, None, adoption.roles.activation)
        return self._kind.forward(self, *args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """As the block's own; what it then computes is for it to say."""
        if name != "training":
            self.__dict__.pop(_ADOPTION, None)
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        if isinstance(made, tuple) and made[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_blank, (self._kind, *made[1][1:]), *made[2:])
        return made


class _Adoption(NamedTuple):
    """What was seen when a block was recognised, and must still be so.

    Attributes:
        roles: of its layers.
        forward: that of its class.
        others: the other children, and how each shows itself.
    """

    roles: Roles
    forward: Any
    others: tuple[tuple[nn.Module, str], ...]

    def holds(self, block: Any) -> bool:
        """Whether nobody has put another child, forward or setting in place."""
        others = [m for name, m in block._modules.items() if name not in self.roles[:3] and m is not None]
        if block._kind.forward is not self.forward or len(others) != len(self.others):
            return False
        return all(
            child is seen and not child.training and not has_hooks(child) and _setting(child) == setting
            for child, (seen, setting) in zip(others, self.others, strict=True)
        )


_ADOPTION = "_strassen_tile_mlp"
_classes: dict[type[nn.Module], type[_Adopted]] = {}


def _setting(child: Any) -> str:
    """What an activation's kind can depend on."""
    return str(getattr(child, "approximate", ""))


def _adopted_class(kind: type[nn.Module]) -> type[_Adopted]:
    if kind not in _classes:
        _classes[kind] = type(f"STL{kind.__name__}", (_Adopted, kind, STLMLP), {"_kind": kind, "__module__": __name__})
    return _classes[kind]


def _blank(kind: type[nn.Module], *arguments: Any) -> nn.Module:
    return nn.Module.__new__(_adopted_class(kind), *arguments)


def adopt(block: nn.Module, roles: Roles) -> bool:
    """Let a block of another class, whose children of these roles are STL layers, run them as an `STLMLP`.

    Only the class of the block changes: to one made of its own and `STLMLP`. Names, children, hooks and whatever it does in
    training stay. As soon as something is set on it, it runs its own forward. `release` undoes it.

    Returns:
        Whether its class allows that.
    """
    others = [m for name, m in block._modules.items() if name not in roles[:3] and m is not None]
    adoption = _Adoption(roles, type(block).forward, tuple((m, _setting(m)) for m in others))
    try:
        object.__setattr__(block, "__class__", _adopted_class(type(block)))
    except Exception:  # classes may forbid being derived from, in ways of their own
        return False
    block.__dict__[_ADOPTION] = adoption
    return True


def release(block: nn.Module) -> None:
    """Undo `adopt`. A class that others have since derived from it stays, and runs the block's own forward."""
    block.__dict__.pop(_ADOPTION, None)
    if (kind := getattr(type(block), "_kind", None)) is not None and type(block) is _classes.get(kind):
        object.__setattr__(block, "__class__", kind)
