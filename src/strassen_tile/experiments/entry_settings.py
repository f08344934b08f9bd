"""What entries of a comparison may say of their own in brackets, by kind; how STL layers are made, by recipe or entry."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from strassen_tile.experiments import settings
from strassen_tile.integrations.training import Optimizer, about
from strassen_tile.nn import STLConfig
from strassen_tile.nn.config import Mixing, Scope
from strassen_tile.nn.optim import FactorLR
from strassen_tile.tiling import Tile

Mix = Literal["none", "causal", "symmetric", "tile", "grid"]


@dataclass(frozen=True, kw_only=True)
class EntrySettings:
    """What every entry may have of its own: how it trains, and what comes before its layers."""

    mix: Mix = field(
        default="none",
        metadata=about(
            "mix of rows ahead of each layer: a short convolution that sees 3 before, or 2 before and 1 after; of 4 in a tile; "
            "or 3×3 on the grid of tokens"
        ),
    )
    width: int | None = field(default=None, metadata=about("features of a token, for a network made smaller"))
    init_range: float | None = field(
        default=None,
        metadata=about("standard deviation of dense weights at the start, of language models trained from scratch"),
    )
    epochs: int | None = field(default=None, metadata=about("of this entry alone: a schedule of its own"))
    optimizer: Optimizer | None = field(default=None, metadata=about("of this entry alone"))
    weight_decay: float | None = field(default=None, metadata=about("of this entry alone"))
    factor_lr: FactorLR | None = field(default=None, metadata=about("of this entry alone"))
    base_width: int | None = field(default=None, metadata=about("of this entry alone"))
    weight_norm: Literal["none", "term", "layer"] = field(
        default="none", metadata=about("encoded weights trained as norm and direction: of each term, or of the layer")
    )
    zero_last: bool = field(default=False, metadata=about("residual branches start at zero"))
    lr: float | None = field(default=None, metadata=about("of this entry alone"))


@dataclass(frozen=True, kw_only=True)
class STLSettings:
    """How STL layers are made: the recipe's, and the entry's where it says so."""

    tile: Tile = field(default=(4, 4, 4), metadata={**about("side, or p,q,s"), "parse": settings.tile})
    mixing: Mixing = field(default="sequence", metadata=about("which rows of a tile see each other"))
    encoder_scope: Scope = field(default="layer", metadata=about("one encoder a layer, or one a column tile"))
    init: Literal["random", "orthogonal", "signs", "approximate", "truncated", "strassen", "naive"] = field(
        default="random",
        metadata=about(
            "where STL starts: random factors of three kinds, the best known, Strassen's best terms, or exact ones "
            "(rank 49, pqs)"
        ),
    )
    weight_start: Literal["auto", "random", "fit", "spectral"] = field(
        default="auto",
        metadata=about("where the encoded weight starts: noise, the weight replaced, or noise of a spectral scale"),
    )
    rounds: int = field(
        default=10, metadata=about("of fitting encoders and decoders, too, to calibration inputs, where there are any")
    )
    train_encoder: bool = field(default=True, metadata=about("train encoders"))
    train_decoder: bool = field(default=True, metadata=about("train decoders"))

    def config(self, rank: int) -> STLConfig:
        """The configuration of the layers at this rank."""
        return STLConfig(
            tile=self.tile,
            rank=rank,
            basis=self.init,
            init=self.weight_start,
            mixing=self.mixing,
            encoder_scope=self.encoder_scope,
            train_encoder=self.train_encoder,
            train_decoder=self.train_decoder,
        )


@dataclass(frozen=True, kw_only=True)
class STLEntry(EntrySettings, STLSettings):
    rank: int | None = field(default=None, metadata=about("of this entry alone"))
    among: tuple[int, ...] = field(
        default=(),
        metadata={
            **about("ranks, 4/6/8, of which each block of a pretrained model takes one, or none, for `fewer`"),
            "parse": settings.alternatives,
        },
    )
    force_mixing: bool = field(
        default=False, metadata=about("rows of a sample mix though the model keeps them apart: to show what leaks")
    )


@dataclass(frozen=True, kw_only=True)
class SparseEntry(EntrySettings):
    criterion: Literal["dynamic", "magnitude", "wanda", "refit"] = field(
        default="dynamic",
        metadata=about(
            "which weights are kept: the larger ones at every step (SR-STE); or once: the larger ones, wanda's, or those with "
            "the weights that are left fitted to calibration inputs"
        ),
    )


@dataclass(frozen=True, kw_only=True)
class ThinEntry(EntrySettings):
    flop_ratio: float | None = field(default=None, metadata=about("FLOPs as a fraction of dense"))
