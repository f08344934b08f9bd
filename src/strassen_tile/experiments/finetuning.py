"""The same pretrained model made cheaper in several ways, as it then is and after the same training.

Every method starts from the same weights and is fitted to the same calibration text. Rows have what the model was worth then
under names with "before_". Causal language models are trained on text, encoders to give the embeddings that they gave.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strassen_tile.baselines import Method
from strassen_tile.convert import Conversion
from strassen_tile.data.pieces import Windows
from strassen_tile.data.text import load_documents, load_text
from strassen_tile.errors import ConversionError
from strassen_tile.experiments import runner
from strassen_tile.experiments.costs import cost_fields
from strassen_tile.experiments.finetune_recipe import FinetuneRecipe
from strassen_tile.experiments.rates import TUNING_SEED, Entry, Rates, rated, run_of, tried
from strassen_tile.experiments.settings import settings_of
from strassen_tile.integrations.ranks import share
from strassen_tile.integrations.training import resolved_precision
from strassen_tile.records import Row

_BLOCK = re.compile(r"(?:^|.*?\.)\d+\.")
_SEED = 77  # of the calibration pieces


@dataclass(frozen=True)
class Material:
    """What a comparison works on: a model, text in its tokens, and what both make together.

    Attributes:
        model: dense; whoever changes it takes a copy.
        example: inputs that a conversion runs the model on.
        calibration: inputs that layers are fitted to.
        unit: the input of one "token"'s FLOPs: a sample of `context` tokens.
        task: of a seed.
        facts: fields of every row.
    """

    model: nn.Module
    example: dict[str, Tensor]
    calibration: dict[str, Tensor]
    unit: dict[str, Tensor]
    task: Callable[[int], Any]
    facts: Row


def comparison(recipe: FinetuneRecipe, rates: Rates | None = None) -> runner.Comparison:
    """Every method of the recipe with every seed.

    Args:
        recipe: what is compared.
        rates: learning rates, of `best_rates`, for the methods whose entries name none.

    Raises:
        ConfigError: there is no such model, or the recipe's batch cannot be shared by the processes there are.
        DataError: the text cannot be read, or is too short.
    """
    share(recipe.batch_size)
    entries, left_out = rated(recipe, rates or {})
    runs = [_run(recipe, one, seed) for seed in recipe.seeds for one in entries]
    return replace(_comparison(recipe, _title(recipe), runs), remarks=left_out)


def tuning(recipe: FinetuneRecipe) -> runner.Comparison:
    """Every method whose entry names no learning rate with each of the recipe's grid; the test text is not read."""
    share(recipe.batch_size)
    runs = [_run(recipe, one, TUNING_SEED, test=False) for one in tried(recipe)]
    return _comparison(recipe, f"Learning rates: {_title(recipe)}", runs)


def build(recipe: FinetuneRecipe, method: Method, seed: int) -> tuple[nn.Module, Conversion]:
    """A copy of the pretrained model as the method has it, fitted to calibration text; `seed` is of random factors."""
    found = material(recipe)
    torch.manual_seed(seed)
    model = copy.deepcopy(found.model)
    if not recipe.in_order:
        return model, method.apply(model, found.example, in_blocks, found.calibration)
    done: list[Conversion] = []
    for block in dict.fromkeys(_BLOCK.match(name)[0] for name, one in model.named_modules() if in_blocks(one, name)):  # type: ignore[index]
        within = partial(_within, block)
        try:
            done.append(method.apply(model, found.example, within, found.calibration))
        except ConversionError:  # of this block there is nothing to convert
            continue
    if not done:
        return model, method.apply(model, found.example, in_blocks, found.calibration)  # which says why
    converted = {name: layer for one in done for name, layer in one.converted.items()}
    skipped = {name: why for name, why in done[-1].skipped.items() if name not in converted}
    return model, Conversion(converted, skipped, {}, done[-1].padding)


def in_blocks(module: nn.Module, name: str) -> bool:
    """The linear layers of numbered blocks, whatever the family calls them."""
    return isinstance(module, nn.Linear) and _BLOCK.match(name) is not None


def _within(block: str, module: nn.Module, name: str) -> bool:
    return name.startswith(block) and in_blocks(module, name)


def material(recipe: FinetuneRecipe) -> Material:
    """What the recipe works on; kept for runs of the same model and text."""
    return _material(
        recipe.model, recipe.data, recipe.limit, recipe.context, recipe.steps, recipe.epochs, recipe.batch_size,
        recipe.held_out, recipe.tested_on, recipe.calibration, recipe.distill,
    )  # fmt: skip


@functools.lru_cache(maxsize=1)
def _material(
    name: str, data: str, limit: int | None, context: int, steps: int, epochs: int, batch_size: int,
    held_out: int | None, tested_on: int | None, calibration: int, distill: float,
) -> Material:  # fmt: skip
    from strassen_tile.integrations.pretrained import pretrained  # late: transformers takes seconds

    found = pretrained(name)
    if not found.decodes:
        return _encoder(
            found, data, limit, context, samples=steps * batch_size, epochs=epochs, calibration=calibration,
            held_out=held_out, tested_on=tested_on,
        )  # fmt: skip
    from strassen_tile.integrations.text import text_task

    splits = load_text(data, tokenizer=found.tokenizer, limit=limit, context=context)
    pieces = Windows(splits.train.tokens, context, calibration, _SEED)
    tokens = torch.stack([pieces[index]["input_ids"] for index in range(calibration)])
    task = partial(
        text_task, splits, batch_size, context=context, steps=steps, held_out=held_out, tested_on=tested_on,
        teacher=found.model, distill=distill,
    )  # fmt: skip
    facts: Row = {
        "train_bytes": splits.train.size,
        "val_bytes": splits.validation.size,
        "test_bytes": splits.test.size,
        "text": splits.digest,
    }
    given = {"input_ids": tokens}
    return Material(
        found.model,
        {"input_ids": tokens[:2, :24]},
        given,
        {"input_ids": tokens[:1]},
        lambda seed: task(seed=seed),
        facts,
    )


def _encoder(
    found: Any, data: str, limit: int | None, context: int, *, samples: int, epochs: int, calibration: int,
    held_out: int | None, tested_on: int | None,
) -> Material:  # fmt: skip
    from strassen_tile.integrations.sentences import Tokens, passages_of, sentence_task, targets_of

    passages, tokens = passages_of(load_documents(data, limit=limit), data, least=2), Tokens(found.tokenizer, context)
    targets = targets_of(found.model, passages, tokens, most=samples * epochs, held_out=held_out, tested_on=tested_on)
    # Rows of padding would count in a fit: of the longest passages none is shorter than a piece, where there are enough.
    longest = tokens.of(sorted(passages.train, key=len)[-calibration:])
    shortest = min(map(len, longest))
    given = {"input_ids": torch.stack([each[:shortest] for each in longest])}
    unit = {"input_ids": given["input_ids"][:1], "attention_mask": torch.ones_like(given["input_ids"][:1])}
    facts: Row = {"train_passages": len(passages.train), "test_passages": len(targets.test[0]) // 2}
    return Material(
        found.model, tokens.batch(tokens.of(passages.train[:3])), given, unit,
        lambda seed: sentence_task(targets, tokens, samples, seed), facts,
    )  # fmt: skip


def _title(recipe: FinetuneRecipe) -> str:
    steps = recipe.epochs * recipe.steps
    return f"{recipe.model} on {recipe.data}, {steps} steps of {recipe.batch_size} × {recipe.context} tokens"


def _comparison(recipe: FinetuneRecipe, title: str, runs: Sequence[runner.Run]) -> runner.Comparison:
    defaults = {
        name: one.default for name, one in settings_of(FinetuneRecipe).items() if one.default not in (None, MISSING)
    }
    return runner.Comparison(
        title=title,
        runs=runs,
        recipe=asdict(recipe),
        earlier={**defaults, "precision": resolved_precision("auto")},
        may_change=frozenset({"seeds", "ranks", "methods", "workers", "jobs", "lr_grid", "save"}),
        facts={
            "model": recipe.model,
            "context": recipe.context,
            "calibration": recipe.calibration,
            "distill": recipe.distill,
            "in_order": recipe.in_order,
            **material(recipe).facts,
            "precision": recipe.precision,
        },
        notes=[
            f"Every method starts from {recipe.model}'s weights, is fitted to the same {recipe.calibration} pieces of the "
            f"training text, and trains with the same recipe, but for what its variant says: {recipe.optimizer}, weight decay "
            f"{recipe.weight_decay:g}, {recipe.warmup:.0%} warm-up, cosine decay, batches of {recipe.batch_size} pieces of "
            f"{recipe.context} tokens, {recipe.precision}. The linear layers of the blocks are converted; embedding and head "
            "are not. Text: "
            f"{recipe.data}, parted by document."
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
    return build(recipe, recipe.roster()[index].method, seed)


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

    train(model, material(recipe).task(seed), folder, recipe, seed=seed, **more)
