"""The same network and recipe, dense and made cheaper in several ways, trained from scratch on images.

Every method starts from the same dense network (same seed), which is then converted; the linear layers of the blocks
are, the token module and the head are not. An interrupted comparison goes on where it stopped, from the last
checkpoint of the run it was in.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from strassen_tile import baselines
from strassen_tile.convert import Conversion
from strassen_tile.data import ImageSplits, load_images
from strassen_tile.errors import ConfigError
from strassen_tile.experiments.log import RunLog, claim, locked
from strassen_tile.experiments.recipe import Recipe, fastest_precision
from strassen_tile.files import remove_unfinished
from strassen_tile.integrations.ranks import first, ranks
from strassen_tile.models import t2t_vit
from strassen_tile.records import Row, environment


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
    on_end: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Train every method with every seed; the rows, one an epoch, are in `folder`/rows.json from the moment they exist.

    Processes that torchrun started share every batch; the first of them alone writes, and calls `on_rows` and `on_end`.

    Args:
        recipe: what to compare.
        folder: for rows and checkpoints. Runs already there, of the same recipe, are not run again.
        on_rows: called with all rows so far after every epoch.
        on_progress: called after every training step.
        on_end: called with all rows while the folder is still held against other comparisons.

    Raises:
        ConfigError: the folder holds a comparison with another recipe, or another process works in it; or the batch
            cannot be shared by the processes there are.
        DataError: the data, or what is in the folder, cannot be read.
        RankError: in processes other than the first, what stopped the first.
    """
    world = ranks()
    if recipe.batch_size % world.num_processes:
        raise ConfigError(
            f"batch_size={recipe.batch_size} is of all {world.num_processes} processes together"
            " and does not divide among them"
        )
    splits = load_images(recipe.data, image_size=recipe.image_size, limit=recipe.limit, augment=recipe.augment)
    # Before anything is written: a folder under version control would make the commit look dirty.
    where: Row = {**environment(device=world.device.type, world_size=world.num_processes)}
    with contextlib.ExitStack() as held:
        # The first process has the log; the others a copy, which they do not look at.
        log = first(partial(_opened, recipe, folder, held))
        todo = [(method, seed) for seed in recipe.seeds for method in recipe.roster()]
        for index, (method, seed) in enumerate(todo):
            label = f"{method.label}, seed {seed}"

            def on_step(step: int, steps: int, label: str = label, index: int = index) -> None:
                on_progress(Progress(label, index + 1, len(todo), step, steps))

            _run(recipe, splits, method, seed, log, where, on_step, on_rows)
        first(lambda: on_end(log.rows))
        return first(lambda: log.rows)


def _opened(recipe: Recipe, folder: Path, held: contextlib.ExitStack) -> RunLog:
    """The rows in `folder`, which is this recipe's and this process's until `held` is left."""
    held.enter_context(locked(folder))
    remove_unfinished(folder)
    # More seeds, ranks or methods only add runs. Low rank takes its FLOPs from the ranks: with it they may not change.
    additive = {"seeds", "methods"} | ({"ranks"} if "low-rank" not in recipe.methods else set())
    # Before recipes had a precision, the hardware decided.
    claim(folder, asdict(recipe), additive, unsaid={"precision": fastest_precision()})
    return RunLog(folder / "rows.json")


def _run(
    recipe: Recipe,
    splits: ImageSplits,
    method: baselines.Method,
    seed: int,
    log: RunLog,
    where: Row,
    on_step: Callable[[int, int], None],
    on_rows: Callable[[list[Row]], None],
) -> None:
    """Train one method with one seed, from where it is; nothing if it is finished."""
    run: Row = {"method": method.name, "rank": method.rank, "seed": seed}
    # A folder of its own: that of a finished run is removed with all that is in it.
    work = log.path.parent / "runs" / f"{method.label.replace(' ', '-').replace(':', '')}-{seed}"
    recorded = first(lambda: log.recorded(run))
    if recorded < recipe.epochs:
        # Imported late: transformers takes seconds, and options are checked before it is wanted.
        from strassen_tile.integrations.trainer import train_images

        model, conversion = build(recipe, splits, method, seed)
        fixed = {**run, **cost_fields(model, conversion, splits), "precision": recipe.precision, **where}
        first(partial(_prepare, work))
        train_images(
            model,
            splits,
            work,
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            warmup=recipe.warmup,
            label_smoothing=recipe.label_smoothing,
            precision=recipe.precision,
            seed=seed,
            recorded=recorded,
            on_step=on_step,
            on_epoch=lambda record: on_rows(log.add(run, fixed, record)),
        )
    first(lambda: shutil.rmtree(work, ignore_errors=True))


def _prepare(work: Path) -> None:
    """Make the folder of a run, so that one that cannot be made is said now, or clear up after a run that was killed."""
    work.mkdir(parents=True, exist_ok=True)
    remove_unfinished(work)


def build(recipe: Recipe, splits: ImageSplits, method: baselines.Method, seed: int) -> tuple[nn.Module, Conversion]:
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
    cost = baselines.model_cost(model, one, image)
    return {
        "params": cost.params,
        "flops_per_image": cost.flops,
        "flop_ratio": cost.flop_ratio,
        "flop_ratio_all_in": cost.converted.flop_ratio,
        "flop_ratio_products": cost.converted.product_flop_ratio,
        "share_converted": cost.share,
        "layers_converted": len(conversion.converted),
    }
