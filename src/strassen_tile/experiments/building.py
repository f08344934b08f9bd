"""A network of a comparison, made as its method has it, and what it costs."""

from __future__ import annotations

import torch
from torch import nn

from strassen_tile import baselines
from strassen_tile.convert import Conversion
from strassen_tile.data import ImageSplits
from strassen_tile.experiments.costs import against, cost_fields
from strassen_tile.experiments.entries import Compared
from strassen_tile.experiments.recipe import Recipe
from strassen_tile.experiments.start import SCOPES, network
from strassen_tile.nn import normalise_weights, zero_last
from strassen_tile.records import Row

_LAST_OF_BRANCHES = ["blocks.*.attn.proj*", "blocks.*.mlp.fc2*"]


def build(recipe: Recipe, splits: ImageSplits, one: Compared, seed: int) -> tuple[nn.Module, Conversion]:
    """The network of `recipe` with the weights of `seed`, as the method has it."""
    torch.manual_seed(seed)
    model = network(recipe, splits, width=one.width)
    example = torch.randn(2, splits.channels, splits.image_size, splits.image_size)
    conversion = one.method.apply(model, example, SCOPES[recipe.scope])
    if one.zero_last:
        zero_last(model, _LAST_OF_BRANCHES)
    if one.weight_norm is not None:
        normalise_weights(model, per=one.weight_norm)
    return model, conversion


def fixed_fields(
    recipe: Recipe, splits: ImageSplits, narrow: bool, more: Row, model: nn.Module, conversion: Conversion
) -> Row:
    """What is the same in all rows of a run: the cost of its model, against dense at the recipe's width, and how it trains."""
    image = torch.randn(1, splits.channels, splits.image_size, splits.image_size)
    found = cost_fields(model, conversion, image, "image")
    if narrow:
        dense = cost_fields(*build(recipe, splits, Compared(baselines.dense(), ""), 0), image, "image")
        found = against(found, dense, "image")
    return {**found, **more}
