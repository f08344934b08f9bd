"""Image classification as a task: what batches, loss and top-1 are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EvalPrediction

from strassen_tile.data import ImageSplits, augmented, collate
from strassen_tile.integrations.fitting import Task, Trained, train
from strassen_tile.integrations.trainer import IGNORED
from strassen_tile.integrations.training import ImageTraining
from strassen_tile.records import Row


class ImageClassifier(Trained):
    """What Trainer drives: pixels (B, C, H, W) → {"logits"}."""

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Trainer takes outputs by name."""
        return {"logits": self.model(pixel_values)}


def train_images(
    model: nn.Module, splits: ImageSplits, folder: Path, training: ImageTraining, **seed_records_and_callbacks: Any
) -> None:
    """Train on images: `fitting.train`, whose records are of top1 (per cent) and loss.

    Args:
        model: pixels → logits; trained in place.
        splits: what to train, to validate and to test on.
        folder: for checkpoints.
        training: how.

    Raises:
        ImportError: the augmentation needs timm or torchvision, and it is missing.
    """

    def loss(outputs: dict[str, Tensor], labels: Tensor, count: int | Tensor) -> Tensor:
        return classification_loss(outputs["logits"].float(), labels, training.label_smoothing, count)

    task = Task(
        wrap=ImageClassifier,
        train=augmented(splits.train, training, splits.num_classes),
        validation=splits.validation,
        test=splits.test,
        collate=collate,
        loss=loss,
        metrics=_metrics,
        measured=_measured,
    )
    train(model, task, folder, training, **seed_records_and_callbacks)


def classification_loss(logits: Tensor, labels: Tensor, smoothing: float, count: int | Tensor) -> Tensor:
    """Cross-entropy over `count`, where images labelled `IGNORED` count for nothing; ().

    Args:
        logits: (B, C).
        labels: of each image its class, int64 (B,), or, of mixed images, the classes' shares, (B, C).
        smoothing: the part of a label that all classes share.
        count: the numbers in labels, over all processes, that are not `IGNORED`.
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum") / count
    losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    # Each image that counts has a number for each class in `count`.
    return losses.where(labels[:, 0] != IGNORED, 0.0).sum() * labels.shape[1] / count


def _metrics(found: EvalPrediction) -> dict[str, float]:
    """Over the test set, each image once. Trainer's own loss is a mean over batches of which some are filled up."""
    logits, labels = torch.as_tensor(found.predictions).float(), torch.as_tensor(found.label_ids)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return {
        "top1": float((logits.argmax(-1) == labels).double().mean()),
        "cross_entropy": float(losses.double().mean()),
    }


def _measured(metrics: Mapping[str, float], prefix: str, name: str) -> Row:
    return {f"{name}top1": 100.0 * metrics[f"{prefix}top1"], f"{name}loss": metrics[f"{prefix}cross_entropy"]}
