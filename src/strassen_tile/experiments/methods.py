"""Which methods a comparison has, each with settings of its own: `dense`, `2:4`, `stl`, `stl[rank=24,mixing=none]` …

An entry is a name, and in brackets what differs from the recipe. `stl` without a rank is one run for each of the recipe's
ranks. What tells a run from the others of its method is its variant, a text such as "r=24, tile 1×4×4, mixing none".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from strassen_tile import baselines
from strassen_tile.errors import ConfigError
from strassen_tile.experiments import settings
from strassen_tile.integrations.training import about, check_choices
from strassen_tile.nn import STLConfig
from strassen_tile.nn.config import Mixing, Scope
from strassen_tile.tiling import Tile

MOST_SEEDS = 1000


@dataclass(frozen=True)
class Compared:
    """A method of a comparison, and in what it differs from others of its name ("" where there is no other)."""

    method: baselines.Method
    variant: str


@dataclass(frozen=True, kw_only=True)
class STLSettings:
    """How STL layers are made: the recipe's, and the entry's where it says so."""

    tile: Tile = field(default=(4, 4, 4), metadata={**about("side, or p,q,s"), "parse": settings.tile})
    mixing: Mixing = field(default="sequence", metadata=about("which rows of a tile see each other"))
    encoder_scope: Scope = field(default="layer", metadata=about("one encoder a layer, or one a column tile"))
    init: Literal["random", "approximate", "strassen"] = field(
        default="random", metadata=about("where STL starts: random, the best known basis, or an exact one (rank 49)")
    )
    train_encoder: bool = field(default=True, metadata=about("train encoders"))
    train_decoder: bool = field(default=True, metadata=about("train decoders"))

    def config(self, rank: int) -> STLConfig:
        """The configuration of the layers at this rank."""
        return STLConfig(
            tile=self.tile,
            rank=rank,
            basis=self.init,
            mixing=self.mixing,
            encoder_scope=self.encoder_scope,
            train_encoder=self.train_encoder,
            train_decoder=self.train_decoder,
        )


@dataclass(frozen=True, kw_only=True)
class _STLEntry(STLSettings):
    rank: int | None = field(default=None, metadata=about("of this entry alone"))


@dataclass(frozen=True, kw_only=True)
class _LowRankEntry:
    flop_ratio: float = field(metadata=about("FLOPs as a fraction of dense"))


@dataclass(frozen=True, kw_only=True)
class _NoSettings:
    pass


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
            "of dense, 2:4, stl, low-rank, dense+mix; with settings of its own as in stl[rank=24,mixing=none,tile=1x4x4]"
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
        found = [compared for entry in self.methods for compared in _compared(entry, self)]
        names = [" ".join((one.method.name, one.variant)).strip() for one in found]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ConfigError(f"methods has the same run twice: {', '.join(twice)}; leave out an entry or a rank")
        return found


def _compared(entry: str, recipe: Methods) -> list[Compared]:
    read = re.fullmatch(r"([^\[\]]*)(?:\[([^\[\]]*)\])?", entry)
    if read is None:
        raise ConfigError(f"methods: name or name[key=value,…] is wanted; got {settings.short(entry)}")
    name, inside = read.groups()
    if name not in _ENTRIES:
        raise ConfigError(
            f"unknown methods {settings.short(name)[1:-1] or 'without a name'}; there are {', '.join(_ENTRIES)}"
        )
    record, make = _ENTRIES[name]
    texts = [] if inside is None else settings.listed(inside)
    given = settings.values_of(record, settings.pairs(texts, f"methods: {name}"), f"methods: {name}")
    return make(recipe, given)


def _stl(recipe: Methods, given: Mapping[str, Any]) -> list[Compared]:
    base = {one.name: getattr(recipe, one.name) for one in fields(STLSettings)}
    own = _STLEntry(**{**base, **given})
    check_choices(own)
    ranks = recipe.ranks if own.rank is None else (own.rank,)
    if not ranks:
        raise ConfigError("stl needs at least one rank: give ranks, or stl[rank=…]")
    made = []
    for rank in ranks:
        config = own.config(rank)
        config.load_basis()  # raises where there is none
        made.append(Compared(baselines.stl(config), ", ".join([f"r={rank}", *_differences(own, base)])))
    return made


def _differences(own: STLSettings, base: Mapping[str, Any]) -> list[str]:
    """The settings in which an entry is not as the recipe has it, as words."""
    before, now = _effective(base), _effective(asdict(own))
    p, q, s = now["tile"]
    words = {
        "tile": f"tile {p}×{q}×{s}",
        "mixing": f"mixing {now['mixing']}",
        "encoder_scope": f"scope {now['encoder_scope']}",
        "init": f"start {now['init']}",
        "train_encoder": f"encoder {'trained' if now['train_encoder'] else 'fixed'}",
        "train_decoder": f"decoder {'trained' if now['train_decoder'] else 'fixed'}",
    }
    return [said for key, said in words.items() if now[key] != before[key]]


def _effective(values: Mapping[str, Any]) -> dict[str, Any]:
    """With the tile that its mixing leaves: p = 1 where rows do not mix."""
    _, q, s = values["tile"]
    return {**values, "tile": (1, q, s)} if values["mixing"] == "none" else dict(values)


def _low_rank(recipe: Methods, given: Mapping[str, Any]) -> list[Compared]:
    if given:
        ratio = given["flop_ratio"]
        if not 0 < ratio < math.inf:
            raise ConfigError(f"methods: low-rank: flop_ratio must be positive and finite; got {ratio}")
    elif recipe.ranks:
        p, q, s = _effective(asdict(recipe))["tile"]
        ratio = min(recipe.ranks) / (p * q * s)
    else:
        raise ConfigError("low-rank takes the FLOPs of the smallest rank: give ranks, or low-rank[flop_ratio=…]")
    return [Compared(baselines.low_rank(ratio), f"{ratio!r} of the FLOPs")]


# Name of an entry: the record of its settings, and what makes its methods of the recipe and of the settings given.
_ENTRIES: dict[str, tuple[type, Callable[[Methods, Mapping[str, Any]], list[Compared]]]] = {
    "dense": (_NoSettings, lambda recipe, given: [Compared(baselines.dense(), "")]),
    "2:4": (_NoSettings, lambda recipe, given: [Compared(baselines.sparse_24(), "")]),
    "stl": (_STLEntry, _stl),
    "low-rank": (_LowRankEntry, _low_rank),
    "dense+mix": (_NoSettings, lambda recipe, given: [Compared(baselines.token_mix(), "")]),
}
