"""The roster of methods for models: a product, and how layers that compute it come into a model; what the model then costs.

To add one: a function that returns a `Method`, exported by `baselines`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from strassen_tile import bases
from strassen_tile.baselines import products
from strassen_tile.baselines.block_diagonal import MonarchLinear
from strassen_tile.baselines.layers import LowRankLinear, layer_cost
from strassen_tile.baselines.mixes import Mix, MixedLinear, mixing_with
from strassen_tile.baselines.products import Product
from strassen_tile.baselines.rotation import RotatedLinear
from strassen_tile.baselines.sparse24 import Sparse24Linear
from strassen_tile.convert import Conversion, Filter, Mixing, Replace, convert, replace_modules, swap
from strassen_tile.convert.running import evaluating, run
from strassen_tile.cost import Cost
from strassen_tile.nn import PaddingMask, STLConfig

# What a CPU runs for F.scaled_dot_product_attention, and FlopCounterMode takes for free.
_UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


@dataclass(frozen=True, kw_only=True)
class Method(Product):
    """A product, and how layers that compute it come into a model. `apply`: (model, example_inputs, filter_fn), in place."""

    apply: Callable[[nn.Module, object, Filter | None], Conversion]


def _replacing(product: Product, replace: Replace) -> Method:
    def apply(model: nn.Module, inputs: object, keep: Filter | None) -> Conversion:
        return swap(model, replace, example_inputs=inputs, filter_fn=keep)

    return Method(**vars(product), apply=apply)


def dense() -> Method:
    """The network as it is. Its conversion lists the layers the others replace, so that costs line up."""
    return _replacing(products.dense(), lambda linear: linear)


def stl(config: STLConfig, *, force_mixing: bool = False) -> Method:
    """Strassen-Tile with this configuration.

    Args:
        config: of all layers.
        force_mixing: mix rows of a sample though the model does not let them meet: a causal model then sees the tokens that
            it is to predict. To show what that does.
    """
    forced = ("*",) if force_mixing else ()
    basis = config.load_basis()
    own, basis = basis is None, basis or bases.random(config.pqs, config.rank)
    return Method(
        **vars(products.stl(basis, own=own, encoder_scope=config.encoder_scope)),
        apply=lambda model, inputs, keep: convert(
            model, config, example_inputs=inputs, filter_fn=keep, force_mixing=forced
        ),
    )


def sparse_24() -> Method:
    """2:4 sparsity, trained with SR-STE from the start."""

    def replace(linear: nn.Linear) -> nn.Module | str:
        if linear.in_features % 4:
            return f"in_features {linear.in_features} is not a multiple of 4"
        return Sparse24Linear.from_linear(linear)

    return _replacing(products.sparse_24(), replace)


def low_rank(flop_ratio: float) -> Method:
    """Two thin dense layers with this fraction of the FLOPs, from the SVD of the start."""
    return _replacing(products.low_rank(flop_ratio), lambda linear: LowRankLinear.from_linear(linear, flop_ratio))


def monarch(flop_ratio: float, blocks: int = 4) -> Method:
    """Two block-diagonal factors with this fraction of the FLOPs, random, with the output variance of the start."""
    product = products.monarch(flop_ratio, fitted=False, blocks=blocks)
    return _replacing(product, lambda linear: MonarchLinear.from_linear(linear, flop_ratio, blocks))


def rotated() -> Method:
    """Dense layers trained in a fixed random rotation: the control for optimisers that are not invariant to it."""
    return _replacing(products.rotated(), RotatedLinear)


def mixed(method: Method, kind: Mix, rows_mixed: int = 4) -> Method:
    """A method whose layers mix rows for a few FLOPs first: `MixedLinear`, which starts as the layer it wraps.

    Named after the method: "stl+mix", "stl+causal", "stl+grid". Only layers whose rows may meet are converted: neighbours for
    a "causal" or "symmetric" mix, those of a tile that both the mix and the method's own tiles cut evenly for "tile", all rows
    of a sample for "grid". The first two follow the padding, documents and cache of the model's calls; the others are for
    models whose rows are all real.

    Args:
        method: any.
        kind: one of `MIXES`: "causal", "symmetric", "tile" or "grid".
        rows_mixed: p of "tile".

    Raises:
        ConfigError: an unknown kind, or rows_mixed < 1.
        ConversionError: on `apply`, as the method's, and where no layer's rows may meet.
    """
    product = products.mixed(method, kind, rows_mixed)
    p = method.tile[0] if method.tile else 1
    own = Mixing(p, causal=False) if p > 1 else None

    def apply(model: nn.Module, inputs: object, keep: Filter | None) -> Conversion:
        follows = kind in ("causal", "symmetric")
        padding = PaddingMask(tiles=p > 1, ahead=p > 1 or kind != "causal") if follows else None

        def wrap(layer: nn.Module) -> MixedLinear:
            made = MixedLinear(layer, kind, rows_mixed)
            made.padding = padding
            return made

        mixing: Mixing | dict[str, Mixing] | None = mixing_with(kind, rows_mixed, own)
        if mixing is None and inputs is not None:  # one tile as long as the input holds all that may meet on a grid
            calls = swap(model, lambda linear: linear, example_inputs=inputs, filter_fn=keep, dry_run=True).calls
            mixing = {name: Mixing(_longest(shapes), causal=False) for name, shapes in calls.items()}
        # Where rows may meet is found on dense layers, under the names that the method will find them by.
        attach = None if padding is None else padding.attach
        trial = swap(
            model, wrap, example_inputs=inputs, filter_fn=keep, mixing=mixing or Mixing(p, False), attach=attach
        )
        trial.undo()
        done = method.apply(model, inputs, lambda module, name: name in trial.converted)
        wrapped: dict[str, nn.Module] = {name: wrap(layer) for name, layer in done.converted.items()}
        undo: list[Callable[[], object]] = [replace_modules(model, wrapped), *done._undo]
        if padding is not None:
            undo.extend(handle.remove for handle in padding.attach(model))
        return Conversion(wrapped, {**done.skipped, **trial.skipped}, done.calls, padding or done.padding, _undo=undo)

    return Method(**vars(product), apply=apply)


def _longest(shapes: Sequence[tuple[int, ...]]) -> int:
    return max([2, *(shape[-2] for shape in shapes if len(shape) > 2)])


def token_mix(rows_mixed: int = 4) -> Method:
    """Dense layers that first mix the rows of a tile: the control for row mixing."""
    return mixed(dense(), "tile", rows_mixed)


@dataclass(frozen=True)
class ModelCost:
    """FLOPs of one forward pass of a whole model, and of its converted layers.

    Attributes:
        flops: of the whole model, all in.
        dense_flops: of the whole model had nothing been converted.
        converted: summed costs of the converted layers (with their dense counterparts).
        params: trainable parameters of the whole model as it stands.
    """

    flops: int
    dense_flops: int
    converted: Cost
    params: int

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

    def watch(layer: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        def before(module: nn.Module, args: object) -> None:
            counted[id(module)] = counted.get(id(module), 0) - counter.get_total_flops()

        def after(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: object) -> None:
            counted[id(module)] += counter.get_total_flops()
            shape = tuple((args[0] if args else kwargs["input"]).shape)
            costs.append(layer_cost(module, shape[-2] if len(shape) > 1 else 1, math.prod(shape[:-2])))

        return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after, with_kwargs=True)]

    counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    handles = [handle for layer in conversion.converted.values() for handle in watch(layer)]
    try:
        with evaluating(model), counter:
            run(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    rest = counter.get_total_flops() - sum(counted.values())
    converted = Cost(*(sum(getattr(c, field) for c in costs) for field in Cost.__dataclass_fields__))
    params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ModelCost(rest + converted.flops, rest + converted.dense_flops, converted, params)
