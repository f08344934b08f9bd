"""The roster of products: every way to multiply by a weight that is timed against x @ w or compared with it.

To add one: a function below that returns a `Product`, and its line in `PRODUCTS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strassen_tile import bases, cost, reference
from strassen_tile.baselines.layers import LowRankLinear, TokenMixLinear, inner_rank, mix_rows
from strassen_tile.baselines.sparse24 import Sparse24Linear, mask_24
from strassen_tile.basis import Basis
from strassen_tile.cost import Cost
from strassen_tile.errors import ConfigError
from strassen_tile.nn import STLConfig
from strassen_tile.nn.fit import encode_weight_into
from strassen_tile.ops import stl_linear
from strassen_tile.tiling import Tile, tile_count

Exactness = Literal["exact", "approximate", "own"]


@dataclass(frozen=True)
class Prepared:
    """A product with its weight ready: encoded, factorised or packed, once for all calls.

    Attributes:
        call: x (N, K) → y (N, M), of the weight's dtype and device.
        parameters: what a training step differentiates beside x.
        reference: the definition in float64, differentiable in x and the parameters.
    """

    call: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    reference: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Product:
    """A way to multiply x (N, K) by a weight w (K, M), or something cheaper in its place.

    Attributes:
        name: as options and rows have it.
        exactness: "exact": x @ w but for rounding; "approximate": near it; "own": something else, as a layer at its start.
        flop_ratio: FLOPs of the products alone as a fraction of dense, where no side is padded.
        cost: (n, k, m) → Cost, all in.
        prepare: w (K, M) → Prepared.
        rank: r of the basis; of low rank, the r whose products take as many FLOPs.
        tile: (p, q, s), where p rows of y depend on p rows of x.
        kappa: of the basis: how much rounding errors grow.
        forward_on_cuda: why only a forward pass on a GPU can be timed; empty if that is not so.
    """

    name: str
    exactness: Exactness
    flop_ratio: float
    cost: Callable[[int, int, int], Cost]
    prepare: Callable[[Tensor], Prepared]
    rank: int | None = None
    tile: Tile | None = None
    kappa: float | None = None
    forward_on_cuda: str = ""

    @property
    def label(self) -> str:
        """Name and rank, as tables and plots show it."""
        return self.name if self.rank is None else f"{self.name} r={self.rank}"


def dense() -> Product:
    """The product x @ w by the library: what all others are compared with."""

    def prepare(w: Tensor) -> Prepared:
        weight = w.mT.detach()
        return Prepared(lambda x: F.linear(x, weight), (weight,), lambda x: x @ weight.double().mT)

    return Product("dense", "exact", 1.0, cost.dense, prepare)


def stl(basis: Basis, *, own: bool = False, encoder_scope: str = "layer") -> Product:
    """Strassen-Tile by the three factors of `basis`, w encoded beforehand; `own` if they are random, as a layer starts."""

    def prepare(w: Tensor) -> Prepared:
        (k, m), (_, q, s) = w.shape, basis.tile
        encoder, decoder = basis.encoder.to(w), basis.decoder.to(w)
        encoded = w.new_empty(basis.rank, tile_count(k, q), tile_count(m, s))
        encode_weight_into(encoded, w.detach(), encoder, decoder, basis)
        parameters = encoded, encoder, decoder

        def exact(x: Tensor) -> Tensor:
            return reference.stl_linear(x, *(parameter.double() for parameter in parameters), out_features=m)

        return Prepared(lambda x: stl_linear(x, *parameters, out_features=m), parameters, exact)

    exactness: Exactness = (
        "own" if own else "exact" if basis.is_exact else "approximate"
    )  # the error of many terms is work
    counted = partial(cost.linear, tile=basis.tile, rank=basis.rank, encoder_scope=encoder_scope)
    return Product("stl", exactness, basis.flop_ratio, counted, prepare, basis.rank, basis.tile, basis.kappa)


def low_rank(flop_ratio: float, *, fitted: bool = True, rank: int | None = None) -> Product:
    """Two thin products, x A B, with this fraction of the FLOPs: A B is the truncated SVD of w, or random if not `fitted`."""
    inner_rank(flop_ratio, 1, 1)  # a ratio that cannot be is refused now, not when there is a weight

    def layer(k: int, m: int, **options: Any) -> LowRankLinear:
        return LowRankLinear(k, m, False, rank=inner_rank(flop_ratio, k, m), **options)

    def prepare(w: Tensor) -> Prepared:
        k, m = w.shape
        made = layer(k, m, device=w.device, dtype=w.dtype)
        if fitted:
            made.fit(w.mT)
        a, b = made.first.weight, made.second.weight
        return Prepared(lambda x: F.linear(F.linear(x, a), b), (a, b), lambda x: x @ a.double().mT @ b.double().mT)

    exactness: Exactness = "approximate" if fitted else "own"
    return Product("low-rank", exactness, flop_ratio, lambda n, k, m: layer(k, m, device="meta").cost(n), prepare, rank)


def sparse_24() -> Product:
    """Of every four entries of w along K the two smaller are zero: packed for the hardware on a GPU, masked elsewhere."""

    def prepare(w: Tensor) -> Prepared:
        weight = w.mT.detach().contiguous()
        pruned = weight * mask_24(weight)
        try:
            packed = torch.sparse.to_sparse_semi_structured(pruned) if w.is_cuda else pruned
        except RuntimeError as error:  # its sides must be multiples that depend on the dtype
            raise ConfigError(f"2:4 cannot hold a weight of {tuple(pruned.shape)}: {error}") from error
        return Prepared(lambda x: F.linear(x, packed), (), lambda x: x @ pruned.double().mT)

    why = "they need an NVIDIA GPU of the Ampere generation or later, and PyTorch has no gradient of the sparse weight to time"
    return Product(
        "2:4", "approximate", 0.5, lambda n, k, m: Sparse24Linear(k, m, device="meta").cost(n), prepare, forward_on_cuda=why
    )  # fmt: skip


def token_mix(rows_mixed: int = 4) -> Product:
    """Dense after a mix of the rows of a tile, drawn at random: the control for row mixing."""

    def prepare(w: Tensor) -> Prepared:
        weight, p = w.mT.detach(), rows_mixed
        mix = torch.randn(w.shape[0], p, p, device=w.device).to(w.dtype) / p

        def exact(x: Tensor) -> Tensor:
            return mix_rows(x, mix.double()) @ weight.double().mT

        return Prepared(lambda x: F.linear(mix_rows(x, mix), weight), (weight, mix), exact)

    def counted(n: int, k: int, m: int) -> Cost:
        return TokenMixLinear(nn.Linear(k, m, device="meta"), rows_mixed).cost(n)

    return Product("dense+mix", "own", 1.0, counted, prepare, tile=(rows_mixed, 1, 1))


# Name → the product beside STL of a configuration: near x @ w if fitted, else as layers start training.
PRODUCTS: Mapping[str, Callable[[STLConfig, bool], Product]] = {
    "dense": lambda config, fitted: dense(),
    "stl": lambda config, fitted: stl(
        (bases.approximate if fitted else bases.random)(config.pqs, config.rank), own=not fitted
    ),
    "low-rank": lambda config, fitted: low_rank(config.rank / math.prod(config.pqs), fitted=fitted, rank=config.rank),
    "2:4": lambda config, fitted: sparse_24(),
    "dense+mix": lambda config, fitted: token_mix(),
}


def roster(names: Sequence[str], configs: Sequence[STLConfig], *, fitted: bool = False) -> list[Product]:
    """The products called `names`: those with a rank for each of `configs`, then the others, once; `fitted` as in `PRODUCTS`.

    Raises:
        ConfigError: an unknown name.
        BasisError: fitted, and no approximation ships for a tile and rank.
    """
    if unknown := [name for name in names if name not in PRODUCTS]:
        raise ConfigError(f"unknown methods {', '.join(unknown)}; there are {', '.join(PRODUCTS)}")
    made = [PRODUCTS[name](config, fitted) for config in configs for name in dict.fromkeys(names)]
    once = {product.name: product for product in made if product.rank is None}
    return [product for product in made if product.rank is not None] + list(once.values())
