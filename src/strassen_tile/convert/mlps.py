"""Blocks that are an MLP, whoever wrote them: found by what they compute, not by what they are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from itertools import permutations

import torch
from torch import Tensor, nn

from strassen_tile.nn import STLLinear
from strassen_tile.nn.mlp import Roles, adopt, release
from strassen_tile.nn.steps import has_hooks
from strassen_tile.ops.composed import ACTIVATIONS

_FEATURES, _HIDDEN, _OUT = 5, 11, 7  # of the probes: no two alike, so that no layer passes for another


def adopt_mlps(model: nn.Module, converted: Collection[nn.Module]) -> dict[str, Callable[[], None]]:
    """Let every block whose two or three linear children are all among `converted`, and which is an MLP, run in one step.

    Returns:
        Name of the block → what puts it back.
    """
    mine = {id(layer) for layer in converted}
    done: dict[str, Callable[[], None]] = {}
    for name, block in list(model.named_modules()):
        layers = {child: m for child, m in block._modules.items() if m is not None and id(m) in mine}
        if len(layers) in (2, 3) and all(isinstance(m, STLLinear) for m in layers.values()):
            roles = recognise(block, layers)
            if roles is not None:
                adopt(block, roles)
                done[name] = partial(release, block)
    return done


def recognise(block: nn.Module, layers: Mapping[str, nn.Module]) -> Roles | None:
    """How `block` composes `layers`, two or three of its children; None if it is no MLP.

    The layers are replaced by small dense ones for as long as it takes to compare what the block makes of random numbers,
    in float64, with every MLP there can be.
    """
    if has_hooks(block) or not _is_plain(block, layers) or len({id(layer) for layer in layers.values()}) != len(layers):
        return None
    return next((roles for roles in _hypotheses(layers) if _computes(block, roles)), None)


def _is_plain(block: nn.Module, layers: Mapping[str, nn.Module]) -> bool:
    """Whether the block has no numbers beside its layers', and takes one argument."""
    others = [m for child, m in block.named_children() if child not in layers]
    if block._parameters or block._buffers or any(next(_numbers(m), None) is not None for m in others):
        return False
    try:
        parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return False
    return len(parameters) == 1 and parameters[0].kind is not inspect.Parameter.VAR_KEYWORD


def _numbers(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _hypotheses(layers: Mapping[str, nn.Module]) -> Iterator[Roles]:
    for down, up, *gates in permutations(layers):
        *first, last = (layers[name] for name in (*gates, up, down))
        fits = all((m.in_features, m.out_features) == (first[0].in_features, last.in_features) for m in first)
        for activation in ACTIVATIONS if fits else ():
            yield Roles(up, down, gates[0] if gates else None, activation)


def _computes(block: nn.Module, roles: Roles) -> bool:
    generator = torch.Generator().manual_seed(0)

    def probe(features: int, out: int) -> nn.Linear:
        layer = nn.Linear(features, out, dtype=torch.float64, device="meta").to_empty(device="cpu")
        for parameter in layer.parameters():
            parameter.data.normal_(generator=generator)
        return layer.eval()

    up, down = probe(_FEATURES, _HIDDEN), probe(_HIDDEN, _OUT)
    gate = None if roles.gate is None else probe(_FEATURES, _HIDDEN)
    probes = {roles.up: up, roles.down: down} | ({} if roles.gate is None else {roles.gate: gate})
    x = torch.randn(2, 3, _FEATURES, dtype=torch.float64, generator=generator)
    activate = ACTIVATIONS[roles.activation]
    children, modes = dict(block._modules), {m: m.training for m in block.modules()}
    try:
        with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            expected = down(activate(up(x)) if gate is None else activate(gate(x)) * up(x))
            block.eval()
            block._modules.update(probes)
            found = type(block).forward(block, x)
        return (
            isinstance(found, Tensor)
            and found.shape == expected.shape
            and torch.allclose(found, expected, 1e-12, 1e-12)
        )
    except Exception:  # a block may be anything; one that cannot take the probes is not recognised
        return False
    finally:
        block._modules.update(children)
        for module, mode in modes.items():
            module.training = mode
