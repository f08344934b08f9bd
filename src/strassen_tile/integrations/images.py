"""Image classification through transformers' Trainer: the recipe that every method of a comparison shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EvalPrediction

from strassen_tile.data import ImageSplits, augmented, collate
from strassen_tile.integrations.arguments import training_arguments
from strassen_tile.integrations.averaging import Average, Averaging
from strassen_tile.integrations.draws import SeededDraws
from strassen_tile.integrations.ranks import first
from strassen_tile.integrations.trainer import IGNORED, RecipeTrainer, Watch, fit
from strassen_tile.integrations.training import Training
from strassen_tile.integrations.weights import WEIGHTS, save_weights
from strassen_tile.records import Row


class ImageClassifier(nn.Module):
    """What Trainer drives: pixels (B, C, H, W) → {"logits"}.

    Args:
        model: pixels → logits.
        average: of its weights, to be in checkpoints with it; None: there is none.
    """

    def __init__(self, model: nn.Module, average: Average | None = None) -> None:
        super().__init__()
        self.model, self.average = model, average

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Trainer takes outputs by name."""
        return {"logits": self.model(pixel_values)}


def train_images(
    model: nn.Module,
    splits: ImageSplits,
    folder: Path,
    training: Training,
    *,
    seed: int,
    recorded: int,
    on_step: Callable[[int, int], None],
    on_epoch: Callable[[Row], None],
    test: bool = True,
    about: Mapping[str, object] | None = None,
) -> None:
    """Train; evaluate after every epoch, then write a checkpoint.

    Epochs are evaluated on the validation set, and the test set is read once, after the last; without a validation set,
    epochs are evaluated on the test set.

    Args:
        model: pixels → logits; trained in place. With `training.ema` it is left with the average, which was evaluated.
        splits: what to train, to validate and to test on.
        folder: for checkpoints. Training goes on from the last that is complete, of this network and has its record.
        training: how.
        seed: of order and draws.
        recorded: epochs that have their record. A checkpoint of a later one is not gone on from: records would be missing.
        on_step: called with (step, steps).
        on_epoch: called, in the first process, with epoch (from 1), top1 (per cent) and loss on the test set, where it is
            read, val_top1 and val_loss on a validation set, train_loss and seconds (of training, evaluation excluded).
        test: whether the test set is read after the last epoch where there is a validation set.
        about: what the file of weights says of them. With `training.save` the weights that were evaluated last are in
            `folder`/weights.safetensors before the last record is handed over: who has that record has them.

    Raises:
        ConfigError: the batch cannot be shared by the processes there are.
        DataError: an image cannot be read.
        ImportError: the augmentation needs timm or torchvision, and it is missing.
        DivergedError: a loss or the weights are not finite; the last checkpoint from before is kept.
        OSError: a checkpoint, or the file of weights, cannot be written.
        RankError: in processes other than the first, what stopped the first.
    """

    def loss(outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        count = len(labels) if num_items_in_batch is None else num_items_in_batch
        return classification_loss(outputs["logits"].float(), labels, training.label_smoothing, count)

    def at_end() -> Row:
        if training.save:
            whole = trainer.accelerator.get_state_dict(trainer.model)  # in all processes: FSDP gathers shards
            state = {name.removeprefix("model."): value for name, value in whole.items() if name.startswith("model.")}
            first(partial(save_weights, folder / WEIGHTS, state, about))
        if splits.validation is None or not test:
            return {}
        return _measured(trainer.predict(splits.test).metrics, "test_")

    validating = splits.validation is not None
    average = Average(model) if training.ema else None
    watch = Watch(partial(_measured, prefix="eval_", name="val_" if validating else ""), at_end, on_step, on_epoch)
    trainer = RecipeTrainer(
        training,
        model=ImageClassifier(model, average),
        args=training_arguments(training, folder, samples=len(splits.train), seed=seed),
        train_dataset=SeededDraws(augmented(splits.train, training, splits.num_classes), seed),
        eval_dataset=splits.validation if validating else splits.test,
        data_collator=collate,
        compute_loss_func=loss,
        compute_metrics=_metrics,
        # In this order: what is measured at the end is measured while the average is in place.
        callbacks=[watch] if average is None else [watch, Averaging(model, average, training.ema)],
    )
    fit(trainer, recorded=recorded)


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


def _measured(metrics: Mapping[str, float], prefix: str, name: str = "") -> Row:
    return {f"{name}top1": 100.0 * metrics[f"{prefix}top1"], f"{name}loss": metrics[f"{prefix}cross_entropy"]}
