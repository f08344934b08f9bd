"""Entries of a comparison, methods with settings of their own: `dense`, `2:4`, `stl`, `stl[rank=24,mixing=none]` …

An entry is a name, and in brackets what differs from the recipe. `stl` without a rank is one run for each of the recipe's
ranks. What tells a run from the others of its method is its variant, a text such as "r=24, tile 1×4×4, mixing none".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from strassen_tile import baselines
from strassen_tile.errors import ConfigError
from strassen_tile.experiments import settings
from strassen_tile.experiments.entry_settings import EntrySettings, SparseEntry, STLEntry, STLSettings, ThinEntry
from strassen_tile.integrations.training import Training, check_choices
from strassen_tile.nn.token_mix import KINDS
from strassen_tile.report.groups import without_rate


@dataclass(frozen=True)
class Compared:
    """A method of a comparison.

    Attributes:
        method: what is done to the network.
        others: ways to do it that a block of a pretrained model may take instead.
        variant: in what it differs from others of its name; "" where there is no other.
        changes: what it trains with that is not as the recipe has it, by field of `Training`.
        width: features of a token, where they are not the model's own.
        init_range: standard deviation of dense weights at the start, where it is not the recipe's.
        weight_norm: what of the encoded weights of STL layers is trained as norm and direction: each term, or the layer.
        zero_last: whether the last layer of each residual branch starts at zero.
        rated: whether its entry names a learning rate, and none is to be chosen for it.
    """

    method: baselines.Method
    variant: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    width: int | None = None
    init_range: float | None = None
    weight_norm: Literal["term", "layer"] | None = None
    zero_last: bool = False
    rated: bool = False
    others: tuple[baselines.Method, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """Method and variant, whatever its learning rate."""
        return self.method.name, without_rate(self.variant)

    def at(self, lr: float) -> Compared:
        """The same with another learning rate."""
        variant = ", ".join(filter(None, [self.key[1], f"lr {settings.shortest(lr)}"]))
        return replace(self, variant=variant, changes={**self.changes, "lr": lr})


def compared(entry: str, recipe: STLSettings, ranks: tuple[int, ...]) -> list[Compared]:
    """The methods that an entry names: of STL one for each rank where it has none of its own.

    Args:
        entry: such as "stl[rank=24,mixing=none]".
        recipe: what entries have where they say nothing; with the fields of `Training`, if it has them.
        ranks: the recipe's.

    Raises:
        ConfigError: it cannot be read, or what it says makes no sense.
    """
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
    own = {key: value for key, value in given.items() if key in _OWN and not _unset(key, value)}
    inside_layers = record is STLEntry and own.get("mix") in KINDS  # STL layers have these mixes of their own
    more = {"token_mix": own["mix"]} if inside_layers else {}
    made = make(recipe, ranks, {key: value for key, value in given.items() if key not in _OWN} | more)
    return [_with_own(one, own, recipe, wrap=not inside_layers) for one in made]


def _unset(key: str, value: object) -> bool:
    if key in _TRAINING:  # a decay of 0 is set, and no base width where the recipe has one
        return value is None and settings.settings_of(Training)[key].default is not None
    return value is None or value is False or value == "none"


def _with_own(one: Compared, own: Mapping[str, Any], recipe: STLSettings, *, wrap: bool) -> Compared:
    """The method with what its entry says of mix, width and training."""
    changes = {key: value for key, value in own.items() if key in _TRAINING and getattr(recipe, key, None) != value}
    _check_changes(recipe, changes)
    values = {key: own[key] for key in own if key not in _TRAINING} | changes
    said = [_said(word, values[key]) for key, word in _WORDS.items() if key in values]
    # Still called by its own name: the mix is part of its variant.
    ways = [one.method, *one.others]
    if "mix" in own and wrap:
        ways = [replace(baselines.mixed(way, own["mix"]), name=way.name) for way in ways]
    variant = ", ".join(filter(None, [one.variant, *said]))
    network = {key: own[key] for key in ("width", "init_range", "weight_norm", "zero_last") if key in own}
    return Compared(ways[0], variant, changes, rated="lr" in own, others=tuple(ways[1:]), **network)


def _said(word: str, value: object) -> str:
    if value is None:
        return f"no {word.format('').strip()}"
    return word.format(settings.shortest(value) if isinstance(value, float) else value)


def _check_changes(recipe: STLSettings, changes: Mapping[str, Any]) -> None:
    """Refuse what a recipe could not hold. Raises ConfigError."""
    if isinstance(recipe, Training) and changes:
        Training(**{one.name: changes.get(one.name, getattr(recipe, one.name)) for one in fields(Training)})


def _stl(recipe: STLSettings, ranks: tuple[int, ...], given: Mapping[str, Any]) -> list[Compared]:
    base = {one.name: getattr(recipe, one.name) for one in fields(STLSettings)}
    values = {**base, **given}
    rank, among = values.pop("rank", None), values.pop("among", ())
    token_mix, forced = values.pop("token_mix", "none"), values.pop("force_mixing", False)
    own = STLSettings(**values)
    check_choices(own)
    if own.rounds < 0:
        raise ConfigError(f"methods: stl: rounds must not be negative; got {own.rounds}")
    if among and rank is not None:
        raise ConfigError("methods: stl: rank is of every block, among of each its own: give one of them")
    if among and getattr(recipe, "fewer", None) is None:
        raise ConfigError("methods: stl: among is for pretrained models that are to have `fewer` FLOPs: give rank")
    ranks = among or (ranks if rank is None else (rank,))
    if not ranks:
        raise ConfigError("stl needs at least one rank: give ranks, or stl[rank=…]")
    made = []
    for rank in ranks:
        config = replace(own.config(rank), token_mix=token_mix)
        config.load_basis()  # raises where there is none
        made.append(baselines.stl(config, force_mixing=forced, rounds=own.rounds))
    said = [*_differences(own, base), *(["forced"] if forced else [])]
    if among:
        first, *others = made
        variant = ", ".join([f"r of {', '.join(map(str, among))}", *said])
        return [Compared(replace(first, rank=None), variant, others=tuple(others))]
    return [Compared(method, ", ".join([f"r={method.rank}", *said])) for method in made]


def _differences(own: STLSettings, base: Mapping[str, Any]) -> list[str]:
    """The settings in which an entry is not as the recipe has it, as words."""
    before, now = _effective(base), _effective(asdict(own))
    p, q, s = now["tile"]
    words = {
        "tile": f"tile {p}×{q}×{s}",
        "mixing": f"mixing {now['mixing']}",
        "encoder_scope": f"scope {now['encoder_scope']}",
        "init": f"start {now['init']}",
        "weight_start": f"weight {now['weight_start']}",
        "rounds": f"{now['rounds']} rounds",
        "train_encoder": f"encoder {'trained' if now['train_encoder'] else 'fixed'}",
        "train_decoder": f"decoder {'trained' if now['train_decoder'] else 'fixed'}",
    }
    return [said for key, said in words.items() if now[key] != before[key]]


def _effective(values: Mapping[str, Any]) -> dict[str, Any]:
    """With the tile that its mixing leaves: p = 1 where rows do not mix."""
    _, q, s = values["tile"]
    return {**values, "tile": (1, q, s)} if values["mixing"] == "none" else dict(values)


def _sparse(recipe: STLSettings, ranks: tuple[int, ...], given: Mapping[str, Any]) -> list[Compared]:
    own = SparseEntry(**given)
    check_choices(own)
    if own.criterion == "dynamic":
        return [Compared(baselines.sparse_24(), "")]
    return [Compared(baselines.sparse_24(own.criterion), own.criterion)]


def _thin(name: str, make: Callable[[float], baselines.Method]) -> _Make:
    """Entries of a method that has a fraction of the FLOPs: the entry's, or that of the products of the smallest rank."""

    def made(recipe: STLSettings, ranks: tuple[int, ...], given: Mapping[str, Any]) -> list[Compared]:
        ratio = given.get("flop_ratio")
        if ratio is None:
            if not ranks:
                raise ConfigError(f"{name} takes the FLOPs of the smallest rank: give ranks, or {name}[flop_ratio=…]")
            p, q, s = _effective(asdict(recipe))["tile"]
            ratio = min(ranks) / (p * q * s)
        if not 0 < ratio < math.inf:
            raise ConfigError(f"methods: {name}: flop_ratio must be positive and finite; got {ratio}")
        return [Compared(make(ratio), f"{ratio!r} of the FLOPs")]

    return made


_Make = Callable[[STLSettings, tuple[int, ...], Mapping[str, Any]], list[Compared]]
_WORDS = {
    "mix": "mix {}", "width": "width {}", "init_range": "start {}",
    "weight_norm": "norm of each {}", "zero_last": "branches from zero", "epochs": "{} epochs",
    "optimizer": "{}", "weight_decay": "decay {}", "factor_lr": "rates {}", "base_width": "base width {}", "lr": "lr {}",
}  # fmt: skip
_TRAINING = frozenset(one.name for one in fields(Training))
_OWN = frozenset(one.name for one in fields(EntrySettings))
# Name of an entry: the record of its settings, and what makes its methods of the recipe and of the settings given.
_ENTRIES: dict[str, tuple[type, _Make]] = {
    "dense": (EntrySettings, lambda recipe, ranks, given: [Compared(baselines.dense(), "")]),
    "2:4": (SparseEntry, _sparse),
    "stl": (STLEntry, _stl),
    "low-rank": (ThinEntry, _thin("low-rank", baselines.low_rank)),
    "monarch": (ThinEntry, _thin("monarch", baselines.monarch)),
    "rotated": (EntrySettings, lambda recipe, ranks, given: [Compared(baselines.rotated(), "")]),
    "dense+mix": (EntrySettings, lambda recipe, ranks, given: [Compared(baselines.token_mix(), "")]),
}
