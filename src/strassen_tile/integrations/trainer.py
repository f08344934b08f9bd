"""transformers' Trainer for images: our parameter groups, accuracy, and timing of training alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from strassen_tile.data import collate
from strassen_tile.nn import param_groups

Row = dict[str, str | int | float | bool | None]  # as in `report.rows`, which lies above


class ImageClassifier(nn.Module):
    """What Trainer drives: pixels (B, C, H, W) and labels (B,) → {"loss", "logits"}."""

    def __init__(self, model: nn.Module, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy, smoothed in training only so that test losses compare with others'."""
        logits = self.model(pixel_values)
        smoothing = self.label_smoothing if self.training else 0.0
        return {"loss": F.cross_entropy(logits.float(), labels, label_smoothing=smoothing), "logits": logits}


class ImageTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    """Trainer whose optimiser takes the parameter groups of `strassen_tile.param_groups`."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; encoders, decoders, biases and norms without decay."""
        if self.optimizer is None:  # type: ignore[has-type, unused-ignore]
            arguments = self.args
            groups = param_groups(self.model, arguments.learning_rate, arguments.weight_decay)
            betas = (arguments.adam_beta1, arguments.adam_beta2)
            self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=arguments.adam_epsilon)
        return self.optimizer


class Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Reports steps as they go and one record an epoch; the time is that of training, evaluation excluded."""

    def __init__(self, on_step: Callable[[int, int], None], on_epoch: Callable[[Row], None]) -> None:
        self.on_step, self.on_epoch = on_step, on_epoch
        self.started, self.seconds, self.train_loss = 0.0, 0.0, float("nan")

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say how far training is."""
        self.on_step(state.global_step, state.max_steps)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Keep the epoch's mean training loss."""
        if logs and "loss" in logs:
            self.train_loss = logs["loss"]

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Hand over the epoch's record."""
        self.on_epoch(
            {
                "epoch": round(state.epoch),
                "top1": 100.0 * metrics["eval_top1"],
                "loss": metrics["eval_loss"],
                "train_loss": self.train_loss,
                "seconds": self.seconds,
            }
        )


def train_images(
    model: nn.Module,
    train: torch.utils.data.Dataset[Any],
    test: torch.utils.data.Dataset[Any],
    folder: Path,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    warmup: float,
    label_smoothing: float,
    seed: int,
    resume: bool,
    on_step: Callable[[int, int], None],
    on_epoch: Callable[[Row], None],
) -> None:
    """Train with AdamW, linear warm-up and cosine decay; evaluate and checkpoint every epoch.

    bfloat16 autocast on a GPU that has it; float32 on a CPU, where autocast at these sizes costs more than it saves.

    Args:
        model: pixels → logits; trained in place.
        train, test: datasets of {"pixel_values", "labels"}.
        folder: where the last checkpoint is kept.
        warmup: fraction of the steps.
        resume: continue from the checkpoint in `folder`.
        on_step: called with (step, steps).
        on_epoch: called with epoch, top1 (per cent), loss, train_loss and seconds (training time of the epoch).
    """
    steps = epochs * -(-len(train) // batch_size)  # type: ignore[arg-type]
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=4 * batch_size,
        learning_rate=lr,
        weight_decay=weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=round(warmup * steps),
        max_grad_norm=1.0,
        seed=seed,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=[],
        log_level="error",
    )
    trainer = ImageTrainer(
        model=ImageClassifier(model, label_smoothing),
        args=arguments,
        train_dataset=train,
        eval_dataset=test,
        data_collator=collate,
        compute_metrics=lambda p: {"top1": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=[Watch(on_step, on_epoch)],
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":  # logs go to the table, not to standard output
            trainer.remove_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
