"""Sentence encoders as a task: to give passages the embeddings that the model had before it was made cheaper.

An embedding is the mean of the last hidden states over a passage's tokens, of norm one. What counts is the cosine to the
dense model's, and whether the end of a passage is still found by its beginning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import EvalPrediction

from strassen_tile.errors import DataError
from strassen_tile.integrations.fitting import Task, Trained
from strassen_tile.integrations.trainer import IGNORED
from strassen_tile.records import Row

_LEAST = 80  # characters of a passage, and of each of its halves 30
_HALF = 30
_ENDS = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


@dataclass(frozen=True)
class Passages:
    """Passages of text, and those of them that are searched: beginnings, and ends in the same order."""

    train: list[str]
    validation: list[str]
    test: list[str]

    @staticmethod
    def halves(passages: Sequence[str]) -> tuple[list[str], list[str]]:
        """First sentences, and what follows them."""
        pairs = [_ENDS.split(passage, maxsplit=1) for passage in passages]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def passages_of(documents: Mapping[str, Sequence[str]], name: str, least: int) -> Passages:
    """Paragraphs of documents, by part ("train", "validation", "test"), that have two sentences or more; each once.

    Raises:
        DataError: a part has fewer than `least`.
    """
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for part in ("train", "validation", "test"):
        paragraphs = (" ".join(text.split()) for one in documents[part] for text in re.split(r"\n\s*\n", one))
        found[part] = []
        for text in paragraphs:
            halves = _ENDS.split(text, maxsplit=1)
            if len(text) >= _LEAST and len(halves) == 2 and min(map(len, halves)) >= _HALF and text not in seen:
                seen.add(text)
                found[part].append(text)
        if len(found[part]) < least:
            raise DataError(
                f"{name}: the {part} text has {len(found[part])} paragraphs of two sentences or more, and {least} are wanted; "
                "give more text, or a smaller batch"
            )
    return Passages(**found)


class SentenceEncoder(Trained):
    """What Trainer drives: tokens and mask (B, N) → {"logits"}: embeddings (B, width) of norm one."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Trainer takes outputs by name."""
        return {"logits": embed(self.model, input_ids, attention_mask)}


def embed(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Embeddings (B, width) of norm one."""
    hidden: Tensor = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    mask = attention_mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1).clamp_min(1), dim=1)


class Tokens:
    """Texts as tokens of a tokenizer of transformers, at most `context` of each."""

    def __init__(self, tokenizer: Any, context: int) -> None:
        self.tokenizer, self.context = tokenizer, context

    def of(self, texts: Sequence[str]) -> list[Tensor]:
        """Those of each text, (n,)."""
        made = self.tokenizer(list(texts), truncation=True, max_length=self.context)["input_ids"]
        return [torch.tensor(each) for each in made]

    def batch(self, tokens: Sequence[Tensor]) -> dict[str, Tensor]:
        """{"input_ids", "attention_mask"}, (B, N), padded on the right."""
        fill = self.tokenizer.pad_token_id or 0
        mask = pad_sequence([torch.ones_like(each) for each in tokens], batch_first=True)
        return {"input_ids": pad_sequence(list(tokens), batch_first=True, padding_value=fill), "attention_mask": mask}


class Encoded(Dataset[dict[str, Tensor]]):
    """Texts and the embeddings that they are to have; `samples` of them drawn at random for every epoch, or all in order."""

    def __init__(self, tokens: Sequence[Tensor], labels: Tensor, samples: int | None = None, seed: int = 0) -> None:
        self.tokens, self.labels, self.samples, self.seed = tokens, labels, samples, seed
        self.order = torch.arange(len(tokens))
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the texts of an epoch."""
        if self.samples is not None:
            generator = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + epoch)
            self.order = torch.randint(len(self.tokens), (self.samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        at = int(self.order[index])
        return {"input_ids": self.tokens[at], "labels": self.labels[at]}


@torch.no_grad()
def _embedded(model: nn.Module, texts: Sequence[str], tokens: Tokens, at_once: int = 64) -> tuple[list[Tensor], Tensor]:
    """Texts as tokens, and their embeddings (n, width) by `model`."""
    each, device, found = tokens.of(texts), next(model.parameters()).device, []
    for at in range(0, len(each), at_once):
        batch = tokens.batch(each[at : at + at_once])
        found.append(embed(model, **{key: value.to(device) for key, value in batch.items()}).cpu())
    return each, torch.cat(found)


@dataclass(frozen=True)
class Targets:
    """Tokens of texts, and the dense model's embeddings: to train on; validation and test as beginnings, then ends."""

    train: tuple[list[Tensor], Tensor]
    validation: tuple[list[Tensor], Tensor]
    test: tuple[list[Tensor], Tensor]


def targets_of(
    model: nn.Module, passages: Passages, tokens: Tokens, *, most: int, held_out: int | None, tested_on: int | None
) -> Targets:
    """What an encoder is to learn from the dense one.

    Args:
        model: dense, in eval mode.
        passages: of the text.
        tokens: how texts become tokens.
        most: passages to train on at most, evenly from all.
        held_out, tested_on: passages to validate and to test on at most.
    """

    def some(texts: list[str], count: int | None) -> list[str]:
        if count is None or count >= len(texts):
            return texts
        return [texts[index * len(texts) // count] for index in range(count)]

    def searched(texts: list[str], count: int | None) -> list[str]:
        first, rest = Passages.halves(some(texts, count))
        return [*first, *rest]

    parts = (
        some(passages.train, most),
        searched(passages.validation, held_out),
        searched(passages.test, tested_on),
    )
    train, validation, test = (_embedded(model, texts, tokens) for texts in parts)
    return Targets(train, validation, test)


def sentence_task(targets: Targets, tokens: Tokens, samples: int, seed: int) -> Task:
    """To follow the dense encoder; records are of cosine (mean), recall (of 1, a fraction) and mrr (mean reciprocal rank)."""

    def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        labels = torch.stack([item["labels"] for item in items])
        return {**tokens.batch([item["input_ids"] for item in items]), "labels": labels}

    return Task(
        wrap=SentenceEncoder,
        train=Encoded(*targets.train, samples, seed),
        validation=Encoded(*targets.validation),
        test=Encoded(*targets.test),
        collate=collate,
        loss=_loss,
        metrics=_metrics,
        measured=_measured,
        layers=("BertLayer",),
    )


def _loss(outputs: dict[str, Tensor], labels: Tensor, count: int | Tensor) -> Tensor:
    """1 − cosine, over the passages that count; `count` is of the numbers of their labels."""
    real = (labels != IGNORED).all(dim=1)
    apart = 1 - (outputs["logits"][real] * labels[real]).sum(dim=1)
    return apart.sum() * labels.shape[1] / count


def _metrics(found: EvalPrediction) -> dict[str, float]:
    embedded, wanted = (np.asarray(each, dtype=np.float64) for each in (found.predictions, found.label_ids))
    cosine = (embedded * wanted).sum(axis=1)
    first, rest = np.split(embedded, 2)
    scores = first @ rest.T
    rank = 1 + (scores > np.diag(scores)[:, None]).sum(axis=1)
    return {"cosine": float(cosine.mean()), "recall": float((rank == 1).mean()), "mrr": float((1 / rank).mean())}


def _measured(metrics: Mapping[str, float], prefix: str, name: str) -> Row:
    row: Row = {f"{name}{key}": metrics[f"{prefix}{key}"] for key in ("cosine", "recall", "mrr")}
    return {**row, f"{name}loss": 1 - metrics[f"{prefix}cosine"]}
