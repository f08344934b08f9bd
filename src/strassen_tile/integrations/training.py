"""How a network is trained, whatever it is of: one record, handed down whole from a recipe to the trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints

import torch

from strassen_tile.errors import ConfigError
from strassen_tile.nn.optim import FactorLR

Precision = Literal["auto", "float32", "bfloat16"]
Optimizer = Literal["adamw", "sgd", "soap"]


def about(text: str) -> dict[str, str]:
    """Metadata of a field that is a command-line option and a key of recipe files as well: its help text."""
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network is trained: linear warm-up, cosine decay. Fields say what they are in their metadata.

    A field added here reaches the trainer, recipe files, `--set` and the command line. Its default must be what was done
    before there was the field: comparisons begun then go on with it.

    Raises:
        ConfigError: a value that makes no sense, or a precision that this machine does not compute in.
    """

    epochs: int = field(metadata=about("passes over the training set"))
    batch_size: int = field(metadata=about("samples a step, of all processes together"))
    optimizer: Optimizer = field(
        default="adamw",
        metadata=about("AdamW, SGD with Nesterov momentum 0.9, or SOAP (Adam in the eigenbasis of gradients)"),
    )
    lr: float = field(default=1e-3, metadata=about("peak learning rate"))
    weight_decay: float = field(
        default=0.05, metadata=about("decoupled (SGD: as L2); none on encoders, decoders, biases, norms")
    )
    factor_lr: FactorLR = field(
        default="one", metadata=about("one rate, or by a factor's fan-in: its share of what a step changes")
    )
    base_width: int | None = field(
        default=None, metadata=about("features of a layer at which it trains at lr; wider ones at less in proportion")
    )
    warmup: float = field(default=0.1, metadata=about("fraction of the steps in which the learning rate rises"))
    precision: Precision = field(
        default="auto", metadata=about("auto: bfloat16 autocast on a GPU with it, else float32")
    )
    workers: int = field(default=0, metadata=about("processes that load data; results do not depend on them"))
    save: bool = field(
        default=False, metadata=about("keep the weights of finished runs, as models/RUN.safetensors in the folder")
    )
    min_lr: float = field(default=0.0, metadata=about("learning rate that warm-up begins at and the cosine ends at"))
    cooldown: int = field(default=0, metadata=about("epochs, of all, that are trained at min_lr after the cosine"))
    ema: float = field(
        default=0.0,
        metadata=about("decay a step of the average of the weights that is tested; 0: the weights themselves"),
    )
    compile: bool = field(default=False, metadata=about("torch.compile the network"))
    fsdp: bool = field(default=False, metadata=about("shard weights over the processes (FSDP2)"))

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.epochs, self.batch_size) < 1:
            raise ConfigError(f"epochs and batch_size must be positive; got {self.epochs}, {self.batch_size}")
        check_rate(self.lr)
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay must be finite and not negative; got {self.weight_decay}")
        if self.base_width is not None and self.base_width < 1:
            raise ConfigError(f"base_width must be positive, or none; got {self.base_width}")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup must be from 0 to 1; got {self.warmup}")
        if not 0 <= self.workers <= 1024:
            raise ConfigError(f"workers must be from 0 to 1024; got {self.workers}")
        if not 0 <= self.min_lr <= self.lr:
            raise ConfigError(f"min_lr must be from 0 to lr={self.lr}; got {self.min_lr}")
        if not (self.cooldown >= 0 and self.warmup * self.epochs + self.cooldown <= self.epochs):
            raise ConfigError(
                f"cooldown must not be negative, and warmup={self.warmup:g} of epochs={self.epochs} must leave room for it; "
                f"got {self.cooldown} (0 for none)"
            )
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema must be from 0 to below 1; got {self.ema}")
        # Resolved at once, so that recipe and rows say what was computed in, not what was asked for.
        object.__setattr__(self, "precision", resolved_precision(self.precision))


@dataclass(frozen=True, kw_only=True)
class ImageTraining(Training):
    """A `Training` on images: what is done to them and to their labels besides.

    Raises:
        ConfigError: a value that makes no sense.
    """

    label_smoothing: float = field(default=0.1, metadata=about("in training; test losses are without"))
    randaugment: str | None = field(
        default=None, metadata=about("timm's configuration, as rand-m9-mstd0.5-inc1; none: no RandAugment")
    )
    erasing: float = field(default=0.0, metadata=about("probability that part of a training image is erased"))
    mixup: float = field(default=0.0, metadata=about("alpha of the shares of mixed images; 0: not mixed"))
    cutmix: float = field(default=0.0, metadata=about("alpha of the shares of pasted images; 0: none pasted"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.label_smoothing <= 1 and 0 <= self.erasing <= 1):
            raise ConfigError(
                f"label_smoothing and erasing must be from 0 to 1; got {self.label_smoothing}, {self.erasing}"
            )
        if not (0 <= self.mixup < math.inf and 0 <= self.cutmix < math.inf):
            raise ConfigError(f"mixup and cutmix must be finite and not negative; got {self.mixup}, {self.cutmix}")


def check_rate(lr: float) -> None:
    """Raise ConfigError for what is no learning rate."""
    if not 0 < lr < math.inf:
        raise ConfigError(f"lr must be a positive finite number; got {lr}")


def check_choices(record: object) -> None:
    """Refuse values that the `Literal` types of a dataclass's fields do not name.

    Raises:
        ConfigError: a field holds one; the message says which there are.
    """
    for name, hint in get_type_hints(type(record)).items():
        if get_origin(hint) is Literal and getattr(record, name) not in get_args(hint):
            choices = ", ".join(map(str, get_args(hint)))
            raise ConfigError(f"{name} must be one of {choices}; got {getattr(record, name)!r}")


def resolved_precision(precision: Precision) -> Literal["float32", "bfloat16"]:
    """What `precision` means on this machine.

    "auto" is bfloat16 on a GPU that computes in it, float32 otherwise: on a CPU, autocast costs more at the sizes of our
    models than it saves.

    Raises:
        ConfigError: bfloat16 is asked for by name on a GPU without it.
    """
    if precision == "auto":
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if fast else "float32"
    if precision == "bfloat16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ConfigError("precision bfloat16 is not what this GPU computes in; choose float32")
    return precision
