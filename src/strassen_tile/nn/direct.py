"""`model.forward(…)`, called as such, runs no hooks: where those say what is padding, it is led through them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from strassen_tile.nn import calls

_MARK = "_strassen_tile_direct"


class Direct:
    """A handle, as of a hook: from now on `module.forward(…)` is `module(…)`, unless that is what called it."""

    def __init__(self, module: nn.Module, needed: Callable[[], bool]) -> None:
        self.module, self.needed = module, needed
        if "forward" not in vars(module) and not isinstance(module, torch.jit.ScriptModule):
            # A bound method: a copy of the module gets one that is bound to the copy.
            module.forward = MethodType(_led(type(module)), module)

    def remove(self) -> None:
        """Let it be called as it was before, unless somebody else needs it."""
        if hasattr(vars(self.module).get("forward"), _MARK) and not self.needed():
            del self.module.forward


def _led(kind: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if calls.called(self):
            return type(self).forward(self, *args, **kwargs)
        return self(*args, **kwargs)

    setattr(forward, _MARK, True)
    return forward
