"""The same network and recipe, dense and made cheaper in several ways, trained from scratch on images.

Every method starts from the same dense network (same seed), which is then converted; the linear layers of the blocks
are, the token module and the head are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strassen_tile import baselines
from strassen_tile.convert import Conversion
from strassen_tile.data import ImageSplits, hold_out, load_images
from strassen_tile.experiments import runner
from strassen_tile.experiments.methods import Compared
from strassen_tile.experiments.recipe import Recipe
from strassen_tile.experiments.settings import settings_of
from strassen_tile.experiments.start import SCOPES, check, network, start_notes
from strassen_tile.integrations.ranks import share
from strassen_tile.integrations.training import resolved_precision
from strassen_tile.nn import normalise_weights, zero_last
from strassen_tile.records import Row
from strassen_tile.report.groups import without_rate
from strassen_tile.report.table import number

Rates = dict[tuple[str, str], float]
_LAST_OF_BRANCHES = ["blocks.*.attn.proj*", "blocks.*.mlp.fc2*"]
_TUNING_SEED = 1_000_000  # of the runs that choose learning rates: none that a comparison has by itself
_EARLIER_FOLDER_SIZE = 224  # of image folders, where a recipe said nothing, whatever size the images had


def compare(recipe: Recipe, folder: Path, **callbacks: Any) -> list[Row]:
    """Choose learning rates, where the recipe has a grid of them, then train what is compared.

    Args:
        recipe: what is compared.
        folder: for rows and checkpoints; those of the choice lie in `folder`/tuning.
        callbacks: of `runner.run`.

    Returns:
        The rows of what is compared.
    """
    rates: Rates = {}
    if recipe.lr_grid:
        rates = best_rates(runner.run(tuning(recipe), folder / "tuning", jobs=recipe.jobs, **callbacks))
    return runner.run(comparison(recipe, rates), folder, jobs=recipe.jobs, **callbacks)


def comparison(recipe: Recipe, rates: Rates | None = None) -> runner.Comparison:
    """Every method of the recipe with every seed.

    Args:
        recipe: what is compared.
        rates: learning rates, of `best_rates`, for the methods whose entries name none.

    Raises:
        ConfigError: the recipe's batch cannot be shared by the processes there are.
        DataError: the data cannot be read.
    """
    rates = rates or {}
    recipe, splits = _loaded(recipe)
    roster = [one.at(lr) if (lr := rates.get(one.key, recipe.lr)) != recipe.lr else one for one in recipe.roster()]
    chosen: Row = {"tuned": ", ".join(f"{lr:g}" for lr in recipe.lr_grid)} if rates else {}
    runs = [_run(recipe, splits, index, one, seed, chosen) for seed in recipe.seeds for index, one in enumerate(roster)]
    return _comparison(recipe, splits, f"{recipe.model} on {recipe.data}, {_epochs(recipe)}", runs)


def tuning(recipe: Recipe) -> runner.Comparison:
    """Every method whose entry names no learning rate with each of the recipe's grid; the test set is not read."""
    recipe, splits = _loaded(recipe)
    runs = [
        _run(recipe, splits, index, one.at(lr), _TUNING_SEED, {}, test=False)
        for index, one in enumerate(recipe.roster())
        if "lr" not in one.changes
        for lr in recipe.lr_grid
    ]
    return _comparison(recipe, splits, f"Learning rates: {recipe.model} on {recipe.data}, {_epochs(recipe)}", runs)


def best_rates(rows: Iterable[Row]) -> Rates:
    """For each method of `tuning`'s rows the rate at which the validation loss ends lowest.

    The loss and not top-1: of a few hundred images, top-1 tells neighbouring rates apart by one image or two.
    """
    ends: dict[tuple[str, str], dict[float, float]] = {}
    for row in rows:  # a run's rows are in order: the last one stays
        loss = number(row, "val_loss")
        key = str(row["method"]), without_rate(str(row["variant"]))
        ends.setdefault(key, {})[float(str(row["lr"]))] = loss if loss is not None and math.isfinite(loss) else math.inf
    return {key: min(tried, key=lambda lr, tried=tried: tried[lr]) for key, tried in ends.items()}  # type: ignore[misc]


def _loaded(recipe: Recipe) -> tuple[Recipe, ImageSplits]:
    """The recipe with what it leaves to the data, and the data."""
    share(recipe.batch_size)
    limit = None if recipe.limit is None else recipe.limit + recipe.validation
    splits = load_images(recipe.data, image_size=recipe.image_size, limit=limit, augment=recipe.augment)
    if recipe.validation:
        splits = hold_out(splits, recipe.validation)
    recipe = recipe.fitted(splits)
    check(recipe, splits)
    return recipe, splits


def _comparison(recipe: Recipe, splits: ImageSplits, title: str, runs: Sequence[runner.Run]) -> runner.Comparison:
    defaults = {name: one.default for name, one in settings_of(Recipe).items() if one.default not in (None, MISSING)}
    size_before = _EARLIER_FOLDER_SIZE if splits.lazy else splits.image_size
    return runner.Comparison(
        title=title,
        runs=runs,
        recipe=asdict(recipe),
        # Before recipes had a precision, the hardware decided.
        earlier={**defaults, "precision": resolved_precision("auto"), "image_size": size_before},
        # More of them only add runs, or change no result; a rate that is chosen is part of what a run is told by.
        may_change=frozenset({"seeds", "ranks", "methods", "workers", "jobs", "lr_grid", "save"}),
        facts={**facts(splits), "precision": recipe.precision, **({"draws": "by batch"} if recipe.augment else {})},
        notes=_notes(recipe, splits),
        remarks=_remarks(splits),
    )


def _run(
    recipe: Recipe, splits: ImageSplits, index: int, one: Compared, seed: int, chosen: Row, *, test: bool = True
) -> runner.Run:
    # Other entries have no part in a run, and with its rate one of them could be the same; runs that choose a rate are not
    # what anybody wants the weights of.
    own: dict[str, Any] = {**one.changes, "methods": ("dense",), "save": recipe.save and test}
    training = replace(recipe, **own)
    how = {key: getattr(training, key) for key in ("lr", "optimizer", "weight_decay", "factor_lr", "base_width")}
    about = {
        "method": one.method.name,
        "variant": one.variant,
        "seed": seed,
        "recipe": {**asdict(recipe), **one.changes},
    }
    return runner.Run(
        method=one.method.name,
        rank=one.method.rank,
        variant=one.variant,
        seed=seed,
        epochs=recipe.epochs,
        # By number: a method is made of functions that no other process could be handed.
        build=partial(_build, recipe, splits, index, seed),
        cost=partial(_fixed_fields, recipe, splits, one.width is not None, {**how, **chosen}),
        train=partial(_train, training, splits, seed, test, about),
        saves=training.save,
    )


def _build(recipe: Recipe, splits: ImageSplits, index: int, seed: int) -> tuple[nn.Module, Conversion]:
    return build(recipe, splits, recipe.roster()[index], seed)


def _train(
    recipe: Recipe,
    splits: ImageSplits,
    seed: int,
    test: bool,
    about: Mapping[str, object],
    model: nn.Module,
    folder: Path,
    **recorded_and_callbacks: Any,
) -> None:
    # Imported late: transformers takes seconds, and options are checked before it is wanted.
    from strassen_tile.integrations.images import train_images

    train_images(model, splits, folder, recipe, seed=seed, test=test, about=about, **recorded_and_callbacks)


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


def _fixed_fields(
    recipe: Recipe, splits: ImageSplits, narrow: bool, more: Row, model: nn.Module, conversion: Conversion
) -> Row:
    """What is the same in all rows of a run: the cost of its model, against dense at the recipe's width, and how it trains."""
    found = cost_fields(model, conversion, splits)
    if narrow:
        dense = cost_fields(*build(recipe, splits, Compared(baselines.dense(), ""), 0), splits)
        whole, own = float(str(found["flops_per_image"])), float(str(dense["flops_per_image"]))
        in_layers = whole * float(str(found["share_converted"])) / (own * float(str(dense["share_converted"])))
        found |= {
            "flop_ratio": whole / own,
            "flop_ratio_all_in": in_layers,
            "flop_ratio_products": in_layers,
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


def facts(splits: ImageSplits) -> Row:
    """What numbers of a comparison are measured by: image counts, sides in pixels, chance in per cent."""
    return {
        "train_images": len(splits.train),
        **({} if splits.validation is None else {"val_images": len(splits.validation)}),
        "test_images": len(splits.test),
        "classes": splits.num_classes,
        "image_size": splits.image_size,
        "stored_size": splits.stored_size,
        "chance": 100 * splits.chance,
    }


_OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD with momentum", "soap": "SOAP"}


_SCOPES = {
    "blocks": "are converted; the token module and the head are not",
    "all": "and of the token module are converted; the head is not",
}


def _rate(recipe: Recipe) -> str:
    if not recipe.lr_grid:
        return f"{recipe.lr:g} where its entry says nothing else"
    grid = ", ".join(f"{lr:g}" for lr in recipe.lr_grid)
    return f"the rate of {grid} with which a run of another seed ended at the lowest loss on the validation images"


def _remarks(splits: ImageSplits) -> list[str]:
    size, stored = splits.image_size, splits.stored_size
    if size > stored:
        return [f"Images of {stored} pixels are scaled up to {size}."]
    return [f"Images of {stored} pixels are scaled down to {size}."] if size < stored else []


def _epochs(recipe: Recipe) -> str:
    return "1 epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs"


def _notes(recipe: Recipe, splits: ImageSplits) -> list[str]:
    schedule = (
        f"Every method trains the same {recipe.model} from the same start with the same recipe: "
        f"{_OPTIMIZERS[recipe.optimizer]} at {_rate(recipe)}, weight decay {recipe.weight_decay:g} (none on encoders, "
        f"decoders, biases and norms), {recipe.warmup:.0%} warm-up, cosine decay, label smoothing "
        f"{recipe.label_smoothing:g}, drop path {recipe.drop_path:g}, batches of {recipe.batch_size} on all "
        f"devices together, {recipe.precision}, {_epochs(recipe)}, seeds "
        f"{', '.join(map(str, recipe.seeds))}."
    )
    converted = (
        f"The linear layers of the transformer blocks {_SCOPES[recipe.scope]}. STL, where its "
        f"variant says nothing else: tile {'×'.join(map(str, recipe.tile))}, mixing {recipe.mixing}, encoder scope "
        f"{recipe.encoder_scope}, start {recipe.init}"
        f"{'' if recipe.train_encoder else ', encoders fixed'}{'' if recipe.train_decoder else ', decoders fixed'}."
    )
    return [schedule, f"Images: {splits.preparation}.", converted, *start_notes(recipe)]
