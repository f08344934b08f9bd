"""What a comparison on images trains: everything that is the same for all of its methods, and which methods those are.

Recipes are TOML files, those beside this module by name; what a file does not say is the default of a field below.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from strassen_tile.data import ImageSplits
from strassen_tile.errors import ConfigError
from strassen_tile.experiments.rates import Tuned
from strassen_tile.experiments.recipe_files import read
from strassen_tile.integrations.training import ImageTraining, about

RECIPES = Path(__file__).with_name("recipes")
_SMALL_IMAGE = 32


@dataclass(frozen=True, kw_only=True)
class Recipe(Tuned, ImageTraining):
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

    def __post_init__(self) -> None:
        ImageTraining.__post_init__(self)
        if self.validation < 0:
            raise ConfigError(f"validation must not be negative; got {self.validation}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be a positive number of training images, or none; got {self.limit}")
        if self.lr_grid and not self.validation:
            raise ConfigError("lr_grid is chosen from on validation images: say how many, as in validation=1000")
        Tuned.__post_init__(self)
        if any(one.init_range is not None for one in self.roster()):
            raise ConfigError("methods: init_range is for language models; those of images have starts of their own")

    def fitted(self, splits: ImageSplits) -> Recipe:
        """This recipe with what it leaves to the data: image size and model."""
        by_size = "t2t_vit_micro" if splits.image_size <= _SMALL_IMAGE else "t2t_vit_7"
        return replace(self, image_size=splits.image_size, model=by_size if self.model == "auto" else self.model)


def recipe_of(name: str | None = None, changes: Sequence[str] = (), options: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from its file, changed: `recipe_files.read`. Without a name, the one for the data."""
    return read(Recipe, RECIPES, _file_for, name, changes, options or {})


def _file_for(given: Mapping[str, Any]) -> str:
    """The recipe for the data that is asked for: digits, small images in IDX files, or others."""
    data = given.get("data", "digits")
    if data == "digits":
        return "digits"
    folder = Path(data)
    with contextlib.suppress(RuntimeError):  # a home that nobody has: what reads the data says so
        folder = folder.expanduser()
    small = (given.get("image_size") or 0) <= _SMALL_IMAGE and any(folder.glob("*ubyte*"))
    return "fashion-mnist" if small else "imagefolder"
