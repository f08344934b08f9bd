"""The roster of methods for models: a product, and how layers that compute it come into a model.

To add one: a function that returns a `Method`, exported by `baselines`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from strassen_tile import bases
from strassen_tile.baselines import products
from strassen_tile.baselines.block_diagonal import MonarchLinear
from strassen_tile.baselines.layers import LowRankLinear
from strassen_tile.baselines.mixes import Mix, MixedLinear, mixing_with
from strassen_tile.baselines.products import Product
from strassen_tile.baselines.rotation import RotatedLinear
from strassen_tile.baselines.sparse24 import Criterion, Sparse24Linear
from strassen_tile.convert import Conversion, Filter, Mixing, Replace, convert, replace_modules, swap
from strassen_tile.convert.running import inputs_of
from strassen_tile.nn import PaddingMask, STLConfig


class Apply(Protocol):
    """Puts a method's layers into a model, in place."""

    def __call__(self, model: nn.Module, inputs: object, keep: Filter | None, calibration: object = None) -> Conversion:
        """`convert`, of this method: example inputs, filter, and inputs that layers are fitted to where a method does that."""


@dataclass(frozen=True, kw_only=True)
class Method(Product):
    """A product, and how layers that compute it come into a model."""

    apply: Apply


def _replacing(product: Product, replace: Replace) -> Method:
    return _fitting(product, lambda linear, rows: replace(linear))


def _fitting(product: Product, replace: Callable[[nn.Linear, Tensor | None], nn.Module | str]) -> Method:
    """A method whose layers are made of a dense one and of the rows that it is fed, or of None where there are none."""

    def apply(model: nn.Module, inputs: object, keep: Filter | None, calibration: object = None) -> Conversion:
        fed: dict[nn.Module, Tensor] = {}
        if calibration is not None:
            found = swap(model, lambda linear: linear, example_inputs=inputs, filter_fn=keep, dry_run=True)
            wanted = {module for name, module in model.named_modules() if name in found.converted}
            fed = inputs_of(model, list(wanted), calibration)
        # Let go of one by one: those of a large model are larger than it.
        return swap(model, lambda linear: replace(linear, fed.pop(linear, None)), example_inputs=inputs, filter_fn=keep)

    return Method(**vars(product), apply=apply)


def dense() -> Method:
    """The network as it is. Its conversion lists the layers the others replace, so that costs line up."""
    return _replacing(products.dense(), lambda linear: linear)


def stl(config: STLConfig, *, force_mixing: bool = False, rounds: int = 10) -> Method:
    """Strassen-Tile with this configuration.

    Args:
        config: of all layers. One that starts from the weight is fitted to calibration inputs, where there are any.
        force_mixing: mix rows of a sample though the model does not let them meet: a causal model then sees the tokens that
            it is to predict. To show what that does.
        rounds: of the fit.
    """
    forced = ("*",) if force_mixing else ()
    basis = config.load_basis()
    own, basis = basis is None, basis or bases.random(config.pqs, config.rank)
    return Method(
        **vars(products.stl(basis, own=own, encoder_scope=config.encoder_scope)),
        apply=lambda model, inputs, keep, calibration=None: convert(
            model,
            config,
            example_inputs=inputs,
            filter_fn=keep,
            force_mixing=forced,
            calibration=calibration if config.fits else None,
            rounds=rounds,
        ),
    )


def sparse_24(criterion: Criterion | None = None) -> Method:
    """2:4 sparsity.

    Args:
        criterion: None: trained with SR-STE from the start, the mask following the weights. Otherwise pruned once by it
            (`products.sparse_24`), and the mask kept; those of rows want calibration inputs.
    """

    def replace(linear: nn.Linear, rows: Tensor | None) -> nn.Module | str:
        if linear.in_features % 4:
            return f"in_features {linear.in_features} is not a multiple of 4"
        return Sparse24Linear.from_linear(linear, one_shot=criterion, inputs=rows)

    return _fitting(dataclasses.replace(products.sparse_24(criterion or "magnitude"), name="2:4"), replace)


def low_rank(flop_ratio: float) -> Method:
    """Two thin dense layers with this fraction of the FLOPs: the SVD of the weight, or that for calibration inputs."""

    def replace(linear: nn.Linear, rows: Tensor | None) -> nn.Module:
        return LowRankLinear.from_linear(linear, flop_ratio, rows)

    return _fitting(products.low_rank(flop_ratio), replace)


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

    def apply(model: nn.Module, inputs: object, keep: Filter | None, calibration: object = None) -> Conversion:
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
        done = method.apply(model, inputs, lambda module, name: name in trial.converted, calibration)
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
