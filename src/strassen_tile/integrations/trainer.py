"""What training has in common, whatever is trained: transformers' Trainer, made to do what a `Training` says.

What a run comes to depends on that record and the seed, not on how many processes share its batches, how many load its
data, nor on where it was stopped. Only draws (augmentation, dropout) differ with the number of processes that train, and
start anew in a run that goes on with another number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback

from strassen_tile.errors import DataError, DivergedError
from strassen_tile.integrations.arguments import make_optimizer
from strassen_tile.integrations.checkpoints import resumable, seal
from strassen_tile.integrations.divergence import Divergence
from strassen_tile.integrations.ranks import first
from strassen_tile.integrations.training import Training
from strassen_tile.nn import param_groups
from strassen_tile.records import Row

IGNORED = -100  # the label of what counts for nothing, to Trainer and to cross_entropy


class RecipeTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    """Trainer with parameter groups, with last batches that count as they are, and with checkpoints that are sealed.

    Args:
        training: what is to be done.
        more: Trainer's own arguments.
    """

    def __init__(self, training: Training, **more: Any) -> None:
        self.training = training
        super().__init__(**more)
        self.divergence = Divergence(self.model)
        self.add_callback(self.divergence)
        self.add_callback(_Epochs(self.train_dataset))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's; encoders, decoders, biases and norms without decay."""
        if self.optimizer is None:  # type: ignore[has-type, unused-ignore]
            how = self.training
            groups = param_groups(
                self.model, how.lr, how.weight_decay, factor_lr=how.factor_lr, base_width=how.base_width
            )
            self.optimizer = make_optimizer(how.optimizer, groups)
        return self.optimizer

    def training_step(self, *arguments: Any, **more: Any) -> Tensor:
        """Forward and backward; the loss (), which is noted to see whether it is finite."""
        loss: Tensor = super().training_step(*arguments, **more)
        self.divergence.note(loss, self.state.global_step + 1)
        return loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The next batches, and how many labels count in them over all processes."""
        return super().get_batch_samples(map(self._without_padding, epoch_iterator), num_batches, device)

    def _without_padding(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Several processes need equal shares: accelerate fills the last batch up with samples that were trained on."""
        at, labels = self.accelerator.gradient_state, batch["labels"]
        if at.end_of_dataloader and at.remainder > 0:
            labels[max(0, at.remainder - self.args.process_index * len(labels)) :] = IGNORED
        return batch

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Private, because no public method and no callback encloses the writing. What fails in it has to reach all
        # processes, and torch and safetensors have errors of their own where a disk is full.
        problem = None
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            problem = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        problems = [text for text in gather_object([problem]) if text is not None]  # waits for all to have written
        first(partial(self._seal, problems))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # Private, because safetensors refuses weights that are tied, and Trainer has no other place to say what is written.
        seen: set[int] = set()
        state = self.model.state_dict() if state_dict is None else state_dict
        apart = {}
        for name, value in state.items():
            place = value.untyped_storage().data_ptr()
            apart[name] = value.clone() if place in seen else value
            seen.add(place)
        super()._save(output_dir, apart)

    def _seal(self, problems: list[str]) -> None:
        folder, epoch = Path(self.args.output_dir), round(self.state.epoch)
        try:
            if problems:
                raise OSError(problems[0])
            seal(folder / f"checkpoint-{self.state.global_step}", self.model, epoch)
        except OSError as error:
            resumable(folder, self.model, epoch)  # removes what is there of the new one
            raise OSError(f"no checkpoint could be written in {folder}; is the disk full? {error}") from error


class _Epochs(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Tells the data set which epoch begins: accelerate does so in a single process alone."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the loader's workers start."""
        if (told := getattr(self.data, "set_epoch", None)) is not None:
            told(round(state.epoch or 0))


class Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Reports steps as they go and one record an epoch; the time is that of training, evaluation excluded.

    Args:
        measured: the record's fields that an evaluation comes to, from Trainer's metrics ("eval_…").
        at_end: further fields of the last epoch's record, measured once; called in all processes.
        on_step: called with (step, steps).
        on_epoch: called, in the first process, with epoch (from 1), what was measured, train_loss and seconds.
    """

    def __init__(
        self,
        measured: Callable[[Mapping[str, float]], Row],
        at_end: Callable[[], Row],
        on_step: Callable[[int, int], None],
        on_epoch: Callable[[Row], None],
    ) -> None:
        self.measured, self.at_end, self.on_step, self.on_epoch = measured, at_end, on_step, on_epoch
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
        record: Row = {"epoch": round(state.epoch), **self.measured(metrics)}
        if state.global_step >= state.max_steps:
            record |= self.at_end()
        first(partial(self.on_epoch, {**record, "train_loss": self.train_loss, "seconds": self.seconds}))


def fit(trainer: RecipeTrainer, *, recorded: int) -> None:
    """Train from the last checkpoint that is complete, of this network and of no later epoch than `recorded`.

    Raises:
        DataError: a sample cannot be read.
        DivergedError: a loss or the weights are not finite, in all processes. The last checkpoint from before is kept.
        OSError: a checkpoint cannot be written.
        RankError: in processes other than the first, what stopped the first.
    """
    trainer.remove_callback(PrinterCallback)  # logs go to the table, not to standard output
    set_seed(trainer.args.seed, device_specific=True)  # else every process draws alike
    checkpoint = first(partial(resumable, Path(trainer.args.output_dir), trainer.model, recorded))
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except DivergedError as error:
        folder, before = Path(trainer.args.output_dir), error.epoch - 1
        kept = first(partial(resumable, folder, trainer.model, before))
        where = "no epoch had ended before" if kept is None else f"the last good weights are in {kept}"
        way_out = f"give a lower lr than {trainer.args.learning_rate:g} or more warmup"
        raise DivergedError(f"{error}; {way_out}; {where}", epoch=error.epoch, step=error.step) from error
    except DataError as error:
        if "\n" not in (text := str(error).strip()):
            raise
        # From a worker it comes with the worker's traceback in its text; the last line is what it said there.
        raise DataError(text.rpartition("\n")[2].partition(": ")[2]) from error
