"""A `Training` in the words of torch and transformers: its optimiser, and the arguments of Trainer."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from strassen_tile.data.idx import need
from strassen_tile.errors import ConfigError
from strassen_tile.integrations.ranks import ranks, share
from strassen_tile.integrations.training import Optimizer, Training


def make_optimizer(name: Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser called `name` for parameter groups that have their rate and decay.

    "soap" (Vyas et al. 2024, arXiv 2409.11321) is pytorch-optimizer's: Adam in the eigenbasis of each factor of a
    Kronecker approximation of the gradient's covariance, so that it hardly depends on the basis a weight is written in.

    Raises:
        ImportError: "soap", and pytorch-optimizer is not installed.
    """
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    made: torch.optim.Optimizer = need("pytorch_optimizer", "optimizer soap", "optimizers").SOAP(groups)
    return made


def training_arguments(
    training: Training, folder: Path, *, samples: int, seed: int, layers: tuple[str, ...] = ()
) -> TrainingArguments:
    """What Trainer takes for a `Training` on so many samples, with checkpoints in `folder`.

    Args:
        layers: classes of modules that FSDP gathers and frees as one.

    Raises:
        ConfigError: the batch cannot be shared by the processes there are.
    """
    batch = share(training.batch_size)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=training.epochs,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=4 * batch,
        learning_rate=training.lr,
        weight_decay=training.weight_decay,
        **_schedule(training, samples),
        **machinery(training, layers),
        max_grad_norm=1.0,
        seed=seed,
        data_seed=seed,
        eval_strategy="epoch",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,  # a run that diverges should say so
        save_strategy="epoch",
        save_total_limit=2,  # the one before stays until the new one is sealed
        use_cpu=not torch.cuda.is_available(),
        bf16=training.precision == "bfloat16",
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
    return arguments


def _schedule(training: Training, samples: int) -> dict[str, Any]:
    """The learning rate of every step: a linear rise, a cosine, and `cooldown` epochs at the end at `min_lr`.

    Args:
        training: how; its rate is the peak.
        samples: of an epoch. All steps of all processes together are counted, whatever their number.
    """
    epoch = -(-samples // training.batch_size)
    warmup = round(training.warmup * training.epochs * epoch)
    if not (training.min_lr or training.cooldown):
        return {"lr_scheduler_type": "cosine", "warmup_steps": warmup}
    # Trainer's cosine rises again after its end. Of this schedule there are no steps at the peak, which transformers
    # warns of: it would rather find out their number by itself, and put the cool-down there.
    warnings.filterwarnings("ignore", "Both num_training_steps and num_stable_steps are specified")
    return {
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_steps": warmup,
        "lr_scheduler_kwargs": {
            "num_stable_steps": 0,
            "num_decay_steps": max(0, (training.epochs - training.cooldown) * epoch - warmup),
            "min_lr_ratio": training.min_lr / training.lr,
        },
    }


def machinery(training: Training, layers: tuple[str, ...] = ()) -> dict[str, Any]:
    """How it is computed: loading, compilation, sharding.

    Raises:
        ConfigError: weights are to be sharded over one process.
    """
    world = ranks()
    found: dict[str, Any] = {"dataloader_num_workers": min(training.workers, cores())}
    if training.compile:
        found["torch_compile"] = True
    if training.ema:
        # The average is in buffers, alike in all processes as it is; DDP would send them anew before every step.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # Trainer knows no other name yet
        found["ddp_broadcast_buffers"] = False
    if training.fsdp:
        if world.num_processes < 2 or world.device.type == "cpu":  # accelerate would pass over it in silence
            raise ConfigError(
                f"fsdp=true shards over the GPUs of several processes; there are {world.num_processes} processes on "
                f"{world.device.type}. Start more with torchrun, or leave it out"
            )
        found |= {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": list(layers)}}
    return found


def cores() -> int:
    """How many of this machine's cores fall to each of the processes that train on it, at least 1."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
