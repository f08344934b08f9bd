"""What a comparison on text trains: everything that is the same for all of its methods, and which methods those are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strassen_tile.errors import ConfigError
from strassen_tile.experiments.rates import Tuned
from strassen_tile.experiments.recipe_files import read
from strassen_tile.integrations.training import Training, about

RECIPES = Path(__file__).with_name("recipes") / "text"


@dataclass(frozen=True, kw_only=True)
class OnText(Tuned, Training):
    """What comparisons on text have in common. Fields say what they are.

    Raises:
        ConfigError: a value that makes no sense.
        BasisError: there is no basis for an STL run to start from.
    """

    epochs: int = field(metadata=about("evaluations, each after `steps` steps"))
    steps: int = field(default=100, metadata=about("training steps of an epoch"))
    data: str = field(
        default="python",
        metadata=about(
            "python (the prose of its standard library, 2 MB), python-code (its sources, 30 MB with tests), a folder or file "
            "of txt, jsonl or parquet, or hub:NAME"
        ),
    )
    limit: int | None = field(default=None, metadata=about("bytes of text to train on; none: all, of streams 128 MiB"))
    context: int = field(default=128, metadata=about("tokens of a sequence"))
    held_out: int | None = field(
        default=None, metadata=about("sequences of the validation text that an epoch is evaluated on; none: all")
    )
    tested_on: int | None = field(
        default=None, metadata=about("sequences of the test text that a run is tested on; none: all")
    )

    def __post_init__(self) -> None:
        Training.__post_init__(self)
        optional = (1 if one is None else one for one in (self.held_out, self.tested_on, self.limit))
        if min(self.steps, self.context, *optional) < 1:
            raise ConfigError(
                f"steps, context, held_out, tested_on and limit must be positive; got {self.steps}, {self.context}, "
                f"{self.held_out}, {self.tested_on}, {self.limit}"
            )
        Tuned.__post_init__(self)

    @property
    def tokens(self) -> int:
        """Tokens trained on in an epoch."""
        return self.steps * self.batch_size * self.context


@dataclass(frozen=True, kw_only=True)
class TextRecipe(OnText):
    """Everything that is the same for all methods that are trained from scratch on text, and which those are.

    Raises:
        ConfigError: a value that makes no sense.
        BasisError: there is no basis for an STL run to start from.
    """

    tokenizer: str = field(default="bytes", metadata=about("bytes, or what transformers' AutoTokenizer takes"))
    model: str = field(
        default="llama-3m",
        metadata=about(
            "llama-, neox- or qwen3- and 1m, 3m, 10m or 30m; llama-160m, neox-160m, llama-1b; or a config.json"
        ),
    )
    init_range: float | None = field(
        default=None, metadata=about("standard deviation of dense weights at the start; none: the model's, 0.02")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_range is not None and not 0 < self.init_range < 1:
            raise ConfigError(f"init_range must be above 0 and below 1, or none; got {self.init_range}")


def text_recipe_of(
    name: str | None = None, changes: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> TextRecipe:
    """A recipe from its file, changed: `recipe_files.read`. Without a name, `language`."""
    return read(TextRecipe, RECIPES, lambda given: "language", name, changes, options or {})
