"""What tokens see that they are to predict: the loss of a language model by position, with the text there and without.

A model is first given whole pieces, as in training, and its loss is taken by position in the tile; then every token is
predicted from the ones before it alone, as in generation. Where nothing leaks the two losses are the same.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strassen_tile.convert import check_mixing
from strassen_tile.data.text import Pieces, TextSplits, load_text
from strassen_tile.errors import DataError
from strassen_tile.experiments import language
from strassen_tile.experiments.settings import settings_of
from strassen_tile.experiments.text_recipe import TextRecipe
from strassen_tile.records import Row
from strassen_tile.report.groups import without_rate

TILE_ROWS = 4


def load_run(path: Path) -> tuple[nn.Module, TextRecipe, Row]:
    """The trained model of a run of `pretrain --save`, its recipe, and what tells the run.

    Raises:
        DataError: the file is not one.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as file:
            said = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        recipe = _recipe(said["recipe"])
        index = next(
            i for i, one in enumerate(recipe.roster()) if _name(one.method.name, one.variant) == _name(**_of(said))
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise DataError(f"{path} has no weights of a run of pretrain: {error!r}") from error
    splits = load_text(recipe.data, tokenizer=recipe.tokenizer, limit=recipe.limit, context=recipe.context)
    model, _ = language.build(recipe, splits.vocabulary, recipe.roster()[index], 0)
    model.load_state_dict(load_file(path))
    return model.eval(), recipe, {**_of(said), "seed": said["seed"]}


@torch.no_grad()
def losses(model: nn.Module, tokens: Tensor, *, alone: bool) -> Tensor:
    """Nats (B, N) of each token after the first, of pieces (B, N + 1).

    Args:
        alone: predict each from the tokens before it and nothing else: N runs instead of one.
    """
    inputs, wanted = tokens[:, :-1], tokens[:, 1:]
    if not alone:
        logits = model(input_ids=inputs, use_cache=False).logits
    else:
        runs = [
            model(input_ids=inputs[:, :end], use_cache=False).logits[:, -1:] for end in range(1, inputs.shape[1] + 1)
        ]
        logits = torch.cat(runs, dim=1)
    return F.cross_entropy(logits.movedim(-1, 1).float(), wanted, reduction="none")


def rows_of(model: nn.Module, splits: TextSplits, context: int, pieces: int) -> list[Row]:
    """A record for each position in a tile of four rows: bits a token with the text there, and predicted alone."""
    data = Pieces(splits.test.tokens, context, pieces)
    items = [data[i] for i in range(len(data))]
    tokens = torch.stack([torch.cat([item["input_ids"], item["labels"][-1:]]) for item in items])
    there, alone = (losses(model, tokens, alone=alone).double() / math.log(2) for alone in (False, True))
    safe = bool(check_mixing(model, {"input_ids": tokens[:2, :24]})) if _mixes(model) else True
    return [
        {
            "position": at,
            "bits": float(there[:, at::TILE_ROWS].mean()),
            "bits_alone": float(alone[:, at::TILE_ROWS].mean()),
            "pieces": len(items),
            "context": context,
            "check_mixing": safe,
        }
        for at in range(TILE_ROWS)
    ]


def continued(model: nn.Module, prompt: bytes, count: int) -> bytes:
    """What a byte-level model goes on with, the likeliest byte each time."""
    tokens = torch.tensor([list(prompt)])
    made: Any = model
    out = made.generate(tokens, max_new_tokens=count, do_sample=False, use_cache=False, pad_token_id=0)
    return bytes(out[0, len(prompt) :].tolist())


def _mixes(model: nn.Module) -> bool:
    return any(
        getattr(m, "config", None) is not None and getattr(m.config, "mixes_rows", False) for m in model.modules()
    ) or any(getattr(m, "row_mixing", None) is not None for m in model.modules())


def _recipe(said: dict[str, Any]) -> TextRecipe:
    known = settings_of(TextRecipe)
    values: Any = {
        key: tuple(value) if isinstance(value, list) else value for key, value in said.items() if key in known
    }
    return replace(TextRecipe(**values), save=False)


def _of(said: dict[str, Any]) -> dict[str, Any]:
    return {"method": said["method"], "variant": said["variant"]}


def _name(method: str, variant: str) -> tuple[str, str]:
    return method, without_rate(variant)
