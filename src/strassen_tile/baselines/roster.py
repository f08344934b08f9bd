"""The roster of products: every way there is to spend FLOPs on x @ w, for `bench` and `amm` alike.

To add one: a function that returns a `Product`, and its line in `ROSTER`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from strassen_tile import bases, cost
from strassen_tile.baselines import fitted, quantised, sketches
from strassen_tile.baselines.products import Product, dense, low_rank, monarch, sparse_24, stl, token_mix
from strassen_tile.baselines.sparse24 import Criterion
from strassen_tile.basis import Basis
from strassen_tile.errors import ConfigError
from strassen_tile.nn import STLConfig

Sizes = tuple[int, int, int]
Near = Callable[[float, Sizes, int], Product | None]


@dataclass(frozen=True)
class Way:
    """A way to spend FLOPs.

    Attributes:
        near: (fraction of dense's FLOPs, (N, K, M), seed) → the product that comes near x @ w; None where that pays for none,
            or sizes do not fit. None: there is no such product.
        start: the configuration of an STL layer → the product of a layer of as many FLOPs as it starts training. None: there
            is no such layer, or it starts near x @ w.
        drawn: whether `near` depends on the seed, so that one trial says little.
        budgets: the fractions that it has, where it cannot be had at any.
    """

    near: Near | None
    start: Callable[[STLConfig], Product] | None = None
    drawn: bool = False
    budgets: tuple[float, ...] | None = None

    def nearest(self, flop_ratio: float, sizes: Sizes, seed: int = 0) -> Product | None:
        """`near`, None if there is none."""
        return None if self.near is None else self.near(flop_ratio, sizes, seed)


def best_basis(flop_ratio: float, sizes: Sizes) -> Basis | None:
    """The basis of least error whose encoding of x, products and decoding take that fraction of x @ w's FLOPs at most."""
    priced = [(cost.linear(*sizes, basis.tile, basis.rank).flop_ratio, basis) for basis in bases.known()]
    affordable = [(basis.error, ratio, basis) for ratio, basis in priced if ratio <= flop_ratio]
    return min(affordable, key=lambda one: one[:2])[2] if affordable else None


def _stl(flop_ratio: float, sizes: Sizes, seed: int) -> Product | None:
    basis = best_basis(flop_ratio, sizes)
    return None if basis is None else stl(basis)


def _affordable(make: Callable[[float, int], Product]) -> Near:
    """What `make` has for a budget and a seed, where that keeps the budget: of short sides one dimension may take more."""

    def way(flop_ratio: float, sizes: Sizes, seed: int) -> Product | None:
        product = make(flop_ratio, seed)
        return product if product.cost(*sizes).flop_ratio <= flop_ratio else None

    return way


def _sparse(criterion: Criterion, flop_ratio: float, sizes: Sizes, seed: int) -> Product | None:
    return None if sizes[1] % 4 else sparse_24(criterion)


def _always(product: Callable[[], Product]) -> Near:
    return lambda flop_ratio, sizes, seed: product()


ROSTER: Mapping[str, Way] = {
    "dense": Way(_always(dense), budgets=(1.0,)),
    "stl": Way(_stl, lambda config: stl(bases.random(config.pqs, config.rank), own=True)),
    "low-rank": Way(
        _affordable(lambda budget, seed: low_rank(budget)),
        lambda config: low_rank(_share(config), fitted=False, rank=config.rank),
    ),
    "monarch": Way(
        _affordable(lambda budget, seed: monarch(budget)),
        lambda config: monarch(_share(config), fitted=False, rank=config.rank),
    ),
    **{
        kind: Way(_affordable(partial(lambda name, budget, seed: fitted.low_dimensional(name, budget), kind)))
        for kind in ("aware-svd", "pca", "sparse-pca")
    },
    **{  # whose sketches take more than any budget
        f"{kind}-directions": Way(partial(lambda name, budget, sizes, seed: fitted.directions(name, budget), kind))
        for kind in ("frequent", "co-occurring")
    },
    **{
        kind: Way(
            _affordable(partial(lambda name, budget, seed: sketches.sketched(name, budget, seed=seed), kind)),
            drawn=True,
        )
        for kind in sketches.SKETCHES
    },
    **{
        kind: Way(_affordable(partial(lambda name, budget, seed: quantised.quantised(name, budget, seed=seed), kind)))
        for kind in ("pq", "hash-tree")
    },
    "2:4": Way(partial(_sparse, "magnitude"), budgets=(0.5,)),
    "2:4-wanda": Way(partial(_sparse, "wanda"), budgets=(0.5,)),
    "2:4-refit": Way(partial(_sparse, "refit"), budgets=(0.5,)),
    "int8": Way(_always(quantised.int8), budgets=(1.0,)),
    "dense+mix": Way(None, lambda config: token_mix()),
}
APPROXIMATIONS = tuple(name for name, way in ROSTER.items() if way.near)


def ways(names: Sequence[str]) -> dict[str, Way]:
    """Those of the roster. Raises ConfigError for an unknown name."""
    if unknown := [name for name in names if name not in ROSTER]:
        raise ConfigError(f"unknown methods {', '.join(unknown)}; there are {', '.join(ROSTER)}")
    return {name: ROSTER[name] for name in names}


def at_ranks(names: Sequence[str], configs: Sequence[STLConfig], sizes: Sizes) -> list[Product]:
    """The products called `names`: those that have a rank for each of `configs`, then the others, once.

    A layer's as it starts training; what no layer starts as, near x @ w, at the FLOPs of each configuration's products. What
    those do not pay for at these sizes is left out.

    Raises:
        ConfigError: an unknown name.
    """
    chosen, ranked = ways(names), list[Product]()
    once: dict[str, Product] = {}
    for config in configs:
        for name, way in chosen.items():
            if way.start is not None:
                made: Product | None = way.start(config)
            elif way.budgets:
                made = way.nearest(way.budgets[0], sizes)
            elif (made := way.nearest(_share(config), sizes)) is not None:
                made = replace(made, rank=config.rank)
            if made is not None and made.rank is not None:
                ranked.append(made)
            elif made is not None:
                once[name] = made
    return ranked + list(once.values())


def _share(config: STLConfig) -> float:
    return config.rank / math.prod(config.pqs)
