"""The same network and recipe, dense and made cheaper in several ways, trained from scratch on images.

Every method starts from the same dense network (same seed), which is then converted; the linear layers of the blocks
are, the token module and the head are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from strassen_tile.convert import Conversion
from strassen_tile.data import ImageSplits, hold_out, load_images
from strassen_tile.errors import ConfigError
from strassen_tile.experiments import runner
from strassen_tile.experiments.building import build, fixed_fields
from strassen_tile.experiments.notes import epochs, facts, notes, remarks
from strassen_tile.experiments.rates import TUNING_SEED, Entry, Rates, rated, run_of, tried
from strassen_tile.experiments.rates import compare as rates_first
from strassen_tile.experiments.recipe import Recipe
from strassen_tile.experiments.settings import settings_of
from strassen_tile.experiments.start import check
from strassen_tile.integrations.ranks import share
from strassen_tile.integrations.training import resolved_precision
from strassen_tile.records import Row

_EARLIER_FOLDER_SIZE = 224  # of image folders, where a recipe said nothing, whatever size the images had


def compare(recipe: Recipe, folder: Path, **callbacks: Any) -> list[Row]:
    """Choose learning rates, where the recipe has a grid of them, then train what is compared: `rates.compare`."""
    return rates_first(recipe, folder, tuning, comparison, **callbacks)


def comparison(recipe: Recipe, rates: Rates | None = None) -> runner.Comparison:
    """Every method of the recipe with every seed.

    Args:
        recipe: what is compared.
        rates: learning rates, of `best_rates`, for the methods whose entries name none.

    Raises:
        ConfigError: the recipe's batch cannot be shared by the processes there are.
        DataError: the data cannot be read.
    """
    recipe, splits = _loaded(recipe)
    entries, left_out = rated(recipe, rates or {})
    runs = [_run(recipe, splits, one, seed) for seed in recipe.seeds for one in entries]
    found = _comparison(recipe, splits, f"{recipe.model} on {recipe.data}, {epochs(recipe)}", runs)
    return replace(found, left_out=left_out)


def tuning(recipe: Recipe) -> runner.Comparison:
    """Every method whose entry names no learning rate with each of the recipe's grid; the test set is not read."""
    recipe, splits = _loaded(recipe)
    runs = [_run(recipe, splits, one, TUNING_SEED, test=False) for one in tried(recipe)]
    return _comparison(recipe, splits, f"Learning rates: {recipe.model} on {recipe.data}, {epochs(recipe)}", runs)


def _loaded(recipe: Recipe) -> tuple[Recipe, ImageSplits]:
    """The recipe with what it leaves to the data, and the data."""
    share(recipe.batch_size)
    limit = None if recipe.limit is None else recipe.limit + recipe.validation
    splits = load_images(recipe.data, image_size=recipe.image_size, limit=limit, augment=recipe.augment)
    if recipe.validation:
        splits = hold_out(splits, recipe.validation)
    recipe = recipe.fitted(splits)
    check(recipe, splits)
    for one in recipe.roster():
        if one.width is not None or one.weight_norm is not None or one.zero_last:
            try:
                build(recipe, splits, one, 0)
            except Exception as error:  # whatever a network says that cannot be made so: now, and not after other runs
                name = " ".join(filter(None, [one.method.name, one.variant]))
                raise ConfigError(f"methods: {name} cannot be made: {error}") from error
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
        notes=notes(recipe, splits),
        remarks=remarks(splits),
    )


def _run(recipe: Recipe, splits: ImageSplits, entry: Entry, seed: int, *, test: bool = True) -> runner.Run:
    return run_of(
        recipe,
        entry,
        seed,
        test=test,
        build=partial(_build, recipe, splits, entry.index, seed),
        cost=partial(fixed_fields, recipe, splits, entry.compared.width is not None),
        train=partial(_train, splits),
    )


def _build(recipe: Recipe, splits: ImageSplits, index: int, seed: int) -> tuple[nn.Module, Conversion]:
    return build(recipe, splits, recipe.roster()[index], seed)


def _train(splits: ImageSplits, recipe: Recipe, model: nn.Module, folder: Path, **more: Any) -> None:
    # Imported late: transformers takes seconds, and options are checked before it is wanted.
    from strassen_tile.integrations.images import train_images

    train_images(model, splits, folder, recipe, **more)
