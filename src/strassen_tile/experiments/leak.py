"""What tokens see that they are to predict: the loss of a language model by position, with the text there and without.

A model is first given whole pieces, as in training, and its loss is taken by position in the tile; then every token is
predicted from the ones before it alone, as in generation. Where nothing leaks the two losses are the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strassen_tile.convert import check_mixing
from strassen_tile.data.pieces import Pieces
from strassen_tile.data.text import TextSplits
from strassen_tile.records import Row

TILE_ROWS = 4


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


def continued(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """The tokens that a model goes on with, the likeliest each time."""
    tokens = torch.tensor([prompt])
    made: Any = model
    ones = torch.ones_like(tokens)
    out = made.generate(
        tokens, attention_mask=ones, max_new_tokens=count, do_sample=False, use_cache=False, pad_token_id=0
    )
    return [int(token) for token in out[0, len(prompt) :]]


def _mixes(model: nn.Module) -> bool:
    return any(
        getattr(m, "config", None) is not None and getattr(m.config, "mixes_rows", False) for m in model.modules()
    ) or any(getattr(m, "row_mixing", None) is not None for m in model.modules())
