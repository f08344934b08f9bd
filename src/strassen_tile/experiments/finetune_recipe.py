"""What a comparison on a pretrained model trains: everything that is the same for all of its methods, and which those are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strassen_tile.errors import ConfigError
from strassen_tile.experiments.recipe_files import read
from strassen_tile.experiments.text_recipe import OnText
from strassen_tile.integrations.training import about

RECIPES = Path(__file__).with_name("recipes") / "finetune"
_ENCODERS = ("minilm",)


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(OnText):
    """Everything that is the same for all methods of a comparison on a pretrained model. Fields say what they are.

    Raises:
        ConfigError: a value that makes no sense.
        BasisError: there is no basis for an STL run to start from.
    """

    model: str = field(
        default="smollm2", metadata=about("smollm2, minilm, the folder of a transformers model, or an id of the hub")
    )
    calibration: int = field(
        default=16,
        metadata=about("pieces of the training text that layers are fitted to before they are trained; 0: to none"),
    )
    in_order: bool = field(
        default=False, metadata=about("fit block after block, each to what those before it, converted, hand on")
    )
    distill: float = field(
        default=0.0,
        metadata=about(
            "share of the loss that is the distance to the dense model's predictions (of encoders it is all)"
        ),
    )

    guide: float = field(
        default=0.0,
        metadata=about("fraction of the steps in which layers give a falling share of what the dense ones would"),
    )
    fewer: float | None = field(
        default=None,
        metadata=about(
            "how many times fewer FLOPs the whole model is to have: blocks that suffer most are left dense; none: all converted"
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration < 0:
            raise ConfigError(f"calibration must not be negative; got {self.calibration}")
        if not self.calibration and (fitted := [one for one in self.methods if re.search("wanda|refit", one)]):
            raise ConfigError(
                f"methods: {fitted[0]} weighs weights by what they are fed: give calibration pieces, or criterion=magnitude"
            )
        if not 0 <= self.guide <= 1:
            raise ConfigError(f"guide must be from 0 to 1; got {self.guide}")
        if self.fewer is not None and not 1 <= self.fewer < math.inf:
            raise ConfigError(f"fewer must be 1 or more, or none; got {self.fewer}")
        if not 0 <= self.distill <= 1:
            raise ConfigError(f"distill must be from 0 to 1; got {self.distill}")
        if anew := [one for one in self.roster() if one.width is not None or one.init_range is not None]:
            raise ConfigError(
                f"methods: width and init_range are for networks that are made anew, and {self.model} has its own: "
                f"{anew[0].variant}"
            )


def finetune_recipe_of(
    name: str | None = None, changes: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> FinetuneRecipe:
    """A recipe from its file, changed: `recipe_files.read`. Without a name, `decoder` or `encoder`, by the model."""
    return read(FinetuneRecipe, RECIPES, _usual, name, changes, options or {})


def _usual(given: Mapping[str, Any]) -> str:
    return "encoder" if given.get("model") in _ENCODERS else "decoder"
