"""The same causal language model and recipe, dense and made cheaper in several ways, trained from scratch on text.

Every method starts from the same dense network (same seed), which is then converted; the linear layers of the blocks are,
embedding and head are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strassen_tile import baselines
from strassen_tile.convert import Conversion
from strassen_tile.data.text import TextSplits, load_text
from strassen_tile.errors import ConfigError, STLError
from strassen_tile.experiments import runner
from strassen_tile.experiments.costs import against, cost_fields
from strassen_tile.experiments.entries import Compared
from strassen_tile.experiments.rates import TUNING_SEED, Entry, Rates, rated, run_of, tried
from strassen_tile.experiments.rates import compare as rates_first
from strassen_tile.experiments.settings import settings_of, shortest
from strassen_tile.experiments.text_recipe import TextRecipe
from strassen_tile.integrations.decoders import MODELS
from strassen_tile.integrations.ranks import share
from strassen_tile.integrations.training import resolved_precision
from strassen_tile.nn import normalise_weights, zero_last
from strassen_tile.records import Row

_EXAMPLE = (2, 24)  # tokens that convert runs the model on: samples, and rows over several tiles
_LAST_OF_BRANCHES = ["*.o_proj*", "*.down_proj*", "*.attention.dense*", "*.dense_4h_to_h*"]


def in_blocks(module: nn.Module, name: str) -> bool:
    """The linear layers of the transformer blocks, whatever the family calls them."""
    return ".layers." in name


def compare(recipe: TextRecipe, folder: Path, **callbacks: Any) -> list[Row]:
    """Choose learning rates, where the recipe has a grid of them, then train what is compared: `rates.compare`."""
    return rates_first(recipe, folder, tuning, comparison, **callbacks)


def comparison(recipe: TextRecipe, rates: Rates | None = None) -> runner.Comparison:
    """Every method of the recipe with every seed.

    Args:
        recipe: what is compared.
        rates: learning rates, of `best_rates`, for the methods whose entries name none.

    Raises:
        ConfigError: the recipe's batch cannot be shared by the processes there are, or a network cannot be made or converted.
        DataError: the text cannot be read, or is too short.
    """
    splits = _loaded(recipe)
    if not rates:  # those that chose them were checked
        _check_methods(recipe, splits.vocabulary)
    entries, left_out = rated(recipe, rates or {})
    runs = [_run(recipe, splits, one, seed) for seed in recipe.seeds for one in entries]
    return replace(_comparison(recipe, splits, _title(recipe), runs), left_out=left_out)


def tuning(recipe: TextRecipe) -> runner.Comparison:
    """Every method whose entry names no learning rate with each of the recipe's grid; the test text is not read."""
    splits = _loaded(recipe)
    _check_methods(recipe, splits.vocabulary)
    runs = [_run(recipe, splits, one, TUNING_SEED, test=False) for one in tried(recipe)]
    return _comparison(recipe, splits, f"Learning rates: {_title(recipe)}", runs)


def network(recipe: TextRecipe, vocabulary: int, width: int | None = None, blocks: int | None = None) -> nn.Module:
    """The dense network, with weights from torch's global generator.

    Args:
        recipe: which, and how it starts.
        vocabulary: tokens there are.
        width: of a token, where it is not the model's own.
        blocks: there are, where they are not as many as the model's own.

    Raises:
        ConfigError: there is none of that name or width.
    """
    from strassen_tile.integrations.decoders import decoder  # late: transformers takes seconds

    return decoder(
        recipe.model,
        vocabulary=vocabulary,
        context=recipe.context,
        width=width,
        blocks=blocks,
        init_range=recipe.init_range,
    )


def build(
    recipe: TextRecipe, vocabulary: int, one: Compared, seed: int, blocks: int | None = None
) -> tuple[nn.Module, Conversion]:
    """The network of `recipe` with the weights of `seed`, as the method has it; of so many `blocks`, or of the model's own."""
    torch.manual_seed(seed)
    how = recipe if one.init_range is None else replace(recipe, init_range=one.init_range)
    model = network(how, vocabulary, one.width, blocks)
    conversion = one.method.apply(model, {"input_ids": _tokens(vocabulary, *_EXAMPLE)}, in_blocks)
    if one.zero_last:
        zero_last(model, _LAST_OF_BRANCHES)
    if one.weight_norm is not None:
        normalise_weights(model, per=one.weight_norm)
    return model, conversion


def _tokens(vocabulary: int, samples: int, rows: int) -> torch.Tensor:
    return torch.randint(vocabulary, (samples, rows), generator=torch.Generator().manual_seed(0))


def _loaded(recipe: TextRecipe) -> TextSplits:
    share(recipe.batch_size)
    return load_text(recipe.data, tokenizer=recipe.tokenizer, limit=recipe.limit, context=recipe.context)


def _check_methods(recipe: TextRecipe, vocabulary: int) -> None:
    """Try every method on a network of one block, before anything is written or trained; a config of one's own is only made."""
    if recipe.model not in MODELS:
        for width in {one.width for one in recipe.roster()}:
            with torch.device("meta"):
                network(recipe, vocabulary, width)
        return
    for one in recipe.roster():
        try:
            build(recipe, vocabulary, one, 0, blocks=1)
        except STLError as error:
            raise ConfigError(f"methods: {' '.join(filter(None, one.key))}: {error}") from error


def _title(recipe: TextRecipe) -> str:
    steps = recipe.epochs * recipe.steps
    return f"{recipe.model} on {recipe.data}, {steps} steps of {recipe.batch_size} × {recipe.context} tokens"


def _comparison(recipe: TextRecipe, splits: TextSplits, title: str, runs: Sequence[runner.Run]) -> runner.Comparison:
    from strassen_tile.integrations.decoders import architecture  # late: transformers takes seconds

    defaults = {
        name: one.default for name, one in settings_of(TextRecipe).items() if one.default not in (None, MISSING)
    }
    return runner.Comparison(
        title=title,
        runs=runs,
        recipe=asdict(recipe),
        earlier={**defaults, "precision": resolved_precision("auto")},
        # More of them only add runs, or change no result; a rate that is chosen is part of what a run is told by.
        may_change=frozenset({"seeds", "ranks", "methods", "workers", "jobs", "lr_grid", "save"}),
        facts={
            "model": recipe.model,
            "context": recipe.context,
            "tokenizer": recipe.tokenizer,
            "text": splits.digest,
            "train_bytes": splits.train.size,
            "val_bytes": splits.validation.size,
            "test_bytes": splits.test.size,
            "architecture": architecture(recipe.model),
            "precision": recipe.precision,
        },
        held=frozenset({"text", "architecture", "train_bytes", "val_bytes", "test_bytes"}),
        notes=_notes(recipe, splits),
        remarks=splits.remarks(),
    )


def _notes(recipe: TextRecipe, splits: TextSplits) -> list[str]:
    grid = ", ".join(shortest(lr) for lr in recipe.lr_grid)
    rate = (
        f"the rate of {grid} with which a run of another seed ended at the lowest loss on the validation text"
        if recipe.lr_grid
        else f"{recipe.lr:g} where its entry says nothing else"
    )
    return [
        f"Every method trains the same {recipe.model} from the same start with the same recipe, but for what its variant says: "
        f"{recipe.optimizer} at {rate}, weight decay {recipe.weight_decay:g} (none on encoders, decoders, biases and norms), "
        f"{recipe.warmup:.0%} warm-up, cosine decay, batches of {recipe.batch_size} sequences of {recipe.context} tokens, "
        f"{recipe.precision}. The linear layers of the blocks are converted; embedding and head are not.",
        f"Text: {recipe.data}, {splits.train.size:,} bytes to train on, {splits.validation.size:,} to validate and "
        f"{splits.test.size:,} to test, of documents that are on no other side; tokens: {splits.tokenizer}.",
    ]


def _run(recipe: TextRecipe, splits: TextSplits, entry: Entry, seed: int, *, test: bool = True) -> runner.Run:
    return run_of(
        recipe,
        entry,
        seed,
        test=test,
        build=partial(_build, recipe, splits.vocabulary, entry.index, seed),
        cost=partial(_cost, recipe, splits.vocabulary, entry.compared.width is not None),
        train=partial(_train, splits),
        more={"tokens_per_epoch": recipe.tokens},
    )


def _build(recipe: TextRecipe, vocabulary: int, index: int, seed: int) -> tuple[nn.Module, Conversion]:
    return build(recipe, vocabulary, recipe.roster()[index], seed)


def _cost(
    recipe: TextRecipe, vocabulary: int, narrow: bool, more: Row, model: nn.Module, conversion: Conversion
) -> Row:
    """What is the same in all rows of a run: the cost of its model, against dense at the recipe's width, and how it trains."""
    example = {"input_ids": _tokens(vocabulary, 1, recipe.context)}
    found = cost_fields(model, conversion, example, "token", recipe.context)
    if narrow:
        dense = build(recipe, vocabulary, Compared(baselines.dense(), ""), 0)
        found = against(found, cost_fields(*dense, example, "token", recipe.context), "token")
    return {**found, **more}


def _train(splits: TextSplits, recipe: TextRecipe, model: nn.Module, folder: Path, *, seed: int, **more: Any) -> None:
    # Imported late: transformers takes seconds, and options are checked before it is wanted.
    from strassen_tile.integrations.fitting import train
    from strassen_tile.integrations.text import text_task

    how: dict[str, Any] = {"context": recipe.context, "held_out": recipe.held_out, "tested_on": recipe.tested_on}
    task = text_task(splits, recipe.batch_size, steps=recipe.steps, seed=seed, **how)
    train(model, task, folder, recipe, seed=seed, **more)
