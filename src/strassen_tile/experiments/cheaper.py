"""A pretrained model made cheaper: fitted to calibration text all at once or block by block, where it costs least."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

from strassen_tile.baselines import Method, model_cost
from strassen_tile.convert import Conversion
from strassen_tile.errors import ConfigError, ConversionError, STLError
from strassen_tile.experiments.entries import Compared
from strassen_tile.experiments.finetune_recipe import FinetuneRecipe
from strassen_tile.experiments.material import Material, material
from strassen_tile.experiments.sensitivity import block_of, cheapest_for, check_reach


def in_blocks(module: nn.Module, name: str) -> bool:
    """The linear layers of numbered blocks, whatever the family calls them."""
    return isinstance(module, nn.Linear) and block_of(name) is not None


def build(recipe: FinetuneRecipe, one: Compared, seed: int) -> tuple[nn.Module, Conversion]:
    """A copy of the pretrained model as the method has it, fitted to calibration text.

    Args:
        recipe: with `in_order`, block after block is fitted to what those before it, converted, hand on; with `fewer`, blocks
            are left dense, or take a rank of those that the entry leaves open, as `sensitivity.cheapest_for` says.
        one: what is done to the layers of the blocks.
        seed: of random factors.

    Raises:
        ConversionError: there is nothing to convert.
        ConfigError: `fewer` cannot be reached.
    """
    found = material(recipe)
    torch.manual_seed(seed)
    model = copy.deepcopy(found.model)
    convert = partial(_in_order if recipe.in_order else _at_once, model, found=found)
    if recipe.fewer is None or one.method.name == "dense":
        return model, convert(one.method)
    ways = [partial(convert, method) for method in (one.method, *one.others)]
    return model, cheapest_for(model, ways, found, recipe.fewer, recipe.batch_size)


def try_methods(recipe: FinetuneRecipe) -> None:
    """Try every method on one block, before anything is written or trained; unfitted, where a method can do without.

    Raises:
        ConfigError: one that cannot convert it, or save what `fewer` asks for.
    """
    found = material(recipe)
    for one in recipe.roster():
        try:
            costs = []
            for method in (one.method, *one.others):
                model, conversion = _tried(method, found)
                if recipe.fewer is not None and method.name != "dense" and _alike(found.model):
                    costs.append(model_cost(model, conversion, found.unit))
            if recipe.fewer is not None and costs:
                most = len(blocks_of(found.model)) * max(sum(cost.saved.values()) for cost in costs)
                check_reach(recipe.fewer, costs[0].dense_flops, most)
        except STLError as error:
            raise ConfigError(f"methods: {' '.join(filter(None, one.key))}: {error}") from error


def _tried(method: Method, found: Material) -> tuple[nn.Module, Conversion]:
    """A copy of the model with its first block converted, or its last: first blocks may be of another kind."""
    blocks = blocks_of(found.model) or [""]
    given = found.example if method.name == "2:4" else None  # some of its criteria are of what layers are fed
    model = copy.deepcopy(found.model)
    try:
        return model, method.apply(model, found.example, partial(_within, blocks[0]), given)
    except ConversionError:
        return model, method.apply(model, found.example, partial(_within, blocks[-1]), given)


def _alike(model: nn.Module) -> bool:
    """Whether all blocks have the same linear layers."""
    layers: dict[str, set[tuple[str, torch.Size]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (block := block_of(name)) is not None:
            layers.setdefault(block, set()).add((name.removeprefix(block), module.weight.shape))
    return len(set(map(frozenset, layers.values()))) == 1


def _at_once(model: nn.Module, method: Method, found: Material) -> Conversion:
    return method.apply(model, found.example, in_blocks, found.calibration)


def _in_order(model: nn.Module, method: Method, found: Material) -> Conversion:
    done: dict[str, Conversion] = {}
    for block in blocks_of(model):
        try:
            done[block] = method.apply(model, found.example, partial(_within, block), found.calibration)
        except ConversionError:  # of this block there is nothing to convert
            continue
    if not done:
        return _at_once(model, method, found)  # which says why
    last = next(reversed(done.values()))
    skipped = dict(last.skipped)
    for block, one in done.items():  # each says why of its own block; of others only that they are not of it
        skipped |= {name: why for name, why in one.skipped.items() if name.startswith(block)}
    converted = {name: layer for one in done.values() for name, layer in one.converted.items()}
    skipped = {name: why for name, why in skipped.items() if name not in converted}
    return Conversion(converted, skipped, {}, last.padding)


def blocks_of(model: nn.Module) -> list[str]:
    """The beginnings of the names of a model's numbered blocks that have linear layers, "model.layers.0.", in order."""
    found = (block_of(name) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return list(dict.fromkeys(block for block in found if block is not None))


def _within(block: str, module: nn.Module, name: str) -> bool:
    return name.startswith(block) and in_blocks(module, name)
