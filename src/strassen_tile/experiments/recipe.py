"""What a comparison on images trains: everything that is the same for all of its methods, and which methods those are.

Recipes are TOML files, those beside this module by name; what a file does not say is the default of a field below.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from strassen_tile.data import ImageSplits
from strassen_tile.errors import ConfigError
from strassen_tile.experiments.methods import Methods
from strassen_tile.experiments.settings import pairs, read_toml, settings_of, short, values_of
from strassen_tile.integrations.training import Training, about

RECIPES = Path(__file__).with_name("recipes")
_SMALL_IMAGE = 32
_MOST_JOBS = 1024


@dataclass(frozen=True, kw_only=True)
class Recipe(Methods, Training):
    """Everything that is the same for all methods of a comparison, and which those are. Fields say what they are.

    Raises:
        ConfigError: a value that makes no sense.
        BasisError: there is no basis for an STL run to start from.
    """

    data: str = field(metadata=about("digits (bundled), or a folder: IDX files, or images by class; or hub:NAME"))
    model: str = field(default="auto", metadata=about("T2T-ViT size; auto: by image size"))
    image_size: int | None = field(
        default=None, metadata=about("side in pixels; none: as stored, and of image folders at most 224")
    )
    augment: bool = field(default=True, metadata=about("shift or crop, and flip, training images"))
    drop_path: float = field(default=0.0, metadata=about("stochastic depth"))
    limit: int | None = field(default=None, metadata=about("train on that many images only"))
    validation: int = field(
        default=0,
        metadata=about(
            "training images held out: epochs are evaluated on them, and the test set is read once, after the last; "
            "0: epochs are evaluated on the test set"
        ),
    )
    lr_grid: tuple[float, ...] = field(
        default=(),
        metadata=about("learning rates tried for each method that names none, on the validation images; none: lr"),
    )
    scope: Literal["blocks", "all"] = field(
        default="blocks",
        metadata=about("linear layers replaced: of the blocks, or of the token module too; not the head"),
    )
    checkpoint: str | None = field(
        default=None, metadata=about("weights that the dense network starts from; none: at random, by seed")
    )
    qk_scale: float | None = field(
        default=None,
        metadata=about("factor of attention's products; none: head_dim^-0.5; published checkpoints: embed_dim^-0.5"),
    )
    jobs: int = field(default=1, metadata=about("runs at the same time, each on its share of the threads"))

    def __post_init__(self) -> None:
        Training.__post_init__(self)
        if self.validation < 0 or not 1 <= self.jobs <= _MOST_JOBS:
            raise ConfigError(
                f"validation must not be negative, and jobs from 1 to {_MOST_JOBS}; got {self.validation}, {self.jobs}"
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be a positive number of training images, or none; got {self.limit}")
        if self.lr_grid and not self.validation:
            raise ConfigError("lr_grid is chosen from on validation images: say how many, as in validation=1000")
        for lr in self.lr_grid:
            replace(self, lr=lr, lr_grid=(), methods=("dense",))  # refuses what is no rate
        if len(set(self.lr_grid)) < len(self.lr_grid):
            raise ConfigError(f"lr_grid has a rate twice; got {', '.join(f'{lr:g}' for lr in self.lr_grid)}")
        Methods.__post_init__(self)

    def fitted(self, splits: ImageSplits) -> Recipe:
        """This recipe with what it leaves to the data: image size and model."""
        by_size = "t2t_vit_micro" if splits.image_size <= _SMALL_IMAGE else "t2t_vit_7"
        return replace(self, image_size=splits.image_size, model=by_size if self.model == "auto" else self.model)


def recipe_of(name: str | None = None, changes: Sequence[str] = (), options: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from its file, changed.

    Args:
        name: of a recipe that comes with the package, or the path of a TOML file. None: the one for the data.
        changes: key=value, each.
        options: values by key, of command-line options.

    Raises:
        ConfigError: no such recipe, an unknown key, a value that makes no sense, or no data.
    """
    options = options or {}
    given = values_of(Recipe, pairs(changes, "--set"), "--set")
    if twice := sorted(given.keys() & options.keys()):
        raise ConfigError(f"{', '.join(twice)}: given twice, by --set and by an option; leave one out")
    given |= options
    path = _file(name) if name is not None else _file_for(given.get("data", "digits"), given.get("image_size"))
    values = {**values_of(Recipe, read_toml(path), str(path)), **given}
    missing = [key for key, one in settings_of(Recipe).items() if one.default is MISSING and key not in values]
    if missing:
        ways = ", ".join(f"--{key.replace('_', '-')}" for key in missing)
        raise ConfigError(f"{path.name} leaves {', '.join(missing)} open; give {ways}")
    return Recipe(**values)


def _file(name: str) -> Path:
    for spelt in (name, name.replace("_", "-")):  # fashion_mnist, as data sets are often written
        if (path := RECIPES / f"{spelt}.toml").parent == RECIPES and path.is_file():
            return path
    if Path(name).suffix == ".toml":
        with contextlib.suppress(RuntimeError):  # a home that nobody has: it is not found, then
            return Path(name).expanduser()
        return Path(name)
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
    raise ConfigError(f"there is no recipe {short(name)}; there are {known}, or give the path of a .toml file")


def _file_for(data: str, image_size: int | None) -> Path:
    """The recipe for data of this name: digits, small images in IDX files, or others."""
    if data == "digits":
        return _file("digits")
    folder = Path(data)
    with contextlib.suppress(RuntimeError):  # a home that nobody has: what reads the data says so
        folder = folder.expanduser()
    small = (image_size or 0) <= _SMALL_IMAGE and any(folder.glob("*ubyte*"))
    return _file("fashion-mnist" if small else "imagefolder")
