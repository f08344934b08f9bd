"""The roster of products: what each computes, what it is said to cost, and what it is fitted to."""

import pytest
import torch

from strassen_tile.baselines import fitted, quantised, roster, sketches
from strassen_tile.baselines.roster import APPROXIMATIONS, ROSTER
from strassen_tile.baselines.sparse24 import mask_24, refit
from strassen_tile.errors import ConfigError, ShapeError
from strassen_tile.experiments.verification import verify
from strassen_tile.nn import STLConfig

N, K, M = 40, 48, 36


def operands(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, w, and rows of x's kind, whose features are of very different sizes and depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator) * torch.logspace(0, -2, K)[:, None]
    rows = torch.randn(N + 600, K, generator=generator) @ mix
    return rows[:N], torch.randn(K, M, generator=generator), rows[N:]


def loss(found: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> float:
    return float((found - x @ w).square().sum() / (x @ w).square().sum())


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_each_computes_its_definition_within_its_budget(name: str) -> None:
    x, w, rows = operands()
    way = ROSTER[name]
    for budget in way.budgets or (0.55, 0.9):
        product = way.nearest(budget, (N, K, M), 0)
        prepared = product.prepare(w, rows)
        found = prepared.call(x)
        assert found.shape == (N, M)
        torch.testing.assert_close(found.double(), prepared.reference(x.double()), rtol=1e-3, atol=1e-3)
        if "directions" not in name:
            assert 0 < product.cost(N, K, M).flop_ratio <= budget + 1e-9
        without = product.prepare(w)  # as of Gaussian rows
        assert torch.isfinite(without.call(x)).all()


@pytest.mark.parametrize("kind", sketches.SKETCHES)
def test_sketches_are_unbiased(kind: str) -> None:
    """Σ over maps of (x S)(Sᵀ w) comes to x w: also of padded transforms, and of indices drawn by their size."""
    x, w, rows = (matrix[:6].double() if matrix.shape[0] != K else matrix[:, :5].double() for matrix in operands())
    rows = operands()[2].double()
    draws = torch.stack([sketches.sketched(kind, 0.9, seed=seed).prepare(w, rows).call(x) for seed in range(800)])
    spread = draws.std(dim=0) / len(draws) ** 0.5
    assert ((draws.mean(dim=0) - x @ w).abs() < 4.5 * spread + 1e-12).all()


def test_hadamard_is_orthogonal() -> None:
    matrix = sketches.hadamard(torch.eye(16, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(16, dtype=torch.float64))
    assert set((matrix * 4).round().unique().tolist()) == {-1.0, 1.0}


def test_aware_svd_is_the_best_of_its_rank_for_the_rows() -> None:
    """No other product of that rank is nearer on the rows it was fitted to: not the plain SVD, not PCA, nor a step away."""
    _, w, rows = (matrix.double() for matrix in operands())
    losses = {}
    for kind in ("aware-svd", "pca"):
        losses[kind] = loss(fitted.low_dimensional(kind, 0.5).prepare(w, rows).call(rows), rows, w)
    plain = ROSTER["low-rank"].nearest(0.5, (N, K, M)).prepare(w)
    assert losses["aware-svd"] < min(losses["pca"], loss(plain.call(rows), rows, w))
    rank = round(0.5 * K * M / (K + M) - 0.5)
    u, sigma, vt = torch.linalg.svd(rows @ w, full_matrices=False)
    best = u[:, :rank] * sigma[:rank] @ vt[:rank]
    assert losses["aware-svd"] == pytest.approx(loss(best, rows, w), rel=1e-6)


def test_directions_find_what_there_is() -> None:
    """Of matrices with fewer directions than the sketch keeps, both are exact."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 5, generator=generator, dtype=torch.float64) @ torch.randn(5, K, generator=generator).double()
    w = torch.randn(K, 4, generator=generator, dtype=torch.float64) @ torch.randn(4, 30, generator=generator).double()
    for kind in ("frequent", "co-occurring"):
        assert loss(fitted.directions(kind, 0.8).prepare(w).call(x), x, w) < 0.1
    assert loss(fitted.directions("co-occurring", 0.8).prepare(w).call(x), x, w) < 1e-20


@pytest.mark.parametrize("n", [0, 1, 5])
def test_directions_of_few_rows_lose_nothing(n: int) -> None:
    """With fewer rows than half the sketch has places there is nothing to lower."""
    x, w, _ = (matrix.double() for matrix in operands())
    found = fitted.directions("co-occurring", 0.5).prepare(w).call(x[:n])
    torch.testing.assert_close(found, x[:n] @ w)
    small = fitted.directions("frequent", 0.5).prepare(w[:, :2]).call(x[:n])
    torch.testing.assert_close(small, x[:n] @ w[:, :2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 2, 48])
def test_int8_in_every_dtype(k: int, dtype: torch.dtype) -> None:
    """Largest entries that round to 128 and wrap, sums that overflow 16 bits, a single inner index."""
    generator = torch.Generator().manual_seed(4)
    x, w = (torch.randn(*size, generator=generator).to(dtype) for size in ((64, k), (k, 40)))
    found = quantised.int8().prepare(w).call(x)
    assert found.dtype == dtype and loss(found.double(), x.double(), w.double()) < 5e-4


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("scale", [1.0, 1e24, 1e-24])
def test_refit_is_least_squares(scale: float, dtype: torch.dtype, near: float) -> None:
    """Against a solver, column by column, with inputs whose squares are beyond float32 too; what was zero stays so."""
    _, w, rows = (matrix.double() for matrix in operands())
    rows, weight = rows * scale, w.mT.contiguous().to(dtype)
    mask = mask_24(weight, rows)
    found = refit(weight, mask, rows, damping=0.0)
    assert found.dtype == dtype and not found[~mask].any()
    for column in range(0, M, 7):
        kept = mask[column]
        wanted = torch.linalg.lstsq(rows[:, kept], rows @ weight[column].double()).solution
        torch.testing.assert_close(found[column, kept].double(), wanted, rtol=near, atol=near)


def test_refit_where_inputs_say_nothing() -> None:
    """Features that are never on, fewer rows than weights, none at all: what is not said stays as it was pruned."""
    _, w, rows = operands()
    weight = w.mT.contiguous()
    mask = mask_24(weight, rows)
    dead = rows.clone()
    dead[:, ::3] = 0
    found = refit(weight, mask, dead, damping=0.0)
    assert torch.equal(found[:, ::3], (weight * mask)[:, ::3])
    few = rows[:5]
    assert loss(few @ refit(weight, mask, few, damping=0.0).mT, few, w) < 1e-8
    assert torch.equal(refit(weight, mask, rows[:0]), weight * mask)
    with pytest.raises(ShapeError, match="NaN"):
        refit(weight, mask, rows * torch.nan)


def test_prototypes_are_near_what_they_stand_for() -> None:
    """Rows that are one of 16 in each subspace: the nearest are those, the tree parts most of them; int8 rounds."""
    generator = torch.Generator().manual_seed(1)
    ways = torch.randn(16, 12, generator=generator)
    rows = torch.cat([ways[torch.randint(16, (800,), generator=generator)] for _ in range(4)], dim=1)
    x, w = rows[:N], torch.randn(K, M, generator=generator)
    four = 4 * (M + 4) / (2 * K * M) + 1e-6  # what four subspaces cost the tree
    assert loss(quantised.quantised("hash-tree", four).prepare(w, rows).call(x), x, w) < 0.2
    more = quantised.quantised("pq", 0.75).prepare(w, rows)
    assert loss(more.call(x), x, w) < 0.1
    assert loss(quantised.int8().prepare(w).call(x), x, w) < 3e-4


def test_a_tree_learns_no_noise_by_heart() -> None:
    """Of independent entries, prototypes that reach over all K can be learnt from few rows only; then more budget did harm."""
    generator = torch.Generator().manual_seed(2)
    x, w, rows = (torch.randn(*size, generator=generator) for size in ((50, 64), (64, 96), (300, 64)))
    lost = [loss(quantised.quantised("hash-tree", part).prepare(w, rows).call(x), x, w) for part in (0.15, 0.3, 0.52)]
    assert lost[0] > 2 * lost[1] > 4 * lost[2] and lost[2] < 0.05


def test_a_tree_takes_in_what_other_subspaces_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every entry is there twice, in two subspaces, prototypes fitted together know it from both."""
    generator = torch.Generator().manual_seed(3)
    half, w = torch.randn(3000, 8, generator=generator), torch.randn(16, 40, generator=generator)
    rows = torch.cat([half, half + 0.5 * torch.randn(3000, 8, generator=generator)], dim=1)
    tree = quantised.quantised("hash-tree", 4 * 44 / (2 * 16 * 40) + 1e-6)
    together = loss(tree.prepare(w, rows[200:]).call(rows[:200]), rows[:200], w)
    monkeypatch.setattr(quantised, "_RIDGES", ())
    assert together < 0.92 * loss(tree.prepare(w, rows[200:]).call(rows[:200]), rows[:200], w)


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_the_callers_random_numbers_stay(name: str) -> None:
    """Whether a rival is measured changes what the next one draws."""
    way = ROSTER[name]
    state = torch.get_rng_state()
    made = way.nearest((way.budgets or (0.9,))[0], (N, K, M), 0)
    assert made is not None
    made.prepare(*operands()[1:])
    assert torch.equal(torch.get_rng_state(), state)


def test_at_ranks_is_by_rank_and_those_without_once() -> None:
    """Layers as they start; what no layer starts as at the FLOPs of each rank's products; what has one price at that, once."""
    sizes, configs = (256, 256, 256), [STLConfig(rank=16), STLConfig(rank=24)]
    found = roster.at_ranks(("2:4", "stl", "low-rank", "pca", "stl"), configs, sizes)
    labels = ["stl r=16", "low-rank r=16", "pca r=16", "stl r=24", "low-rank r=24", "pca r=24", "2:4"]
    assert [product.label for product in found] == labels
    assert [product.flop_ratio for product in found] == [0.25, 0.25, 0.25, 0.375, 0.375, 0.375, 0.5]
    assert [product.exactness for product in found] == ["own", "own", "approximate"] * 2 + ["approximate"]
    flat = roster.at_ranks(("stl",), [STLConfig(rank=6, mixing="none"), STLConfig(rank=6)], sizes)
    assert [product.tile for product in flat] == [(1, 4, 4), (4, 4, 4)]  # of one rank, and not one product
    assert not roster.at_ranks(("hadamard",), [STLConfig(rank=8)], (16, 16, 16))
    with pytest.raises(ConfigError, match="unknown methods junk; there are dense, stl"):
        roster.at_ranks(("stl", "junk"), configs, sizes)


@pytest.mark.parametrize("name", ROSTER)
def test_what_is_timed_is_its_definition(name: str) -> None:
    """As `bench` checks it; what has no parameters is not to be timed in a step."""
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(160, 96, generator=generator), torch.randn(96, 80, generator=generator)
    for product in roster.at_ranks((name,), [STLConfig(rank=40)], (160, 96, 80)):
        prepared = product.prepare(w)
        verify(product, prepared, x, w, gradients=not product.forward_only)
        assert bool(prepared.parameters) != bool(product.forward_only)


def test_a_budget_that_pays_for_no_basis() -> None:
    assert ROSTER["stl"].nearest(0.05, (N, K, M)) is None
    assert roster.best_basis(1.0, (512, 512, 512)).is_exact


@pytest.mark.parametrize(
    "make,said",
    [
        (lambda: sketches.sketched("other", 0.5), "unknown sketch"),
        (lambda: sketches.sketched("gaussian", 0), "positive"),
        (lambda: sketches.sketched("gaussian", float("inf")), "positive"),
        (lambda: fitted.low_dimensional("other", 0.5), "kind must be"),
        (lambda: fitted.low_dimensional("pca", -1), "positive"),
        (lambda: fitted.directions("other", 0.5), "kind must be"),
        (lambda: quantised.quantised("other", 0.5), "kind must be"),
        (lambda: quantised.quantised("pq", 0), "positive"),
    ],
)
def test_bad_arguments(make, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()
