"""Which blocks of a model run as an MLP once their layers are converted."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from torch import nn

from strassen_tile.nn import STLLinear
from strassen_tile.nn.adopt import adopt, release


def adopt_mlps(model: nn.Module, converted: Collection[nn.Module]) -> dict[str, Callable[[], None]]:
    """Let every block whose two or three linear children are all among `converted`, and which is an MLP, run in one step.

    Returns:
        Name of the block → what puts it back.
    """
    mine = {id(layer) for layer in converted}
    done: dict[str, Callable[[], None]] = {}
    for name, block in list(model.named_modules()):
        layers = {child: m for child, m in block._modules.items() if m is not None and id(m) in mine}
        if len(layers) in (2, 3) and all(isinstance(m, STLLinear) for m in layers.values()) and adopt(block, layers):
            done[name] = partial(release, block)
    return done
