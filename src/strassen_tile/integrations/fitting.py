"""One run of a comparison, whatever it trains: evaluated after every epoch, tested once after the last, its weights kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import EvalPrediction, TrainerCallback

from strassen_tile.integrations.arguments import training_arguments
from strassen_tile.integrations.averaging import Average, Averaging
from strassen_tile.integrations.draws import SeededDraws
from strassen_tile.integrations.ranks import first
from strassen_tile.integrations.trainer import RecipeTrainer, Watch, fit
from strassen_tile.integrations.training import Training
from strassen_tile.integrations.weights import WEIGHTS, save_weights
from strassen_tile.records import Row


class Trained(nn.Module):
    """What Trainer drives: a model, called with what a batch has but labels; its outputs by name, "logits" among them.

    Args:
        model: what is trained.
        average: of its weights, to be in checkpoints with it; None: there is none.
    """

    def __init__(self, model: nn.Module, average: Average | None = None) -> None:
        super().__init__()
        self.model, self.average = model, average


class Measured(Protocol):
    """A record's fields of Trainer's metrics, whose names begin with `prefix`; those of fields with `name`."""

    def __call__(self, metrics: Mapping[str, float], prefix: str, name: str) -> Row: ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained on, and what counts.

    Attributes:
        wrap: makes a `Trained` of a model and its average.
        train: the samples of an epoch. Its random draws are made anew for every seed, epoch and batch.
        validation: what every epoch is evaluated on; None: on the test set.
        test: read once, after the last epoch, where there is a validation set.
        collate: samples → batch.
        loss: (outputs, labels, how many labels count in the batch of all processes) → loss ().
        metrics: of all that an evaluation predicted.
        measured: their fields in records.
        reduce: (logits, labels) → what of them is kept for `metrics`; None: the logits.
        layers: classes of modules that FSDP gathers and frees as one.
    """

    wrap: Callable[[nn.Module, Average | None], Trained]
    train: Dataset[Any]
    validation: Dataset[Any] | None
    test: Dataset[Any]
    collate: Callable[[list[Any]], dict[str, Tensor]]
    loss: Callable[[dict[str, Tensor], Tensor, int | Tensor], Tensor]
    metrics: Callable[[EvalPrediction], dict[str, float]]
    measured: Measured
    reduce: Callable[[Tensor, Tensor], Tensor] | None = None
    layers: tuple[str, ...] = ("Block",)


def train(
    model: nn.Module,
    task: Task,
    folder: Path,
    training: Training,
    *,
    seed: int,
    recorded: int,
    on_step: Callable[[int, int], None],
    on_epoch: Callable[[Row], None],
    test: bool = True,
    about: Mapping[str, object] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train; evaluate after every epoch, then write a checkpoint.

    Args:
        model: trained in place. With `training.ema` it is left with the average, which was evaluated.
        task: what to train, to validate and to test on.
        folder: for checkpoints. Training goes on from the last that is complete, of this network and has its record.
        training: how.
        seed: of order and draws.
        recorded: epochs that have their record. A checkpoint of a later one is not gone on from: records would be missing.
        on_step: called with (step, steps).
        on_epoch: called, in the first process, with epoch (from 1), what was measured on the test set, where it is read,
            and under names with "val_" on a validation set, train_loss and seconds (of training, evaluation excluded).
        test: whether the test set is read after the last epoch where there is a validation set.
        about: what the file of weights says of them. With `training.save` the weights that were evaluated last are in
            `folder`/weights.safetensors before the last record is handed over: who has that record has them.
        callbacks: more of them, for Trainer.

    Raises:
        ConfigError: the batch cannot be shared by the processes there are.
        DataError: a sample cannot be read.
        DivergedError: a loss or the weights are not finite; the last checkpoint from before is kept.
        OSError: a checkpoint, or the file of weights, cannot be written.
        RankError: in processes other than the first, what stopped the first.
    """

    def loss(outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        return task.loss(outputs, labels, labels.numel() if num_items_in_batch is None else num_items_in_batch)

    def at_end() -> Row:
        if training.save:
            whole = trainer.accelerator.get_state_dict(trainer.model)  # in all processes: FSDP gathers shards
            state = {name.removeprefix("model."): value for name, value in whole.items() if name.startswith("model.")}
            first(partial(save_weights, folder / WEIGHTS, state, about))
        if task.validation is None or not test:
            return {}
        return task.measured(trainer.predict(task.test).metrics, "test_", "")

    validating = task.validation is not None
    average = Average(model) if training.ema else None
    watch = Watch(
        lambda metrics: task.measured(metrics, "eval_", "val_" if validating else ""), at_end, on_step, on_epoch
    )
    samples = len(task.train)  # type: ignore[arg-type]
    trainer = RecipeTrainer(
        training,
        model=task.wrap(model, average),
        args=training_arguments(training, folder, samples=samples, seed=seed, layers=task.layers),
        train_dataset=SeededDraws(task.train, seed),
        eval_dataset=task.validation if validating else task.test,
        data_collator=task.collate,
        compute_loss_func=loss,
        compute_metrics=task.metrics,
        preprocess_logits_for_metrics=task.reduce,
        # In this order: what is measured at the end is measured while the average is in place.
        callbacks=[*([watch] if average is None else [watch, Averaging(model, average, training.ema)]), *callbacks],
    )
    fit(trainer, recorded=recorded)


@torch.no_grad()
def measure(model: nn.Module, task: Task, batch_size: int, name: str, *, validation: bool = False) -> Row:
    """What a task's test set, or its validation set, says of a model as it is, under names that begin with `name`."""
    data = task.validation if validation and task.validation is not None else task.test
    wrapped, modes = task.wrap(model, None), {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    predicted, wanted = [], []
    wrapped.eval()
    try:
        for batch in DataLoader(data, batch_size, collate_fn=task.collate):
            labels = batch.pop("labels").to(device)
            logits = wrapped(**{key: value.to(device) for key, value in batch.items()})["logits"]
            predicted.append((logits if task.reduce is None else task.reduce(logits, labels)).cpu())
            wanted.append(labels.cpu())
    finally:
        for module, mode in modes.items():
            module.training = mode
    found = task.metrics(EvalPrediction(torch.cat(predicted).numpy(), torch.cat(wanted).numpy()))
    prefix = "eval_" if validation else "test_"
    return task.measured({f"{prefix}{key}": value for key, value in found.items()}, prefix, name)
