"""The roster of approximate products: for a budget of FLOPs, all the ways there are to spend it on x @ w.

To add one: a function that returns a `Product`, and its line in `APPROXIMATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from strassen_tile import bases, cost
from strassen_tile.baselines import fitted, quantised, sketches
from strassen_tile.baselines.products import Product, dense, low_rank, sparse_24, stl
from strassen_tile.baselines.sparse24 import Criterion
from strassen_tile.basis import Basis

Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class Way:
    """A way to spend a budget.

    Attributes:
        make: (fraction of dense's FLOPs, (N, K, M), seed) → the product; None where the budget pays for none, or sizes do
            not fit.
        drawn: whether it depends on the seed, so that one trial says little.
        budgets: the fractions that it has, where it cannot be had at any.
    """

    make: Callable[[float, Sizes, int], Product | None]
    drawn: bool = False
    budgets: tuple[float, ...] | None = None


def best_basis(flop_ratio: float, sizes: Sizes) -> Basis | None:
    """The basis of least error whose encoding of x, products and decoding take that fraction of x @ w's FLOPs at most."""
    priced = [(cost.linear(*sizes, basis.tile, basis.rank).flop_ratio, basis) for basis in bases.known()]
    affordable = [(basis.error, ratio, basis) for ratio, basis in priced if ratio <= flop_ratio]
    return min(affordable, key=lambda one: one[:2])[2] if affordable else None


def _stl(flop_ratio: float, sizes: Sizes, seed: int) -> Product | None:
    basis = best_basis(flop_ratio, sizes)
    return None if basis is None else stl(basis)


def _affordable(make: Callable[[float, int], Product]) -> Callable[[float, Sizes, int], Product | None]:
    """What `make` has for a budget and a seed, where that keeps the budget: of short sides one dimension may take more."""

    def way(flop_ratio: float, sizes: Sizes, seed: int) -> Product | None:
        product = make(flop_ratio, seed)
        return product if product.cost(*sizes).flop_ratio <= flop_ratio else None

    return way


def _sparse(criterion: Criterion, flop_ratio: float, sizes: Sizes, seed: int) -> Product | None:
    return None if sizes[1] % 4 else sparse_24(criterion)


def _always(product: Callable[[], Product]) -> Callable[[float, Sizes, int], Product | None]:
    return lambda flop_ratio, sizes, seed: product()


APPROXIMATIONS: Mapping[str, Way] = {
    "dense": Way(_always(dense), budgets=(1.0,)),
    "stl": Way(_stl),
    "svd": Way(_affordable(lambda budget, seed: replace(low_rank(budget), name="svd"))),
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
}
