"""The same network and recipe, dense and made cheaper in several ways, trained from scratch on images.

Every method starts from the same dense network (same seed), which is then converted; the linear layers of the blocks
are, the token module and the head are not.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strassen_tile import baselines
from strassen_tile.convert import Conversion
from strassen_tile.data import ImageSplits, load_images
from strassen_tile.experiments import runner
from strassen_tile.experiments.methods import Compared
from strassen_tile.experiments.recipe import Recipe
from strassen_tile.experiments.settings import settings_of
from strassen_tile.integrations.ranks import share
from strassen_tile.integrations.training import resolved_precision
from strassen_tile.models import t2t_vit
from strassen_tile.records import Row

_EARLIER_FOLDER_SIZE = 224  # of image folders, where a recipe said nothing, whatever size the images had


def in_blocks(module: nn.Module, name: str) -> bool:
    """The layers the paper replaces: the linear ones of the transformer blocks."""
    return name.startswith("blocks.")


def compare(recipe: Recipe, folder: Path, **callbacks: Any) -> list[Row]:
    """`runner.run` of `comparison(recipe)`."""
    return runner.run(comparison(recipe), folder, **callbacks)


def comparison(recipe: Recipe) -> runner.Comparison:
    """Every method of the recipe with every seed.

    Raises:
        ConfigError: the recipe's batch cannot be shared by the processes there are.
        DataError: the data cannot be read.
    """
    share(recipe.batch_size)
    splits = load_images(recipe.data, image_size=recipe.image_size, limit=recipe.limit, augment=recipe.augment)
    recipe = recipe.fitted(splits)
    defaults = {name: one.default for name, one in settings_of(Recipe).items() if one.default not in (None, MISSING)}
    size_before = _EARLIER_FOLDER_SIZE if splits.lazy else splits.image_size
    return runner.Comparison(
        title=f"{recipe.model} on {recipe.data}, {_epochs(recipe)}",
        runs=[_run(recipe, splits, one, seed) for seed in recipe.seeds for one in recipe.roster()],
        recipe=asdict(recipe),
        # Before recipes had a precision, the hardware decided.
        earlier={**defaults, "precision": resolved_precision("auto"), "image_size": size_before},
        may_change=frozenset({"seeds", "ranks", "methods", "workers"}),  # more of them only add runs
        facts={**facts(splits), "precision": recipe.precision, **({"draws": "by batch"} if recipe.augment else {})},
        notes=_notes(recipe, splits),
        remarks=_remarks(splits),
    )


def _run(recipe: Recipe, splits: ImageSplits, one: Compared, seed: int) -> runner.Run:
    return runner.Run(
        method=one.method.name,
        rank=one.method.rank,
        variant=one.variant,
        seed=seed,
        epochs=recipe.epochs,
        build=partial(build, recipe, splits, one.method, seed),
        cost=partial(cost_fields, splits=splits),
        train=partial(_train, recipe, splits, seed),
    )


def _train(
    recipe: Recipe, splits: ImageSplits, seed: int, model: nn.Module, folder: Path, **recorded_and_callbacks: Any
) -> None:
    # Imported late: transformers takes seconds, and options are checked before it is wanted.
    from strassen_tile.integrations.images import train_images

    train_images(model, splits, folder, recipe, seed=seed, **recorded_and_callbacks)


def build(recipe: Recipe, splits: ImageSplits, method: baselines.Method, seed: int) -> tuple[nn.Module, Conversion]:
    """The network of `recipe` with the weights of `seed`, converted by `method`."""
    torch.manual_seed(seed)
    model = t2t_vit(
        recipe.model,
        num_classes=splits.num_classes,
        image_size=splits.image_size,
        in_channels=splits.channels,
        drop_path=recipe.drop_path,
    )
    example = torch.randn(2, splits.channels, splits.image_size, splits.image_size)
    return model, method.apply(model, example, in_blocks)


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
        "test_images": len(splits.test),
        "classes": splits.num_classes,
        "image_size": splits.image_size,
        "stored_size": splits.stored_size,
        "chance": 100 * splits.chance,
    }


def _remarks(splits: ImageSplits) -> list[str]:
    size, stored = splits.image_size, splits.stored_size
    if size > stored:
        return [f"Images of {stored} pixels are scaled up to {size}."]
    return [f"Images of {stored} pixels are scaled down to {size}."] if size < stored else []


def _epochs(recipe: Recipe) -> str:
    return "1 epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs"


def _notes(recipe: Recipe, splits: ImageSplits) -> list[str]:
    schedule = (
        f"Every method trains the same {recipe.model} from the same start with the same recipe: AdamW at {recipe.lr:g}, "
        f"weight decay {recipe.weight_decay:g} (none on encoders, decoders, biases and norms), {recipe.warmup:.0%} "
        f"warm-up, cosine decay, label smoothing {recipe.label_smoothing:g}, drop path {recipe.drop_path:g}, batches of "
        f"{recipe.batch_size} on all devices together, {recipe.precision}, {_epochs(recipe)}, seeds "
        f"{', '.join(map(str, recipe.seeds))}."
    )
    converted = (
        "The linear layers of the transformer blocks are converted; the token module and the head are not. STL, where its "
        f"variant says nothing else: tile {'×'.join(map(str, recipe.tile))}, mixing {recipe.mixing}, encoder scope "
        f"{recipe.encoder_scope}, start {recipe.init}"
        f"{'' if recipe.train_encoder else ', encoders fixed'}{'' if recipe.train_decoder else ', decoders fixed'}."
    )
    return [schedule, f"Images: {splits.preparation}.", converted]
