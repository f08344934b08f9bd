"""Which methods a comparison has: its entries, with ranks, seeds and the settings that entries do not say."""

from __future__ import annotations

from dataclasses import dataclass, field

from strassen_tile.errors import ConfigError
from strassen_tile.experiments import entries, settings
from strassen_tile.experiments.entries import Compared
from strassen_tile.experiments.entry_settings import STLSettings
from strassen_tile.integrations.training import about, check_choices

MOST_SEEDS = 1000


def seeds_of(text: str) -> tuple[int, ...]:
    """How many seeds, from 0 on; or, with a comma, which."""
    numbers = settings.integers(text)
    if "," in text or numbers[0] < 1:
        return numbers
    if numbers[0] > MOST_SEEDS:
        raise ConfigError(f"at most {MOST_SEEDS} seeds are run, from 0 on; got {text!r}")
    return tuple(range(numbers[0]))


@dataclass(frozen=True, kw_only=True)
class Methods(STLSettings):
    """What is compared: entries, ranks and seeds, and the settings that entries do not say.

    Raises:
        ConfigError: an entry that cannot be read, or two that are the same run.
    """

    methods: tuple[str, ...] = field(
        default=("dense", "2:4", "stl"),
        metadata=about(
            "of dense, 2:4, stl, low-rank, monarch, rotated, dense+mix; with settings of its own as in "
            "stl[rank=24,mixing=none,tile=1x4x4], dense[mix=grid,lr=5e-4]"
        ),
    )
    ranks: tuple[int, ...] = field(default=(16, 24, 32), metadata=about("of stl where its entry names no rank"))
    seeds: tuple[int, ...] = field(
        default=(0, 1), metadata={**about("how many seeds, or a list of them"), "parse": seeds_of}
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.methods or not self.seeds:
            raise ConfigError("a comparison needs at least one method and one seed")
        if unusable := [seed for seed in self.seeds if not 0 <= seed < 2**31]:
            raise ConfigError(f"seeds are numbers from 0 to 2**31 - 1; got {', '.join(map(str, unusable))}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds has one twice; got {', '.join(map(str, self.seeds))}")
        self.roster()  # what cannot be made is said now, not after the first runs

    def roster(self) -> list[Compared]:
        """The methods in the order of their entries, STL once for each rank."""
        found = [compared for entry in self.methods for compared in entries.compared(entry, self, self.ranks)]
        names = [" ".join((one.method.name, one.variant)).strip() for one in found]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ConfigError(f"methods has the same run twice: {', '.join(twice)}; leave out an entry or a rank")
        return found
