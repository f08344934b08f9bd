"""STLConfig: everything that decides what an STLLinear is, in one frozen record that JSON can hold."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from strassen_tile import bases, files
from strassen_tile.bases.names import own_rank, usual_rank
from strassen_tile.basis import Basis
from strassen_tile.errors import BasisError, ConfigError, ShapeError, STLError
from strassen_tile.nn.token_mix import TokenMixKind
from strassen_tile.tiling import Tile, as_integer, as_tile

Mixing = Literal["sequence", "none", "causal"]
Scope = Literal["layer", "tile"]
Init = Literal["auto", "random", "spectral", "fit"]
Backend = Literal["auto", "reference", "cpu", "triton"]
_CHOICES: dict[str, tuple[object, ...]] = {
    "mixing": get_args(Mixing),
    "token_mix": get_args(TokenMixKind),
    "encoder_scope": get_args(Scope),
    "init": get_args(Init),
    "backend": get_args(Backend),
}
_SWITCHES = ("train_encoder", "train_decoder", "recompute")
DRAWN = ("random", "orthogonal", "signs")  # anew for every layer
_APPROXIMATE = ("approximate", "truncated")  # for ranks that the user chooses
_EXACT = ("naive", "strassen")
NAMES = (*DRAWN, *_APPROXIMATE, *_EXACT, "group:NAME")
_BY_TILE: Any = None  # so that the attribute, which is a number once there is a config, is typed as one
MAX_BYTES = 1 << 20  # of a file
_MOST_NUMBERS = 1 << 26  # in an encoder or decoder: half a GiB in float64
_MOST_OF_DENSE = 4
T = TypeVar("T")


@dataclass(frozen=True)
class STLConfig:
    """How a linear layer is replaced.

    Attributes:
        tile: (p, q, s), or one side for a cube. Held as a triple.
        rank: r, products a tile. None: that of the basis; where that has none of its own (all but "naive", "strassen",
            groups and files), ⅜ of the pqs products of a dense tile: 24 of 4×4×4, 6 of 1×4×4. From pqs on nothing is saved,
            and a UserWarning says so unless the basis is exact; above 4pqs nothing is gained by training either, and it is
            refused. (With r = pqs a layer can be dense; up to p²qs, more terms are more freedom: a control, never a saving.)
        basis: where E and D start. Drawn for each layer, with the same variances: "random" (Gaussian), "orthogonal" (E as a
            matrix (r, pq) and D as (r, ps) have orthonormal rows or, where r is larger, columns, times a number; not for
            causal tiles), "signs" (±1 times a number). Given: "approximate" (shipped factors), "truncated" (the terms of
            Strassen's algorithm that matter most, for cubes of 2, 4 or 8), "naive", "strassen", "group:NAME" (of a
            group algebra, as in "group:D4xZ2^2"), or the path of a file that `bases.load` reads: what `bases.named` makes of
            the name; these must have this tile and rank.
        mixing: "sequence" lets the p rows of a tile see each other, both ways; "causal" only backwards; "none" not at
            all (p = 1: tile=4 becomes (1, 4, 4)).
        encoder_scope: "layer" for one encoder and decoder a layer; "tile" for an encoder of each column tile and a
            decoder of each output tile: same FLOPs, more freedom.
        init: "random" starts Ŵ from noise that gives the output the variance it has behind the weight replaced; "fit" from
            the weight itself; "auto" is "random" for a drawn basis and "fit" for the others. "spectral" takes the
            deviations of Qiu et al. (arXiv 2406.06248) for Ŵ, and for E and D if they are drawn, whatever the weight was:
            √(1/d_in)·min(1, √(d_out/d_in)) of each factor.
        train_encoder, train_decoder: whether E and D are trained.
        backend: of `stl_linear`.
        recompute: of `stl_linear`: keep no Ŷ for the backward pass, make it anew.
        token_mix: a short convolution over tokens ahead of the product, added to its input, of four taps for each feature,
            which start at zero: "causal" (a row sees the three before it), "symmetric" (two before, one after) or "none".

    Raises:
        ConfigError: a value outside its choices.
        BasisError: no rank is given, and there is no such basis.
    """

    tile: int | Sequence[int] = 4
    rank: int = _BY_TILE
    basis: str = "random"
    mixing: Mixing = "sequence"
    encoder_scope: Scope = "layer"
    init: Init = "auto"
    train_encoder: bool = True
    train_decoder: bool = True
    backend: Backend = "auto"
    recompute: bool = False
    token_mix: TokenMixKind = "none"

    def __post_init__(self) -> None:
        try:
            p, q, s = as_tile(self.tile)
        except (ShapeError, TypeError) as error:
            raise ConfigError(str(error)) from error
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(map(str, choices))}; got {getattr(self, name)!r}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):  # 1 == True, but JSON would give another config back
                raise ConfigError(f"{name} must be True or False; got {getattr(self, name)!r}")
        if not isinstance(self.basis, str) or not self.basis:
            raise ConfigError(f"basis must be a name or the path of a file; got {self.basis!r}")
        object.__setattr__(self, "tile", (1, q, s) if self.mixing == "none" else (p, q, s))
        if (rank := self._default_rank() if self.rank is None else as_integer(self.rank)) is None or rank < 1:
            raise ConfigError(f"rank must be a positive integer, or None; got {self.rank!r}")
        object.__setattr__(self, "rank", rank)
        self._check_rank()
        if self.basis in (*DRAWN, *_APPROXIMATE):
            self._warn_if_nothing_is_saved()
        _ = self.mixes_rows  # cached now: a graph that is traced later cannot take the lock

    @cached_property
    def pqs(self) -> Tile:
        """The tile as a triple."""
        return as_tile(self.tile)

    @cached_property
    def mixes_rows(self) -> bool:
        """Whether a row of the output can depend on other rows of the input."""
        return self.mixes_in_tiles or self.token_mix != "none"

    @property
    def mixes_in_tiles(self) -> bool:
        """Whether the rows of a tile, which begin at row 0, depend on each other."""
        return self.pqs[0] > 1

    @property
    def sees_later_rows(self) -> bool:
        """Whether a row of the output can depend on later rows of the input."""
        return (self.mixes_in_tiles and self.mixing == "sequence") or self.token_mix == "symmetric"

    @property
    def fits(self) -> bool:
        """Whether Ŵ starts from the weight replaced."""
        return self.init == "fit" or (self.init == "auto" and self.basis not in DRAWN)

    @property
    def fits_factors(self) -> bool:
        """Whether E and D can be fitted to inputs: trained, and without the zeros of causal tiles."""
        causal = self.mixing == "causal" and self.mixes_in_tiles
        return self.train_encoder and self.train_decoder and not causal

    def _default_rank(self) -> int:
        if self.basis in DRAWN:
            return usual_rank(self.pqs)
        return self._given(own_rank, self.pqs) or usual_rank(self.pqs)

    def _given(self, make: Callable[..., T], *arguments: object) -> T:
        """What `make` makes of the basis's name; where there is no such basis, all names there are."""
        try:
            return make(self.basis, *arguments)
        except BasisError as error:
            if isinstance(error, ConfigError) or self.basis in NAMES or self.basis.startswith("group:"):
                raise
            raise BasisError(f"basis must be one of {', '.join(NAMES)}, or the path of a file; {error}") from error

    def _way_out(self) -> str:
        usual = usual_rank(self.pqs)
        return ("" if usual >= self.rank else f"leave rank out for {usual}, or ") + "take a larger tile"

    def _check_rank(self) -> None:
        p, q, s = self.pqs
        if (largest := self.rank * max(p * q, q * s, p * s)) > _MOST_NUMBERS:
            raise ConfigError(
                f"tile {self.tile} and rank {self.rank} are encoders of {largest} numbers; at most {_MOST_NUMBERS} are sensible"
            )
        if self.rank > _MOST_OF_DENSE * p * q * s and self.basis not in _EXACT:
            raise ConfigError(
                f"rank {self.rank} is {self.rank / (p * q * s):.3g} times the {p * q * s} products of a dense {p}×{q}×{s} "
                f"tile; {self._way_out()}"
            )

    def _warn_if_nothing_is_saved(self) -> None:
        p, q, s = self.pqs
        if self.rank >= p * q * s:
            # From this line, not the caller's: the copies that the library makes of a config say it no second time.
            warnings.warn(
                f"rank {self.rank} on a tile of {p}×{q}×{s} takes {self.rank / (p * q * s):.2f} times the products of a dense "
                f"layer, and encodes and decodes besides: it saves nothing; {self._way_out()}",
                UserWarning,
                stacklevel=1,
            )

    def load_basis(self) -> Basis | None:
        """The basis that E and D start from; None for one that is drawn layer by layer.

        Raises:
            ConfigError: the named basis is not for this tile and rank, or not for causal tiles.
            BasisError: there is no such basis.
        """
        if self.basis in DRAWN:
            if self.basis == "orthogonal" and self.mixing == "causal" and self.mixes_rows:
                raise ConfigError(
                    "basis 'orthogonal' lets rows see later ones; mixing='causal' takes 'random', 'signs' or 'naive'"
                )
            return None
        basis = self._given(bases.named, self.pqs, self.rank)
        if self.basis not in _APPROXIMATE and not basis.is_exact:  # of those the config has said so
            self._warn_if_nothing_is_saved()
        return basis

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON holds; `from_dict` gives the same config back."""
        return {**asdict(self), "tile": list(self.pqs)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> STLConfig:
        """The config in `record`; missing keys take their defaults. Raises ConfigError for an unknown key."""
        if not isinstance(record, Mapping):
            raise ConfigError(f"an object is wanted; got {type(record).__name__}")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(map(str, set(record) - set(known))):
            raise ConfigError(f"unknown keys {', '.join(unknown)}; STLConfig has {', '.join(known)}")
        return cls(**record)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> STLConfig:
        """The config that `to_json` wrote. Raises ConfigError for anything else."""
        try:
            record: Any = files.parse_json(text)
        except ValueError as error:
            raise ConfigError(f"not JSON: {error}") from error
        return cls.from_dict(record)

    @classmethod
    def load(cls, path: str | Path, *, max_bytes: int = MAX_BYTES) -> STLConfig:
        """The config in a JSON file of at most `max_bytes`.

        Raises:
            ConfigError: the file cannot be read, or does not hold a config.
            BasisError: it gives no rank, and there is no such basis.
        """
        try:
            record: Any = files.read_json(path, max_bytes)
            return cls.from_dict(record)
        except (OSError, ValueError) as error:
            kind = type(error) if isinstance(error, STLError) else ConfigError
            raise kind(f"cannot read a configuration from {path}: {error}") from error
