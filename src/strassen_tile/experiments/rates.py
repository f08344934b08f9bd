"""Learning rates: tried for every method on the validation data, and the best one taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from strassen_tile.convert import Conversion
from strassen_tile.errors import ConfigError
from strassen_tile.experiments import runner
from strassen_tile.experiments.entries import Compared
from strassen_tile.experiments.methods import Methods
from strassen_tile.experiments.settings import shortest
from strassen_tile.integrations.training import Training, about, check_rate
from strassen_tile.records import Row
from strassen_tile.report.groups import without_rate
from strassen_tile.report.table import number

Rates = Mapping[tuple[str, str], float]
_MOST_JOBS = 1024
TUNING_SEED = 1_000_000  # of the runs that choose learning rates: none that a comparison has by itself


@dataclass(frozen=True, kw_only=True)
class Tuned(Methods):
    """What a comparison has whose rates may be chosen, whatever it trains; together with a `Training`."""

    lr_grid: tuple[float, ...] = field(
        default=(),
        metadata=about("learning rates tried for each method that names none, on the validation data; none: lr"),
    )
    jobs: int = field(default=1, metadata=about("runs at the same time, each on its share of the threads"))

    def __post_init__(self) -> None:
        if not 1 <= self.jobs <= _MOST_JOBS:
            raise ConfigError(f"jobs must be from 1 to {_MOST_JOBS}; got {self.jobs}")
        for lr in self.lr_grid:
            check_rate(lr)
        if len(set(self.lr_grid)) < len(self.lr_grid):
            raise ConfigError(f"lr_grid has a rate twice; got {', '.join(f'{lr:g}' for lr in self.lr_grid)}")
        Methods.__post_init__(self)


T = TypeVar("T", bound=Tuned)


@dataclass(frozen=True)
class Entry:
    """A method of a comparison at its rate: where it stands in the roster, and what rows say of how the rate was found."""

    index: int
    compared: Compared
    chosen: Row


def rated(recipe: Tuned, rates: Rates) -> tuple[list[Entry], list[str]]:
    """The methods of a recipe at the rates to train them with, and a sentence on each that is left out.

    Args:
        recipe: with `lr`, as a `Training` has it.
        rates: of `best_rates`, for the methods whose entries name none.
    """
    grid: Row = {"tuned": ", ".join(shortest(lr) for lr in recipe.lr_grid)}
    found: dict[tuple[str, str], Entry] = {}
    left_out: list[str] = []
    usual = recipe.lr if isinstance(recipe, Training) else None
    for index, one in enumerate(recipe.roster()):
        lr = None if one.rated else rates.get(one.key, usual)
        if lr is not None and not math.isfinite(lr):
            left_out.append(f"{' '.join(filter(None, one.key))} is left out: it diverged at every rate of the grid.")
            continue
        made = one if lr in (None, usual) else one.at(lr or 0.0)
        # An entry may name the rate that another's choice comes to: they are one run.
        chosen = grid if one.key in rates and not one.rated else {}
        found.setdefault((made.method.name, made.variant), Entry(index, made, chosen))
    return list(found.values()), left_out


def tried(recipe: Tuned) -> list[Entry]:
    """Every method whose entry names no learning rate with each of the recipe's grid, for runs of `TUNING_SEED`.

    Raises:
        ConfigError: the recipe has that seed itself.
    """
    if TUNING_SEED in recipe.seeds:
        raise ConfigError(f"seed {TUNING_SEED} is that of the runs that choose rates; take another")
    return [
        Entry(index, one.at(lr), {"tested": False})
        for index, one in enumerate(recipe.roster())
        if not one.rated
        for lr in recipe.lr_grid
    ]


def best_rates(rows: Iterable[Row], grid: Sequence[float]) -> dict[tuple[str, str], float]:
    """For each method of the trials' rows the rate of the grid at which the validation loss ends lowest; NaN if all diverged.

    The folder may have rows of other grids, from before. The loss and not top-1: of a few hundred images, top-1 tells
    neighbouring rates apart by one image or two.
    """
    ends: dict[tuple[str, str], dict[float, float]] = {}
    for row in rows:  # a run's rows are in order: the last one stays
        if row["lr"] not in grid:
            continue
        loss = number(row, "val_loss")
        key = str(row["method"]), without_rate(str(row["variant"]))
        failed = loss is None or not math.isfinite(loss) or bool(row.get("diverged"))
        ends.setdefault(key, {})[float(str(row["lr"]))] = math.inf if failed or loss is None else loss
    best = {key: min(tried, key=tried.__getitem__) for key, tried in ends.items()}
    return {key: lr if math.isfinite(ends[key][lr]) else math.nan for key, lr in best.items()}


def how_it_trains(training: Training) -> Row:
    """Fields of a run's rows: what of its training may differ from entry to entry."""
    keys = ("lr", "optimizer", "weight_decay", "factor_lr", "base_width", "epochs")
    return {key: getattr(training, key) for key in keys}


def run_of(
    recipe: Any,
    entry: Entry,
    seed: int,
    *,
    test: bool,
    build: Callable[[], tuple[nn.Module, Conversion]],
    cost: Callable[[Row, nn.Module, Conversion], Row],
    train: Callable[..., None],
    more: Row | None = None,
) -> runner.Run:
    """The run of an entry with a seed, trained as the entry says where the recipe says otherwise.

    Args:
        recipe: a `Tuned` that is a `Training`.
        entry: the method and its rate.
        seed: of weights, order and draws.
        test: whether the test set is read at the end; runs that choose a rate are not what anybody wants the weights of.
        build, cost: see `runner.Run`; the latter is given further fields first.
        train: (recipe, model, folder, *, seed, test, about, …), see `fitting.train`.
        more: fields of its rows.
    """
    one = entry.compared
    # Other entries have no part in a run, and with its rate one of them could be the same.
    own: dict[str, Any] = {**one.changes, "methods": ("dense",), "save": recipe.save and test}
    training = replace(recipe, **own)
    fields = {**how_it_trains(training), **(more or {}), **entry.chosen}
    return runner.Run(
        method=one.method.name,
        rank=one.method.rank,
        variant=one.variant,
        seed=seed,
        epochs=training.epochs,
        # A method is made of functions that no other process could be handed: builders find it by its number.
        build=build,
        cost=partial(cost, fields),
        train=partial(train, training, seed=seed, test=test, about=about_run(recipe, one, seed)),
        saves=training.save,
    )


def about_run(recipe: Any, one: Compared, seed: int) -> dict[str, object]:
    """What the file of a run's weights says of them."""
    told = {"method": one.method.name, "variant": one.variant, "seed": seed}
    return {**told, "recipe": asdict(recipe), "changes": dict(one.changes)}


def compare(
    recipe: T,
    folder: Path,
    tuning: Callable[[T], runner.Comparison],
    comparison: Callable[[T, Rates], runner.Comparison],
    **callbacks: Any,
) -> list[Row]:
    """Choose learning rates, where the recipe has a grid of them, then train what is compared.

    Args:
        recipe: what is compared.
        folder: for rows and checkpoints; those of the choice lie in `folder`/tuning.
        tuning, comparison: what is run for the choice, and at the rates chosen.
        callbacks: of `runner.run`.

    Returns:
        The rows of what is compared.
    """
    rates: Rates = {}
    if recipe.lr_grid:
        rows = runner.run(tuning(recipe), folder / "tuning", jobs=recipe.jobs, **callbacks)
        rates = best_rates(rows, recipe.lr_grid)
    return runner.run(comparison(recipe, rates), folder, jobs=recipe.jobs, **callbacks)
