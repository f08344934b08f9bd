"""What a comparison on a pretrained model works on: the model, its tokens of a text, and the task that both make."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from strassen_tile.data.pieces import Windows
from strassen_tile.data.text import TextSplits, load_documents, load_text
from strassen_tile.experiments.finetune_recipe import FinetuneRecipe
from strassen_tile.integrations.ranks import ranks
from strassen_tile.records import Row

_SEED = 77  # of the calibration pieces


@dataclass(frozen=True)
class Material:
    """What a comparison works on: a model, text in its tokens, and what both make together.

    Attributes:
        model: dense; whoever changes it takes a copy.
        example: inputs that a conversion runs the model on.
        calibration: inputs that layers are fitted to; None: nothing is fitted.
        unit: the input of one "token"'s FLOPs: a sample of `context` tokens.
        task: of a seed.
        facts: fields of every row.
        tokenizer: of transformers.
        splits: of a causal language model, its text.
    """

    model: nn.Module
    example: dict[str, Tensor]
    calibration: dict[str, Tensor] | None
    unit: dict[str, Tensor]
    task: Callable[[int], Any]
    facts: Row
    tokenizer: Any
    splits: TextSplits | None = None


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
    from strassen_tile.integrations.trial import check_tokens, digest, try_out

    found, device = pretrained(name), ranks().device
    found.model.to(device)  # where it is trained it is converted and measured
    try_out(found, context)
    if not found.decodes:
        return _encoder(
            found, data, limit, context, samples=steps * batch_size, epochs=epochs, calibration=calibration,
            held_out=held_out, tested_on=tested_on,
        )  # fmt: skip
    from strassen_tile.integrations.text import text_task

    splits = load_text(data, tokenizer=found.tokenizer, limit=limit, context=context)
    check_tokens(found, (part.tokens for part in (splits.train, splits.validation, splits.test)))
    pieces = Windows(splits.train.tokens, context, max(2, calibration), _SEED)
    tokens = torch.stack([piece["input_ids"] for piece in (pieces[index] for index in range(len(pieces)))]).to(device)
    task = partial(
        text_task, splits, batch_size, context=context, steps=steps, held_out=held_out, tested_on=tested_on,
        teacher=found.model, distill=distill,
    )  # fmt: skip
    facts: Row = {
        "train_bytes": splits.train.size,
        "val_bytes": splits.validation.size,
        "test_bytes": splits.test.size,
        "text": splits.digest,
        "weights": digest(found.model),
    }
    given = {"input_ids": tokens}
    return Material(
        model=found.model,
        example={"input_ids": tokens[:2, :24]},
        calibration=given if calibration else None,
        unit={"input_ids": tokens[:1]},
        task=lambda seed: task(seed=seed),
        facts=facts,
        tokenizer=found.tokenizer,
        splits=splits,
    )


def _encoder(
    found: Any, data: str, limit: int | None, context: int, *, samples: int, epochs: int, calibration: int,
    held_out: int | None, tested_on: int | None,
) -> Material:  # fmt: skip
    from strassen_tile.integrations.sentences import Tokens, passages_of, sentence_task, targets_of
    from strassen_tile.integrations.trial import check_tokens, digest

    passages, tokens = passages_of(load_documents(data, limit=limit), data, least=2), Tokens(found.tokenizer, context)
    check_tokens(found, tokens.of([*passages.train, *passages.validation, *passages.test]))
    targets = targets_of(found.model, passages, tokens, most=samples * epochs, held_out=held_out, tested_on=tested_on)
    # Rows of padding would count in a fit: of the longest passages none is shorter than a piece, where there are enough.
    longest = tokens.of(sorted(passages.train, key=len)[-max(2, calibration) :])
    shortest = min(map(len, longest))
    device = next(found.model.parameters()).device
    given = {"input_ids": torch.stack([each[:shortest] for each in longest]).to(device)}
    example = {key: value.to(device) for key, value in tokens.batch(tokens.of(passages.train[:3])).items()}
    return Material(
        model=found.model,
        example=example,
        calibration=given if calibration else None,
        unit={"input_ids": given["input_ids"][:1], "attention_mask": torch.ones_like(given["input_ids"][:1])},
        task=lambda seed: sentence_task(targets, tokens, samples, seed),
        facts={
            "train_passages": len(passages.train),
            "test_passages": len(targets.test[0]) // 2,
            "calibration": len(longest) if calibration else 0,
            "weights": digest(found.model),
            "passages": hashlib.sha256(repr(passages).encode("utf-8", errors="replace")).hexdigest()[:16],
        },
        tokenizer=found.tokenizer,
    )
