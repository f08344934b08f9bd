"""Image classification through transformers' Trainer: the recipe every method of a comparison shares.

What a run comes to depends on the recipe alone, not on how many processes share its batches, nor on where it was
stopped. Only draws (augmentation, drop path) differ with the number of processes, and start anew in a run that goes on
with another number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, set_seed
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from strassen_tile.data import ImageSplits, collate
from strassen_tile.integrations.checkpoints import resumable, seal
from strassen_tile.integrations.ranks import first, ranks
from strassen_tile.nn import param_groups
from strassen_tile.records import Row

_IGNORED = -100  # the label of what counts for nothing, to Trainer and to cross_entropy


class ImageClassifier(nn.Module):
    """What Trainer drives: pixels (B, C, H, W) → {"logits"}."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Trainer takes outputs by name."""
        return {"logits": self.model(pixel_values)}


class ImageTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    """Trainer with parameter groups, with last batches that count as they are, and with checkpoints that are sealed."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; encoders, decoders, biases and norms without decay."""
        if self.optimizer is None:  # type: ignore[has-type, unused-ignore]
            arguments = self.args
            groups = param_groups(self.model, arguments.learning_rate, arguments.weight_decay)
            betas = (arguments.adam_beta1, arguments.adam_beta2)
            self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=arguments.adam_epsilon)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The next batches, and how many images count in them over all processes."""
        return super().get_batch_samples(map(self._without_padding, epoch_iterator), num_batches, device)

    def _without_padding(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Several processes need equal shares: accelerate fills the last batch up with images that were trained on."""
        at, labels = self.accelerator.gradient_state, batch["labels"]
        if at.end_of_dataloader and at.remainder > 0:
            labels[max(0, at.remainder - self.args.process_index * len(labels)) :] = _IGNORED
        return batch

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Private, because no public method and no callback encloses the writing. What fails in it has to reach all
        # processes, and torch and safetensors have errors of their own where a disk is full.
        problem = None
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            problem = str(error).partition("\n")[0]
        problems = [text for text in gather_object([problem]) if text is not None]  # waits for all to have written
        first(partial(self._seal, problems))

    def _seal(self, problems: list[str]) -> None:
        folder, epoch = Path(self.args.output_dir), round(self.state.epoch)
        try:
            if problems:
                raise OSError(problems[0])
            seal(folder / f"checkpoint-{self.state.global_step}", self.model, epoch)
        except OSError as error:
            resumable(folder, self.model, epoch)  # removes what is there of the new one
            raise OSError(f"no checkpoint could be written in {folder}; is the disk full? {error}") from error


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
        """Stop the clock. After the last epoch there is nothing to go on with."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.started
        control.should_save = state.global_step < state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Keep the epoch's mean training loss."""
        if logs and "loss" in logs:
            self.train_loss = logs["loss"]

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Hand over the epoch's record; Trainer saves after it, so that an epoch with a checkpoint has its record."""
        record: Row = {
            "epoch": round(state.epoch),
            "top1": 100.0 * metrics["eval_top1"],
            "loss": metrics["eval_cross_entropy"],
            "train_loss": self.train_loss,
            "seconds": self.seconds,
        }
        first(partial(self.on_epoch, record))


def train_images(
    model: nn.Module,
    splits: ImageSplits,
    folder: Path,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    warmup: float,
    label_smoothing: float,
    precision: str,
    seed: int,
    recorded: int,
    on_step: Callable[[int, int], None],
    on_epoch: Callable[[Row], None],
) -> None:
    """Train with AdamW, linear warm-up and cosine decay; evaluate after every epoch, then write a checkpoint.

    Args:
        model: pixels → logits; trained in place.
        splits: what to train and to test on.
        folder: for checkpoints. Training goes on from the last that is complete, of this network and has its record.
        epochs: passes over the training set.
        batch_size: images a step, of all processes together; a multiple of their number.
        lr, weight_decay: of AdamW.
        warmup: fraction of the steps in which the rate rises.
        label_smoothing: in training; test losses are without, to compare with others'.
        precision: "float32", or "bfloat16": autocast, with parameters in float32.
        seed: of order and draws.
        recorded: epochs that have their record. A checkpoint of a later one is not gone on from: records would be missing.
        on_step: called with (step, steps).
        on_epoch: called, in the first process, with epoch (from 1), top1 (per cent), loss, train_loss and seconds (of
            training, evaluation excluded).

    Raises:
        OSError: a checkpoint cannot be written.
        RankError: in processes other than the first, what stopped the first.
    """

    def loss(outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        count = len(labels) if num_items_in_batch is None else num_items_in_batch
        logits = outputs["logits"].float()
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum") / count

    share = batch_size // ranks().num_processes
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=share,
        per_device_eval_batch_size=4 * share,
        learning_rate=lr,
        weight_decay=weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=round(warmup * epochs * -(-len(splits.train) // batch_size)),
        max_grad_norm=1.0,
        seed=seed,
        data_seed=seed,
        eval_strategy="epoch",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,  # a run that diverges should say so
        save_strategy="epoch",
        save_total_limit=2,  # the one before stays until the new one is sealed
        use_cpu=not torch.cuda.is_available(),
        bf16=precision == "bfloat16",
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
        disable_tqdm=True,
        report_to=[],
        log_level="error",
    )
    # Else Trainer takes all the GPUs a single process sees, in nn.DataParallel, each with a batch of its own. There is
    # no argument for it; Trainer itself sets this one where a model says it is spread over the devices already.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    classifier = ImageClassifier(model)
    trainer = ImageTrainer(
        model=classifier,
        args=arguments,
        train_dataset=splits.train,
        eval_dataset=splits.test,
        data_collator=collate,
        compute_loss_func=loss,
        compute_metrics=_metrics,
        callbacks=[Watch(on_step, on_epoch)],
    )
    trainer.remove_callback(PrinterCallback)  # logs go to the table, not to standard output
    set_seed(seed, device_specific=True)  # else every process shifts and flips its images alike
    checkpoint = first(partial(resumable, folder, classifier, recorded))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _metrics(found: EvalPrediction) -> dict[str, float]:
    """Over the test set, each image once. Trainer's own loss is a mean over batches of which some are filled up."""
    logits, labels = torch.as_tensor(found.predictions).float(), torch.as_tensor(found.label_ids)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return {
        "top1": float((logits.argmax(-1) == labels).double().mean()),
        "cross_entropy": float(losses.double().mean()),
    }
