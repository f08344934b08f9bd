"""What a block's forward depends on, remembered, and compared again whenever the block runs."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import nn

from strassen_tile.nn.steps import has_hooks


class Read(NamedTuple):
    """Something that a block's forward depends on, and what it was when the block was recognised.

    Attributes:
        owner: a class, a function or the names of a module; None for the block itself, a name for its child.
        name: of the attribute; None for the owner itself, "_modules" for the names of its children in their order.
        value: what it was.
    """

    owner: Any
    name: str | None
    value: Any

    def holds(self, block: nn.Module) -> bool:
        """Whether it is that still."""
        owner = block if self.owner is None else self.owner
        found: Any = block._modules.get(owner) if isinstance(owner, str) else owner
        if self.name == "_modules":
            return bool(tuple(found._modules) == self.value)
        if self.name == "__code__":
            return found.__code__ is self.value
        if self.name == "__class__":
            return type(found) is self.value
        if self.name is None:
            return found is self.value and not found.training and not has_hooks(found)
        found = (found if isinstance(found, dict) else found.__dict__).get(self.name)
        if isinstance(found, functools.partial) and isinstance(self.value, functools.partial):
            was = self.value  # a copy: the very object may have been changed
            return bool(found.func is was.func and found.args == was.args and found.keywords == was.keywords)
        return found is self.value or (isinstance(found, str) and found == self.value)


def kept(found: Any) -> Any:
    """As it is now: a partial function can be changed in place."""
    if isinstance(found, functools.partial):
        return functools.partial(found.func, *found.args, **found.keywords)
    return found
