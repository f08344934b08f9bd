"""What a comparison trains: everything that is the same for all of its methods, and which methods those are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from strassen_tile import baselines
from strassen_tile.errors import ConfigError
from strassen_tile.nn import STLConfig

METHODS = ("dense", "2:4", "stl", "low-rank", "dense+mix")


@dataclass(frozen=True)
class Recipe:
    """Everything that is the same for all methods of a comparison. The command's options, resolved.

    Attributes:
        data: "digits", or the path of an IDX or image folder.
        model: a name that `t2t_vit` takes.
        image_size: None for the data's own.
        methods: of `METHODS`, in the order they are run.
        ranks: of the STL runs.
        seeds: one run each.
        tile, mixing, encoder_scope, init: of `STLConfig`; init "random" or "approximate" (best known basis, Ŵ = F·W).
        epochs, batch_size, lr, weight_decay, warmup, label_smoothing, drop_path: of the training; `batch_size` counts
            the images of a step on all devices together.
        augment: shift and flip the training images.
        limit: train on that many images only.
        precision: "float32" or "bfloat16" (autocast).
    """

    data: str
    model: str
    image_size: int | None
    methods: tuple[str, ...]
    ranks: tuple[int, ...]
    seeds: tuple[int, ...]
    tile: tuple[int, int, int]
    mixing: str
    encoder_scope: str
    init: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.05
    warmup: float = 0.1
    label_smoothing: float = 0.1
    drop_path: float = 0.0
    augment: bool = True
    limit: int | None = None
    precision: str = "float32"

    def __post_init__(self) -> None:
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ConfigError(f"unknown methods {', '.join(unknown)}; there are {', '.join(METHODS)}")
        if not self.methods or not self.seeds or ("stl" in self.methods and not self.ranks):
            raise ConfigError("a comparison needs at least one method, one seed, and one rank for stl")
        if self.init not in ("random", "approximate"):
            raise ConfigError(f"init must be random or approximate; got {self.init!r}")
        if min(self.epochs, self.batch_size) < 1 or not self.lr > 0:
            raise ConfigError(
                f"epochs, batch_size and lr must be positive: {self.epochs}, {self.batch_size}, {self.lr}"
            )
        if unusable := [seed for seed in self.seeds if not 0 <= seed < 2**31]:
            raise ConfigError(f"seeds are numbers from 0 to 2**31 - 1; got {', '.join(map(str, unusable))}")
        check_precision(self.precision)

        for rank in self.ranks if "stl" in self.methods else ():
            self.stl_config(rank).load_basis()  # a basis that does not exist is said now, not after the dense runs

    def stl_config(self, rank: int) -> STLConfig:
        """The configuration of the STL run of this rank."""
        return STLConfig(
            tile=self.tile, rank=rank, basis=self.init, mixing=self.mixing, encoder_scope=self.encoder_scope  # type: ignore[arg-type]
        )  # fmt: skip

    def roster(self) -> list[baselines.Method]:
        """The methods, STL once for each rank. Low rank gets the FLOP ratio of the first rank's products."""
        p, q, s = self.tile
        found: list[baselines.Method] = []
        for name in self.methods:
            if name == "stl":
                found += [baselines.stl(self.stl_config(rank)) for rank in self.ranks]
            elif name == "low-rank":
                found.append(baselines.low_rank(min(self.ranks) / (p * q * s)))
            else:
                found.append(
                    {"dense": baselines.dense, "2:4": baselines.sparse_24, "dense+mix": baselines.token_mix}[name]()
                )
        return found


def fastest_precision() -> str:
    """bfloat16 on a GPU that computes in it; float32 on a CPU, where autocast at these sizes costs more than it saves."""
    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


def check_precision(precision: str) -> None:
    """Refuse what this machine does not compute in, before anything is trained.

    Raises:
        ConfigError: `precision` is neither float32 nor bfloat16, or is bfloat16 on a GPU without it.
    """
    if precision not in ("float32", "bfloat16"):
        raise ConfigError(f"precision must be float32 or bfloat16; got {precision!r}")
    if precision == "bfloat16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ConfigError("precision bfloat16 is not what this GPU computes in; choose float32")
