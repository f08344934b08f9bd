"""What transformers' TrainingArguments call the parts of a `Training` that change no sample: schedule and machinery."""

from __future__ import annotations

import os
import warnings
from typing import Any

from strassen_tile.errors import ConfigError
from strassen_tile.integrations.ranks import ranks
from strassen_tile.integrations.training import Training

_LAYERS = ["Block"]  # what FSDP gathers and frees as one: the blocks of our models


def schedule(training: Training, samples: int) -> dict[str, Any]:
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


def machinery(training: Training) -> dict[str, Any]:
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
        found |= {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": list(_LAYERS)}}
    return found


def cores() -> int:
    """How many of this machine's cores fall to each of the processes that train on it, at least 1."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
