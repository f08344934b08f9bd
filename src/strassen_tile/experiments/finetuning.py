"""The same pretrained model made cheaper in several ways, as it then is and after the same training.

Every method starts from the same weights and is fitted to the same calibration text. Rows have what the model was worth then
under names with "before_". Causal language models are trained on text, encoders to give the embeddings that they gave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from strassen_tile.convert import Conversion
from strassen_tile.experiments import runner
from strassen_tile.experiments.cheaper import build, try_methods
from strassen_tile.experiments.costs import cost_fields
from strassen_tile.experiments.finetune_recipe import FinetuneRecipe
from strassen_tile.experiments.material import material
from strassen_tile.experiments.rates import TUNING_SEED, Entry, Rates, rated, run_of, tried
from strassen_tile.experiments.settings import settings_of
from strassen_tile.integrations.ranks import share
from strassen_tile.integrations.training import resolved_precision
from strassen_tile.records import Row


def comparison(recipe: FinetuneRecipe, rates: Rates | None = None) -> runner.Comparison:
    """Every method of the recipe with every seed.

    Args:
        recipe: what is compared.
        rates: learning rates, of `best_rates`, for the methods whose entries name none.

    Raises:
        ConfigError: there is no such model, a method cannot convert it, or the recipe's batch cannot be shared by the processes
            there are.
        DataError: the text cannot be read, or is too short.
    """
    if not rates:  # those that chose them were checked
        _check(recipe)
    entries, left_out = rated(recipe, rates or {})
    runs = [_run(recipe, one, seed) for seed in recipe.seeds for one in entries]
    return replace(_comparison(recipe, _title(recipe), runs), left_out=left_out)


def tuning(recipe: FinetuneRecipe) -> runner.Comparison:
    """Every method whose entry names no learning rate with each of the recipe's grid; the test text is not read."""
    _check(recipe)
    runs = [_run(recipe, one, TUNING_SEED, test=False) for one in tried(recipe)]
    return _comparison(recipe, f"Learning rates: {_title(recipe)}", runs)


def _check(recipe: FinetuneRecipe) -> None:
    share(recipe.batch_size)
    try_methods(recipe)


def _title(recipe: FinetuneRecipe) -> str:
    steps = recipe.epochs * recipe.steps
    return f"{recipe.model} on {recipe.data}, {steps} steps of {recipe.batch_size} × {recipe.context} tokens"


def _comparison(recipe: FinetuneRecipe, title: str, runs: Sequence[runner.Run]) -> runner.Comparison:
    defaults = {
        name: one.default for name, one in settings_of(FinetuneRecipe).items() if one.default not in (None, MISSING)
    }
    found = material(recipe)
    facts: Row = {
        "model": recipe.model,
        "context": recipe.context,
        "calibration": recipe.calibration,
        "distill": recipe.distill,
        "in_order": recipe.in_order,
        "fewer": recipe.fewer,
        "guide": recipe.guide,
        **found.facts,
        "precision": recipe.precision,
    }
    return runner.Comparison(
        title=title,
        runs=runs,
        recipe=asdict(recipe),
        earlier={**defaults, "precision": resolved_precision("auto")},
        may_change=frozenset({"seeds", "ranks", "methods", "workers", "jobs", "lr_grid", "save"}),
        facts=facts,
        remarks=[] if found.splits is None else found.splits.remarks(),
        held=frozenset({"text", "passages", "weights"}),
        notes=[
            f"Every method starts from {recipe.model}'s weights, is fitted to the same {facts['calibration']} pieces of the "
            f"training text, and trains with the same recipe, but for what its variant says: {recipe.optimizer}, weight decay "
            f"{recipe.weight_decay:g}, {recipe.warmup:.0%} warm-up, cosine decay, batches of {recipe.batch_size} pieces of "
            f"{recipe.context} tokens, {recipe.precision}. The linear layers of the blocks are converted; embedding and head "
            "are not. Text: "
            f"{recipe.data}, parted by document.",
        ],
    )


def _run(recipe: FinetuneRecipe, entry: Entry, seed: int, *, test: bool = True) -> runner.Run:
    return run_of(
        recipe,
        entry,
        seed,
        test=test,
        build=partial(_build, recipe, entry.index, seed),
        cost=partial(_cost, recipe, seed, test),
        train=_train,
        more={"tokens_per_epoch": recipe.tokens},
    )


def _build(recipe: FinetuneRecipe, index: int, seed: int) -> tuple[nn.Module, Conversion]:
    return build(recipe, recipe.roster()[index], seed)


def _cost(recipe: FinetuneRecipe, seed: int, test: bool, more: Row, model: nn.Module, conversion: Conversion) -> Row:
    """What is the same in all rows of a run: what its model costs, and what it is worth before it is trained."""
    from strassen_tile.integrations.fitting import measure

    found = material(recipe)
    size = next(iter(found.unit.values())).shape[1]
    cost = cost_fields(model, conversion, found.unit, "token", size)
    before = measure(model, found.task(seed), recipe.batch_size, "before_") if test else {}
    return {**cost, **before, **more}


def _train(recipe: FinetuneRecipe, model: nn.Module, folder: Path, *, seed: int, **more: Any) -> None:
    from strassen_tile.integrations.fitting import train
    from strassen_tile.integrations.guide import Guide

    found = material(recipe)
    guides = [Guide(model, found.model, recipe.guide)] if recipe.guide else []
    try:
        train(model, found.task(seed), folder, recipe, seed=seed, callbacks=guides, **more)
    finally:
        for guide in guides:
            guide.remove()
