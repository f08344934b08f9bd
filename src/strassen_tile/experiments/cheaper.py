"""A pretrained model made cheaper: fitted to calibration text all at once or block by block, where it costs least."""

from __future__ import annotations

import copy
import re
from functools import partial

import torch
from torch import nn

from strassen_tile.baselines import Method
from strassen_tile.baselines.layers import layer_cost
from strassen_tile.baselines.model_cost import model_cost
from strassen_tile.convert import Conversion, replace_modules
from strassen_tile.errors import ConfigError, ConversionError
from strassen_tile.experiments.finetune_recipe import FinetuneRecipe
from strassen_tile.experiments.material import Material, material

_BLOCK = re.compile(r"(?:^|.*?\.)\d+\.")


def in_blocks(module: nn.Module, name: str) -> bool:
    """The linear layers of numbered blocks, whatever the family calls them."""
    return isinstance(module, nn.Linear) and _BLOCK.match(name) is not None


def build(recipe: FinetuneRecipe, method: Method, seed: int) -> tuple[nn.Module, Conversion]:
    """A copy of the pretrained model as the method has it, fitted to calibration text.

    Args:
        recipe: with `in_order`, block after block is fitted to what those before it, converted, hand on; with `fewer`, blocks
            are left dense as `leave_dense` says.
        method: what is done to the layers of the blocks.
        seed: of random factors.

    Raises:
        ConversionError: there is nothing to convert.
        ConfigError: `fewer` cannot be reached.
    """
    found = material(recipe)
    torch.manual_seed(seed)
    model = copy.deepcopy(found.model)
    conversion = (_in_order if recipe.in_order else _at_once)(model, method, found)
    if recipe.fewer is not None and method.name != "dense":
        conversion = leave_dense(model, conversion, found, recipe.fewer, recipe.batch_size)
    return model, conversion


def _at_once(model: nn.Module, method: Method, found: Material) -> Conversion:
    return method.apply(model, found.example, in_blocks, found.calibration)


def _in_order(model: nn.Module, method: Method, found: Material) -> Conversion:
    done: list[Conversion] = []
    for block in blocks_of(model):
        try:
            done.append(method.apply(model, found.example, partial(_within, block), found.calibration))
        except ConversionError:  # of this block there is nothing to convert
            continue
    if not done:
        return _at_once(model, method, found)  # which says why
    converted = {name: layer for one in done for name, layer in one.converted.items()}
    skipped = {name: why for name, why in done[-1].skipped.items() if name not in converted}
    return Conversion(converted, skipped, {}, done[-1].padding)


def blocks_of(model: nn.Module) -> list[str]:
    """The beginnings of the names of a model's numbered blocks that have linear layers, "model.layers.0.", in order."""
    found = (_BLOCK.match(name) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return list(dict.fromkeys(match[0] for match in found if match))


def _within(block: str, module: nn.Module, name: str) -> bool:
    return name.startswith(block) and in_blocks(module, name)


def leave_dense(model: nn.Module, conversion: Conversion, found: Material, fewer: float, batch_size: int) -> Conversion:
    """Put back the dense layers of the blocks whose conversion costs most for what it saves.

    Each block is converted alone, and the loss of the validation text taken; blocks are then converted in the order of what
    that rose by for every FLOP saved, until the whole model has `fewer` times fewer FLOPs.

    Args:
        model: converted; changed in place.
        conversion: what was done to it.
        found: the dense model, and the task that measures.
        fewer: FLOPs of the dense model as a multiple of those that are to be left.
        batch_size: at which losses are taken.

    Returns:
        What is then converted.

    Raises:
        ConfigError: with every block converted there are more FLOPs left.
    """
    blocks: dict[str, dict[str, nn.Module]] = {}
    for name, layer in conversion.converted.items():
        match = _BLOCK.match(name)
        blocks.setdefault(match[0] if match else "", {})[name] = layer
    dense = {name: copy.deepcopy(found.model.get_submodule(name)) for name in conversion.converted}
    counted = model_cost(model, conversion, found.unit)
    if counted.dense_flops < fewer * counted.flops:
        most = counted.dense_flops / counted.flops
        raise ConfigError(
            f"fewer={fewer:g}: with every block converted the model has {most:.2f}× fewer FLOPs; take a smaller rank or ratio, "
            "or a smaller fewer"
        )
    rows = next(iter(found.unit.values())).shape[1]
    saved = {block: sum(_saved(layer, rows) for layer in layers.values()) for block, layers in blocks.items()}
    replace_modules(model, dense)
    least, rise = _loss(model, found, batch_size), {}
    for block, layers in blocks.items():
        replace_modules(model, layers)
        rise[block] = _loss(model, found, batch_size) - least
        replace_modules(model, {name: dense[name] for name in layers})
    kept: dict[str, nn.Module] = {}
    left = counted.dense_flops
    skipped = dict(conversion.skipped)
    for block in sorted(blocks, key=lambda one: rise[one] / max(1, saved[one])):
        if fewer * left > counted.dense_flops:
            kept |= blocks[block]
            left -= saved[block]
        else:
            skipped |= dict.fromkeys(blocks[block], f"left dense: its block alone costs {rise[block]:.3g} of the loss")
    replace_modules(model, kept)
    return Conversion(kept, skipped, conversion.calls, conversion.padding)


def _saved(layer: nn.Module, rows: int) -> int:
    cost = layer_cost(layer, rows)
    return cost.dense_flops - cost.flops


def _loss(model: nn.Module, found: Material, batch_size: int) -> float:
    from strassen_tile.integrations.fitting import measure  # late: transformers takes seconds

    return float(str(measure(model, found.task(0), batch_size, "", validation=True)["loss"]))
