"""STLConfig: everything that decides what an STLLinear is, in one frozen record that JSON can hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from strassen_tile import bases
from strassen_tile.basis import Basis
from strassen_tile.errors import ConfigError, ShapeError
from strassen_tile.tiling import Tile, as_tile

Mixing = Literal["sequence", "none", "causal"]
Scope = Literal["layer", "tile"]
Init = Literal["auto", "random", "fit"]
Backend = Literal["auto", "reference", "cpu", "triton"]
_CHOICES: dict[str, tuple[object, ...]] = {
    "mixing": get_args(Mixing),
    "encoder_scope": get_args(Scope),
    "init": get_args(Init),
    "backend": get_args(Backend),
    "recompute": (True, False),
    "train_encoder": (True, False),
    "train_decoder": (True, False),
}


@dataclass(frozen=True)
class STLConfig:
    """How a linear layer is replaced.

    Attributes:
        tile: (p, q, s), or one side for a cube. Held as a triple.
        rank: r, products a tile.
        basis: where E and D start: "random", "approximate" (shipped factors), "naive", "strassen", or the path of a
            file that `bases.load` reads. All but "random" must have this tile and rank.
        mixing: "sequence" lets the p rows of a tile see each other, both ways; "causal" only backwards; "none" not at
            all (p = 1: tile=4 becomes (1, 4, 4)).
        encoder_scope: "layer" for one encoder and decoder a layer; "tile" for an encoder of each column tile and a
            decoder of each output tile: same FLOPs, more freedom.
        init: "random" starts Ŵ from noise of the variance of the weight replaced; "fit" from the weight itself;
            "auto" is "random" for the random basis and "fit" for the others.
        train_encoder, train_decoder: whether E and D are trained.
        backend: of `stl_linear`.
        recompute: of `stl_linear`: keep no Ŷ for the backward pass, make it anew.

    Raises:
        ConfigError: a value outside its choices.
    """

    tile: int | Sequence[int] = 4
    rank: int = 24
    basis: str = "random"
    mixing: Mixing = "sequence"
    encoder_scope: Scope = "layer"
    init: Init = "auto"
    train_encoder: bool = True
    train_decoder: bool = True
    backend: Backend = "auto"
    recompute: bool = False

    def __post_init__(self) -> None:
        try:
            p, q, s = as_tile(self.tile)
        except (ShapeError, TypeError) as error:
            raise ConfigError(str(error)) from error
        object.__setattr__(self, "tile", (1, q, s) if self.mixing == "none" else (p, q, s))
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ConfigError(f"rank must be a positive integer; got {self.rank!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(map(str, choices))}; got {getattr(self, name)!r}")
        if not isinstance(self.basis, str):
            raise ConfigError(f"basis must be a name or the path of a file; got {self.basis!r}")

    @property
    def pqs(self) -> Tile:
        """The tile as a triple."""
        return as_tile(self.tile)

    @property
    def mixes_rows(self) -> bool:
        """Whether a row of the output can depend on other rows of the input."""
        return self.pqs[0] > 1

    @property
    def fits(self) -> bool:
        """Whether Ŵ starts from the weight replaced."""
        return self.init == "fit" or (self.init == "auto" and self.basis != "random")

    def load_basis(self) -> Basis | None:
        """The basis that E and D start from; None for "random", which is drawn layer by layer.

        Raises:
            ConfigError: the named basis is not for this tile and rank.
            BasisError: there is no such basis.
        """
        p, q, s = self.pqs
        if self.basis == "random":
            return None
        if self.basis == "approximate":
            return bases.approximate(self.pqs, self.rank)
        if self.basis == "naive":
            basis = bases.naive(p, q, s)
        elif self.basis == "strassen":
            levels = p.bit_length() - 1
            if not p == q == s == 2**levels or levels < 1:
                raise ConfigError(f"basis 'strassen' needs a cubic tile of side 2, 4, 8, …; got {self.tile}")
            basis = bases.strassen(levels)
        else:
            basis = bases.load(self.basis)
        if basis.tile != self.pqs or basis.rank != self.rank:
            raise ConfigError(
                f"basis {self.basis!r} has tile {basis.tile} and rank {basis.rank}; the config says {self.tile} and {self.rank}"
            )
        return basis

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON holds; `from_dict` gives the same config back."""
        return {**asdict(self), "tile": list(self.pqs)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> STLConfig:
        """The config in `record`; missing keys take their defaults. Raises ConfigError for an unknown key."""
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
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ConfigError(f"an object is wanted; got {type(record).__name__}")
        return cls.from_dict(record)

    @classmethod
    def load(cls, path: str | Path) -> STLConfig:
        """The config in a JSON file."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))
