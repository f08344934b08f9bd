"""A network of a comparison, made as its method has it, and what it costs."""

from __future__ import annotations

import torch
from torch import nn

from strassen_tile import baselines
from strassen_tile.convert import Conversion
from strassen_tile.data import ImageSplits
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
    found = cost_fields(model, conversion, splits)
    if narrow:
        dense = cost_fields(*build(recipe, splits, Compared(baselines.dense(), ""), 0), splits)
        here, there = (
            {key: float(str(fields[key])) for key in ("flops_per_image", "flop_ratio", "share_converted")}
            for fields in (found, dense)
        )
        # FLOPs of the converted layers, were they dense: of this width, and of the recipe's.
        narrowed = here["flops_per_image"] / here["flop_ratio"] * here["share_converted"]
        narrowed /= there["flops_per_image"] * there["share_converted"]
        found |= {
            "flop_ratio": here["flops_per_image"] / there["flops_per_image"],
            **{key: narrowed * float(str(found[key])) for key in ("flop_ratio_all_in", "flop_ratio_products")},
            "share_converted": dense["share_converted"],
        }
    return {**found, **more}


def cost_fields(model: nn.Module, conversion: Conversion, splits: ImageSplits) -> Row:
    """Parameters and FLOPs of one image. Ratios are fractions of dense, as everywhere in the code."""
    image = torch.randn(1, splits.channels, splits.image_size, splits.image_size)
    seen = {name: [(1, *shape[1:]) for shape in shapes] for name, shapes in conversion.calls.items()}
    one = Conversion(conversion.converted, conversion.skipped, seen)
    cost = baselines.model_cost(model, one, image)
    return {
        "params": cost.params,
        "flops_per_image": cost.flops,
        "flop_ratio": cost.flop_ratio,
        "flop_ratio_all_in": cost.converted.flop_ratio,
        "flop_ratio_products": cost.converted.product_flop_ratio,
        "share_converted": cost.share,
        "layers_converted": len(conversion.converted),
    }
