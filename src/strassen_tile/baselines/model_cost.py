"""What a model costs with a method's layers in it: FLOPs of a forward pass, counted, and parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from strassen_tile.baselines.layers import layer_cost
from strassen_tile.convert import Conversion
from strassen_tile.convert.running import evaluating, run
from strassen_tile.cost import Cost


def _grouped_mm(a: tuple[int, ...], b: tuple[int, ...], *_: object, **__: object) -> int:
    """Of rows (n, k) or (g, n, k), or rows in groups along k, by a matrix each, as of experts. Each row meets one matrix."""
    together = math.prod(a[-2:]) * b[-1]
    return 2 * together * (a[0] if len(a) == len(b) == 3 else 1)


# What FlopCounterMode takes for free: F.scaled_dot_product_attention as a CPU runs it, and the products of experts.
_UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._grouped_mm: _grouped_mm,
}


@dataclass(frozen=True)
class ModelCost:
    """FLOPs of one forward pass of a whole model, and of its converted layers.

    Attributes:
        flops: of the whole model, all in.
        dense_flops: of the whole model had nothing been converted.
        converted: summed costs of the converted layers (with their dense counterparts).
        params: trainable parameters of the whole model as it stands.
        saved: by each converted layer, in all of its calls.
    """

    flops: int
    dense_flops: int
    converted: Cost
    params: int
    saved: Mapping[str, int]

    @property
    def share(self) -> float:
        """Share of the dense model's FLOPs that lies in converted layers."""
        return self.converted.dense_flops / self.dense_flops

    @property
    def flop_ratio(self) -> float:
        """Whole model, all in, as a fraction of dense."""
        return self.flops / self.dense_flops


def model_cost(model: nn.Module, conversion: Conversion, example_inputs: object) -> ModelCost:
    """Count a forward pass on `example_inputs`.

    What lies outside the converted layers is counted by PyTorch's FlopCounterMode; converted layers by their own
    `cost(rows, batch)`, since the counter sees a masked weight as a dense one.

    Raises:
        ConfigError: a converted layer of a class that has no `cost`.
    """
    counted: dict[int, int] = {}
    costs: list[Cost] = []
    saved = dict.fromkeys(conversion.converted, 0)

    def watch(name: str, layer: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        def before(module: nn.Module, args: object) -> None:
            counted[id(module)] = counted.get(id(module), 0) - counter.get_total_flops()

        def after(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: object) -> None:
            counted[id(module)] += counter.get_total_flops()
            shape = tuple((args[0] if args else kwargs["input"]).shape)
            cost = layer_cost(module, shape[-2] if len(shape) > 1 else 1, math.prod(shape[:-2]))
            costs.append(cost)
            saved[name] += cost.dense_flops - cost.flops

        return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after, with_kwargs=True)]

    counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    handles = [handle for name, layer in conversion.converted.items() for handle in watch(name, layer)]
    try:
        with evaluating(model), counter:
            run(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    rest = counter.get_total_flops() - sum(counted.values())
    converted = Cost(*(sum(getattr(c, field) for c in costs) for field in Cost.__dataclass_fields__))
    params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ModelCost(rest + converted.flops, rest + converted.dense_flops, converted, params, saved)
