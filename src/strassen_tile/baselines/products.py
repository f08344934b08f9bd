"""Products: what multiplies by a weight, is timed against x @ w and compared with it. The roster of them is `roster`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from strassen_tile import cost, reference
from strassen_tile.baselines.block_diagonal import MonarchLinear, block_products, monarch_width
from strassen_tile.baselines.layers import LowRankLinear, inner_rank
from strassen_tile.baselines.mixes import Mix, add_mix, check_mix, mix_shape, mixed_by
from strassen_tile.baselines.sparse24 import Criterion, Sparse24Linear, mask_24, refit
from strassen_tile.basis import Basis
from strassen_tile.cost import Cost
from strassen_tile.errors import ConfigError
from strassen_tile.nn.fit import encode_weight_into
from strassen_tile.ops import stl_linear
from strassen_tile.tiling import Tile, tile_count

Exactness = Literal["exact", "approximate", "own"]
FINISHED = "what is made of a finished weight has no parameters to train"


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


class Prepare(Protocol):
    """What makes a product ready."""

    def __call__(self, w: Tensor, rows: Tensor | None = None) -> Prepared: ...


@dataclass(frozen=True)
class Product:
    """A way to multiply x (N, K) by a weight w (K, M), or something cheaper in its place.

    Attributes:
        name: as options and rows have it.
        exactness: "exact": x @ w but for rounding; "approximate": near it; "own": something else, as a layer at its start.
        flop_ratio: FLOPs of the products alone as a fraction of dense, where no side is padded.
        cost: (n, k, m) → Cost, all in.
        prepare: w (K, M) and rows (…, K) such as it will be fed, or None → Prepared. What is fitted to rows takes them.
        rank: r of the basis; of low rank, the r whose products take as many FLOPs.
        tile: (p, q, s), where p rows of y depend on p rows of x.
        kappa: of the basis: how much rounding errors grow.
        error: expected relative squared error on independent normal entries; None where that is not known.
        whole: whether a row of y depends on all rows of x.
        forward_only: why there is no training step; empty if there is one.
        cuda_only: why it is no faster elsewhere than a GPU; empty if it may be.
    """

    name: str
    exactness: Exactness
    flop_ratio: float
    cost: Callable[[int, int, int], Cost]
    prepare: Prepare
    rank: int | None = None
    tile: Tile | None = None
    kappa: float | None = None
    error: float | None = None
    whole: bool = False
    forward_only: str = ""
    cuda_only: str = ""

    @property
    def label(self) -> str:
        """Name and rank, as tables and plots show it."""
        return self.name if self.rank is None else f"{self.name} r={self.rank}"


def dense() -> Product:
    """The product x @ w by the library: what all others are compared with."""

    def prepare(w: Tensor, rows: Tensor | None = None) -> Prepared:
        weight = w.mT.detach()
        return Prepared(lambda x: F.linear(x, weight), (weight,), lambda x: x @ weight.double().mT)

    return Product("dense", "exact", 1.0, cost.dense, prepare)


def stl(basis: Basis, *, own: bool = False, encoder_scope: str = "layer") -> Product:
    """Strassen-Tile by the three factors of `basis`, w encoded beforehand; `own` if they are random, as a layer starts."""

    def prepare(w: Tensor, rows: Tensor | None = None) -> Prepared:
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
    error = None if own else 0.0 if basis.is_exact else basis.error
    return Product("stl", exactness, basis.flop_ratio, counted, prepare, basis.rank, basis.tile, basis.kappa, error)


def low_rank(flop_ratio: float, *, fitted: bool = True, rank: int | None = None) -> Product:
    """Two thin products, x A B, with this fraction of the FLOPs: A B is the truncated SVD of w, or random if not `fitted`."""
    inner_rank(flop_ratio, 1, 1)  # a ratio that cannot be is refused now, not when there is a weight

    def layer(k: int, m: int, **options: Any) -> LowRankLinear:
        return LowRankLinear(k, m, False, rank=inner_rank(flop_ratio, k, m), **options)

    def prepare(w: Tensor, rows: Tensor | None = None) -> Prepared:
        k, m = w.shape
        made = layer(k, m, device="meta" if fitted else w.device, dtype=w.dtype)
        if fitted:
            made = made.to_empty(device=w.device)  # nothing is drawn for what is overwritten
            made.fit(w.mT)
        a, b = made.first.weight, made.second.weight
        return Prepared(lambda x: F.linear(F.linear(x, a), b), (a, b), lambda x: x @ a.double().mT @ b.double().mT)

    exactness: Exactness = "approximate" if fitted else "own"
    return Product("low-rank", exactness, flop_ratio, lambda n, k, m: layer(k, m, device="meta").cost(n), prepare, rank)


def sparse_24(criterion: Criterion = "magnitude") -> Product:
    """Of every four entries of w along K two are zero: packed for the hardware on a GPU, masked elsewhere.

    Args:
        criterion: which two are kept: the larger ones ("magnitude"), or those larger by the rows they are fed ("wanda");
            "refit" keeps wanda's and fits them to the products of the rows by least squares. Without rows all are "magnitude".
    """

    def prepare(w: Tensor, rows: Tensor | None = None) -> Prepared:
        weight = w.mT.detach().contiguous()
        mask = mask_24(weight, None if criterion == "magnitude" else rows)
        pruned = refit(weight, mask, rows) if criterion == "refit" and rows is not None else weight * mask
        try:
            packed = torch.sparse.to_sparse_semi_structured(pruned) if w.is_cuda else pruned
        except RuntimeError as error:  # its sides must be multiples that depend on the dtype
            raise ConfigError(f"2:4 cannot hold a weight of {tuple(pruned.shape)}: {error}") from error
        return Prepared(lambda x: F.linear(x, packed), (), lambda x: x @ pruned.double().mT)

    name = "2:4" if criterion == "magnitude" else f"2:4-{criterion}"
    return Product(
        name, "approximate", 0.5, lambda n, k, m: Sparse24Linear(k, m, device="meta").cost(n), prepare,
        forward_only="PyTorch has no gradient of the sparse weight to time",
        cuda_only="they need an NVIDIA GPU of the Ampere generation or later",
    )  # fmt: skip


def monarch(flop_ratio: float, *, fitted: bool = True, rank: int | None = None, blocks: int = 4) -> Product:
    """Two block-diagonal products with this fraction of the FLOPs: as near w as they come, or random if not `fitted`."""
    monarch_width(flop_ratio, 1, 1, blocks)  # what cannot be is refused now, not when there is a weight

    def layer(k: int, m: int, **options: Any) -> MonarchLinear:
        return MonarchLinear(k, m, False, width=monarch_width(flop_ratio, k, m, blocks), blocks=blocks, **options)

    def prepare(w: Tensor, rows: Tensor | None = None) -> Prepared:
        made = layer(*w.shape, device="meta" if fitted else w.device, dtype=w.dtype)
        if fitted:
            made = made.to_empty(device=w.device)
            made.fit(w.mT)
        first, second = parameters = made.first.detach(), made.second.detach()

        def exact(x: Tensor) -> Tensor:
            """By the whole matrices, which the call never makes."""
            b, inner, _ = first.shape
            wide = torch.block_diag(*first.double())[torch.arange(b * inner).view(b, inner).mT.flatten()]
            tall = torch.block_diag(*second.double())
            whole: Tensor = tall[: w.shape[1]] @ wide[:, : w.shape[0]]
            return x @ whole.mT

        return Prepared(lambda x: block_products(x, first, second, w.shape[1]), parameters, exact)

    exactness: Exactness = "approximate" if fitted else "own"
    return Product("monarch", exactness, flop_ratio, lambda n, k, m: layer(k, m, device="meta").cost(n), prepare, rank)


def rotated() -> Product:
    """Dense: what a dense layer trained in a random rotation is, once trained."""
    return replace(dense(), name="rotated")


def mixed(product: Product, kind: Mix, rows_mixed: int = 4) -> Product:
    """A product after a mix of rows, drawn at random: of a kind of `MIXES`; for "grid" N is to be a square.

    The mix of "tile" is called "mix" in the name, as in "dense+mix".
    """
    check_mix(kind, rows_mixed)

    def prepare(w: Tensor, rows: Tensor | None = None) -> Prepared:
        inner, shape = product.prepare(w, rows), mix_shape(kind, w.shape[0], rows_mixed)
        mix = torch.randn(shape, device=w.device).to(w.dtype) / shape[-1]

        def exact(x: Tensor) -> Tensor:
            return inner.reference(mixed_by(kind, x[None], mix.double())[0])

        return Prepared(lambda x: inner.call(mixed_by(kind, x[None], mix)[0]), (*inner.parameters, mix), exact)

    def counted(n: int, k: int, m: int) -> Cost:
        return add_mix(product.cost(n, k, m), kind, rows_mixed, n, k)

    name, (p, q, s) = "mix" if kind == "tile" else kind, product.tile or (1, 1, 1)
    tile = (math.lcm(p, rows_mixed), q, s) if kind == "tile" else product.tile
    return Product(
        f"{product.name}+{name}", "own", product.flop_ratio, counted, prepare, product.rank, tile, product.kappa,
        forward_only=product.forward_only, cuda_only=product.cuda_only,
    )  # fmt: skip


def token_mix(rows_mixed: int = 4) -> Product:
    """Dense after a mix of the rows of a tile, drawn at random: the control for row mixing."""
    return mixed(dense(), "tile", rows_mixed)
