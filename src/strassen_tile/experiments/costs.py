"""What the network of a run costs, as fields of its rows. Ratios are fractions of dense, as everywhere in the code."""

from __future__ import annotations

from torch import nn

from strassen_tile import baselines
from strassen_tile.convert import Conversion
from strassen_tile.records import Row


def cost_fields(model: nn.Module, conversion: Conversion, example_inputs: object, unit: str, units: int = 1) -> Row:
    """Parameters, and FLOPs of a forward pass for each "image" or "token", of which the example holds so many."""
    cost = baselines.model_cost(model, conversion, example_inputs)
    return {
        "params": cost.params,
        f"flops_per_{unit}": cost.flops // units,
        "flop_ratio": cost.flop_ratio,
        "flop_ratio_all_in": cost.converted.flop_ratio,
        "flop_ratio_products": cost.converted.product_flop_ratio,
        "share_converted": cost.share,
        "layers_converted": len(conversion.converted),
    }


def against(found: Row, dense: Row, unit: str) -> Row:
    """The cost of a network of another width, held against dense at the recipe's width.

    Args:
        found: its own `cost_fields`, in which dense is as wide as itself.
        dense: those of the dense network at the recipe's width.
    """
    here, there = (
        {key: float(str(fields[key])) for key in (f"flops_per_{unit}", "flop_ratio", "share_converted")}
        for fields in (found, dense)
    )
    # FLOPs of the converted layers, were they dense: of this width, and of the recipe's.
    narrowed = here[f"flops_per_{unit}"] / here["flop_ratio"] * here["share_converted"]
    narrowed /= there[f"flops_per_{unit}"] * there["share_converted"]
    return {
        **found,
        "flop_ratio": here[f"flops_per_{unit}"] / there[f"flops_per_{unit}"],
        **{key: narrowed * float(str(found[key])) for key in ("flop_ratio_all_in", "flop_ratio_products")},
        "share_converted": dense["share_converted"],
    }
