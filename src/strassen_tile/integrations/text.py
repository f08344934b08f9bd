"""Causal language modelling as a task: what batches and loss are, in nats a token and in bits a byte."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import EvalPrediction

from strassen_tile.data.pieces import Pieces, Windows
from strassen_tile.data.text import Part, TextSplits
from strassen_tile.integrations.decoders import BLOCKS
from strassen_tile.integrations.fitting import Task, Trained, train
from strassen_tile.integrations.trainer import IGNORED
from strassen_tile.integrations.training import Training
from strassen_tile.records import Row


class LanguageModel(Trained):
    """What Trainer drives: tokens (B, N) → {"logits"} (B, N, vocabulary)."""

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Trainer takes outputs by name."""
        return {"logits": self.model(input_ids=input_ids, use_cache=False).logits}


def train_text(
    model: nn.Module,
    splits: TextSplits,
    folder: Path,
    training: Training,
    *,
    context: int,
    steps: int,
    seed: int,
    held_out: int | None = None,
    tested_on: int | None = None,
    **records_and_callbacks: Any,
) -> None:
    """Train on text: `fitting.train`, whose records are of loss (nats a token) and bits (a byte).

    Args:
        model: a causal language model of transformers; trained in place.
        splits: what to train, to validate and to test on.
        folder: for checkpoints.
        training: how; an epoch is `steps` of its batches, of pieces drawn at random.
        context: tokens a piece.
        steps: of an epoch.
        seed: of the pieces and their order.
        held_out: pieces of the validation text that are read after an epoch; None: all.
        tested_on: pieces of the test text that are read; None: all.
    """
    task = Task(
        wrap=LanguageModel,
        train=Windows(splits.train.tokens, context, steps * training.batch_size, seed),
        validation=Pieces(splits.validation.tokens, context, held_out),
        test=Pieces(splits.test.tokens, context, tested_on),
        collate=default_collate,
        loss=_loss,
        metrics=_metrics,
        measured=lambda metrics, prefix, name: _measured(splits, metrics, prefix, name),
        reduce=_each,
        layers=BLOCKS,
    )
    train(model, task, folder, training, seed=seed, **records_and_callbacks)


def _loss(outputs: dict[str, Tensor], labels: Tensor, count: int | Tensor) -> Tensor:
    logits = outputs["logits"].flatten(0, 1).float()
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum") / count


def _each(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss (B, N) of each token: of a batch's logits nothing else is kept."""
    return F.cross_entropy(logits.movedim(-1, 1).float(), labels, ignore_index=IGNORED, reduction="none")


def _metrics(found: EvalPrediction) -> dict[str, float]:
    return {"nats": float(torch.as_tensor(found.predictions).double().mean())}


def _measured(splits: TextSplits, metrics: Mapping[str, float], prefix: str, name: str) -> Row:
    part = splits.test if prefix == "test_" else splits.validation
    nats = metrics[f"{prefix}nats"]
    return {f"{name}loss": nats, f"{name}bits": nats / math.log(2) * _tokens_a_byte(part)}


def _tokens_a_byte(part: Part) -> float:
    return len(part.tokens) / part.size
