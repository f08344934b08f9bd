"""Causal language modelling as a task: what batches and loss are, in nats a token and in bits a byte."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import EvalPrediction

from strassen_tile.data.pieces import Pieces, Windows
from strassen_tile.data.text import Part, TextSplits
from strassen_tile.integrations.averaging import Average
from strassen_tile.integrations.decoders import BLOCKS
from strassen_tile.integrations.fitting import Task, Trained
from strassen_tile.integrations.trainer import IGNORED
from strassen_tile.records import Row


class LanguageModel(Trained):
    """What Trainer drives: tokens (B, N) → {"logits"} (B, N, vocabulary)."""

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Trainer takes outputs by name."""
        return {"logits": self.model(input_ids=input_ids, use_cache=False).logits}


class Distilled(LanguageModel):
    """The same beside the model that it is to do as: in training {"logits", "teacher"}, both (B, N, vocabulary).

    Args:
        model: what is trained.
        average: of its weights.
        teacher: in eval mode. It is in no checkpoint.
    """

    def __init__(self, model: nn.Module, average: Average | None = None, *, teacher: nn.Module) -> None:
        super().__init__(model, average)
        self._teacher = [teacher]  # in a list it is no submodule

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Trainer takes outputs by name."""
        outputs = super().forward(input_ids)
        if self.training:
            with torch.no_grad():
                outputs["teacher"] = self._teacher[0](input_ids=input_ids, use_cache=False).logits
        return outputs


def text_task(
    splits: TextSplits,
    batch_size: int,
    *,
    context: int,
    steps: int,
    seed: int,
    held_out: int | None = None,
    tested_on: int | None = None,
    teacher: nn.Module | None = None,
    distill: float = 0.0,
) -> Task:
    """Causal language modelling, whose records are of loss (nats a token) and bits (a byte).

    Args:
        splits: what to train, to validate and to test on.
        batch_size: pieces a step.
        context: tokens a piece; those to train on are drawn at random.
        steps: of an epoch.
        seed: of the pieces and their order.
        held_out: pieces of the validation text that are read after an epoch; None: all.
        tested_on: pieces of the test text that are read; None: all.
        teacher: a model of the same tokens, for `distill`.
        distill: its share of the training loss: KL(teacher ‖ model), nats a token.
    """

    def loss(outputs: dict[str, Tensor], labels: Tensor, count: int | Tensor) -> Tensor:
        plain = _loss(outputs, labels, count)
        if "teacher" not in outputs:
            return plain
        return (1 - distill) * plain + distill * _divergence(outputs, labels, count)

    distilling = teacher is not None and distill > 0
    return Task(
        wrap=partial(Distilled, teacher=teacher) if distilling and teacher is not None else LanguageModel,
        train=Windows(splits.train.tokens, context, steps * batch_size, seed),
        validation=Pieces(splits.validation.tokens, context, held_out),
        test=Pieces(splits.test.tokens, context, tested_on),
        collate=default_collate,
        loss=loss,
        metrics=_metrics,
        measured=lambda metrics, prefix, name: _measured(splits, metrics, prefix, name),
        reduce=_each,
        layers=BLOCKS,
    )


def _divergence(outputs: dict[str, Tensor], labels: Tensor, count: int | Tensor) -> Tensor:
    found, wanted = (outputs[name].float().log_softmax(-1) for name in ("logits", "teacher"))
    each = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
    return each[labels != IGNORED].sum() / count


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
