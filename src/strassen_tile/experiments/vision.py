"""The same network and recipe, dense and made cheaper in several ways, trained from scratch on images.

Every method starts from the same dense network (same seed), which is then converted; the linear layers of the blocks
are, the token module and the head are not. An interrupted comparison goes on where it stopped, from the last
checkpoint of the run it was in.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from strassen_tile import rivals
from strassen_tile.convert import Conversion
from strassen_tile.data import ImageSplits, load_images
from strassen_tile.errors import ConfigError
from strassen_tile.experiments.log import RunLog, claim
from strassen_tile.models import t2t_vit
from strassen_tile.nn import STLConfig
from strassen_tile.report.rows import Row, environment

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
        epochs, batch_size, lr, weight_decay, warmup, label_smoothing, drop_path: of the training.
        augment: shift and flip the training images.
        limit: train on that many images only.
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

        for rank in self.ranks if "stl" in self.methods else ():
            self.stl_config(rank).load_basis()  # a basis that does not exist is said now, not after the dense runs

    def stl_config(self, rank: int) -> STLConfig:
        """The configuration of the STL run of this rank."""
        return STLConfig(
            tile=self.tile, rank=rank, basis=self.init, mixing=self.mixing, encoder_scope=self.encoder_scope  # type: ignore[arg-type]
        )  # fmt: skip

    def roster(self) -> list[rivals.Method]:
        """The methods, STL once for each rank. Low rank gets the FLOP ratio of the first rank's products."""
        p, q, s = self.tile
        found: list[rivals.Method] = []
        for name in self.methods:
            if name == "stl":
                found += [rivals.stl(self.stl_config(rank)) for rank in self.ranks]
            elif name == "low-rank":
                found.append(rivals.low_rank(min(self.ranks) / (p * q * s)))
            else:
                found.append({"dense": rivals.dense, "2:4": rivals.sparse_24, "dense+mix": rivals.token_mix}[name]())
        return found


@dataclass(frozen=True)
class Progress:
    """Where a comparison is: run `run` of `runs`, and `step` of `steps` in it."""

    label: str
    run: int
    runs: int
    step: int
    steps: int


def in_blocks(module: nn.Module, name: str) -> bool:
    """The layers the paper replaces: the linear ones of the transformer blocks."""
    return name.startswith("blocks.")


def compare(
    recipe: Recipe,
    folder: Path,
    *,
    on_rows: Callable[[list[Row]], None] = lambda rows: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> list[Row]:
    """Train every method with every seed; the rows, one an epoch, are in `folder`/rows.json from the moment they exist.

    Args:
        recipe: what to compare.
        folder: for rows and checkpoints. Runs already there, of the same recipe, are not run again.
        on_rows: called with all rows so far after every epoch.
        on_progress: called after every training step.

    Raises:
        ConfigError: the folder holds a comparison with another recipe.
        DataError: the data cannot be read.
    """
    splits = load_images(recipe.data, image_size=recipe.image_size, limit=recipe.limit, augment=recipe.augment)
    where = environment()  # before anything is written: a folder under version control would make the commit look dirty
    # More seeds, ranks or methods only add runs. Low rank takes its FLOPs from the ranks: with it they may not change.
    additive = {"seeds", "methods"} | ({"ranks"} if "low-rank" not in recipe.methods else set())
    claim(folder, asdict(recipe), additive)
    log = RunLog(folder / "rows.json")
    todo = [(method, seed) for seed in recipe.seeds for method in recipe.roster()]
    for index, (method, seed) in enumerate(todo):
        run: Row = {"method": method.name, "rank": method.rank, "seed": seed}
        if recipe.epochs in [row["epoch"] for row in log.of(run)]:
            continue
        model, conversion = build(recipe, splits, method, seed)
        fixed = {**run, **cost_fields(model, conversion, splits), **where}

        def step(at: int, steps: int, label: str = method.label, seed: int = seed, index: int = index) -> None:
            on_progress(Progress(f"{label}, seed {seed}", index + 1, len(todo), at, steps))

        def epoch(record: Row, run: Row = run, fixed: Row = fixed) -> None:
            on_rows(log.add(run, fixed, record))

        checkpoints = folder / "runs" / f"{method.label.replace(' ', '-').replace(':', '')}-{seed}"
        _train(recipe, splits, model, seed, checkpoints, step, epoch)
        shutil.rmtree(checkpoints, ignore_errors=True)
    return log.rows


def build(recipe: Recipe, splits: ImageSplits, method: rivals.Method, seed: int) -> tuple[nn.Module, Conversion]:
    """The network of `recipe` with the weights of `seed`, converted by `method`."""
    torch.manual_seed(seed)
    model = t2t_vit(
        recipe.model,
        num_classes=splits.num_classes,
        image_size=splits.image_size,
        in_channels=splits.channels,
        drop_path=recipe.drop_path,
    )
    example = torch.randn(2, splits.channels, splits.image_size, splits.image_size)
    return model, method.apply(model, example, in_blocks)


def cost_fields(model: nn.Module, conversion: Conversion, splits: ImageSplits) -> Row:
    """Parameters and FLOPs of one image. Ratios are fractions of dense, as everywhere in the code."""
    image = torch.randn(1, splits.channels, splits.image_size, splits.image_size)
    seen = {name: [(1, *shape[1:]) for shape in shapes] for name, shapes in conversion.calls.items()}
    one = Conversion(conversion.converted, conversion.skipped, seen)
    cost = rivals.model_cost(model, one, image)
    return {
        "params": cost.params,
        "flops_per_image": cost.flops,
        "flop_ratio": cost.flop_ratio,
        "flop_ratio_all_in": cost.converted.flop_ratio,
        "flop_ratio_products": cost.converted.product_flop_ratio,
        "share_converted": cost.share,
        "layers_converted": len(conversion.converted),
    }


def _train(
    recipe: Recipe,
    splits: ImageSplits,
    model: nn.Module,
    seed: int,
    checkpoints: Path,
    on_step: Callable[[int, int], None],
    on_epoch: Callable[[Row], None],
) -> None:
    # Imported late: transformers takes seconds, and options are checked before it is wanted.
    from strassen_tile.integrations.trainer import train_images

    train_images(
        model,
        splits.train,
        splits.test,
        checkpoints,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        warmup=recipe.warmup,
        label_smoothing=recipe.label_smoothing,
        seed=seed,
        resume=any(checkpoints.glob("checkpoint-*")),
        on_step=on_step,
        on_epoch=on_epoch,
    )
