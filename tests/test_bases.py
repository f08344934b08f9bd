"""The bases that come with the package: exact ones are exact, the approximate as good as stated, the random as loud."""

import json
import math
from importlib.resources import files
from itertools import pairwise, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strassen_tile import bases
from strassen_tile.errors import BasisError, ShapeError

SIDE = st.integers(1, 5)
FACTORS = ("encoder", "weight_encoder", "decoder")
SHIPPED = list(bases.shipped())
BEST_4X4X4 = {16: 0.656, 20: 0.565, 24: 0.471, 28: 0.393, 32: 0.302, 36: 0.222, 40: 0.142, 44: 0.078, 47: 0.0313}
BEST_4X4X4 |= {48: 0.0156, 49: 0.0}  # the table of MATH.md §2, 32 since improved


@settings(max_examples=30, deadline=None)
@given(SIDE, SIDE, SIDE)
def test_naive_is_exact_for_any_tile(p: int, q: int, s: int) -> None:
    """A product missing, doubled or added in the wrong place for some shape."""
    basis = bases.naive(p, q, s)
    assert basis.tile == (p, q, s) and basis.rank == p * q * s
    assert basis.error == 0.0 and basis.kappa == 1.0
    for field in FACTORS:
        assert getattr(basis, field).flatten(1).sum(1).tolist() == [1.0] * basis.rank


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_strassen_is_exact_and_well_conditioned(levels: int) -> None:
    """The conjugation (MATH.md §6) breaks the algorithm, its rounding advantage, or its being held by bf16."""
    basis = bases.strassen(levels)
    assert basis.tile == (2**levels,) * 3 and basis.rank == 7**levels
    assert basis.error == 0.0
    assert basis.kappa ** (1 / levels) == pytest.approx(2.83, abs=0.005)
    for field in FACTORS:
        factor = getattr(basis, field)
        assert torch.equal(factor.bfloat16().double(), factor)


def test_strassen_coefficients() -> None:
    """Other coefficients would cost more than additions and halvings."""
    values = torch.cat([getattr(bases.strassen(), field).flatten() for field in FACTORS])
    assert set(values.abs().tolist()) == {0.0, 0.25, 0.5, 1.0}


@pytest.mark.parametrize("levels", [0, -1, True, 1.0, "1", None])
def test_strassen_refuses(levels: object) -> None:
    with pytest.raises(BasisError, match="levels >= 1"):
        bases.strassen(levels)  # type: ignore[arg-type]


def test_random_keeps_variances() -> None:
    """Activations that shrink or grow layer by layer. Tolerances are five standard errors of the samples themselves."""
    (p, q, s), r = (4, 3, 5), 500
    basis = bases.random((p, q, s), r, seed=11)
    for field, variance in zip(FACTORS, (1 / (p * q), 1 / s, 1 / r), strict=True):
        factor = getattr(basis, field)
        count = factor.numel()
        assert abs(factor.var().item() / variance - 1) < 5 * (2 / count) ** 0.5
        assert abs(factor.mean().item()) < 5 * (variance / count) ** 0.5
    # Var(Y)/K over Gaussian X and W is Σ(G_E∘G_F∘G_D)/pqs for a given basis; its mean over bases should be 1.
    ratios = []
    for seed in range(400):
        grams = [getattr(bases.random((p, q, s), 24, seed), field).flatten(1) for field in FACTORS]
        ratios.append(float(math.prod(g @ g.mT for g in grams).sum()) / (p * q * s))
    ratio = torch.tensor(ratios)
    assert abs(ratio.mean().item() - 1) < 5 * ratio.std().item() / 400**0.5 < 0.2


def test_random_is_reproducible_and_leaves_the_global_generator_alone() -> None:
    """The same seed giving another network, or drawing a basis changing what the caller draws next."""
    state = torch.get_rng_state()
    first, again, other = (bases.random((2, 3, 4), 5, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    for field in FACTORS:
        assert torch.equal(getattr(first, field), getattr(again, field))
        assert not torch.equal(getattr(first, field), getattr(other, field))
    assert first.tile == (2, 3, 4) and first.rank == 5


def test_random_refuses() -> None:
    for rank in (0, -3, True, 2.0, "3", None, math.nan):
        with pytest.raises(BasisError, match="rank >= 1"):
            bases.random(2, rank)  # type: ignore[arg-type]
    for seed in (1.5, "a", None, 2**70):
        with pytest.raises(BasisError, match="seed"):
            bases.random(2, 2, seed=seed)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="tile must be"):
        bases.random((2, 2), 2)


@pytest.mark.parametrize(("tile", "rank"), SHIPPED)
def test_shipped_factors_are_as_good_as_stated(tile: tuple[int, int, int], rank: int) -> None:
    """A damaged or mislabelled file, or an error below what is possible (MATH.md §2): then the error is computed wrong."""
    name = bases.shipped()[tile, rank]
    record = json.loads((files("strassen_tile.bases") / "data" / name).read_text(encoding="utf-8"))
    basis = bases.approximate(tile, rank)
    assert (basis.tile, basis.rank) == (tile, rank) == (tuple(record["tile"]), record["rank"])
    assert basis.error == pytest.approx(record["relative_squared_error"], abs=1e-9, rel=0)
    assert basis.kappa == pytest.approx(record["kappa"], rel=1e-6)
    p, q, s = tile
    for slices in (q * s, p * q, p * s):
        assert basis.error >= 1 - rank / slices - 1e-12
    for field in FACTORS:
        ranks = torch.linalg.matrix_rank(getattr(basis, field)).sum().item()
        assert basis.error >= 1 - ranks / (p * q * s) - 1e-12
    assert basis.error < 1 - rank / (p * q * s), "no better than dropping products"
    assert basis.kappa <= 2000


def test_the_table_of_errors() -> None:
    """The figures that the documentation quotes; every rank in between ships, and another product never does harm."""
    ranks: dict[tuple[int, int, int], list[int]] = {}
    for tile, rank in SHIPPED:
        ranks.setdefault(tile, []).append(rank)
    for tile, first, last in (((4, 4, 4), 8, 49), ((3, 3, 3), 8, 22), ((2, 4, 4), 8, 25), ((2, 2, 4), 3, 13)):
        assert ranks[tile] == list(range(first, last + 1))
        along = [bases.approximate(tile, rank).error for rank in ranks[tile]]
        assert all(fewer > more for fewer, more in pairwise(along))
    errors = {rank: bases.approximate(4, rank).error for rank in ranks[4, 4, 4]}
    for rank, error in BEST_4X4X4.items():
        digits = 4 if error < 0.05 else 3
        assert round(errors[rank], digits) == error
    for tile, half, rank in (((4, 4, 8), 4, 24), ((4, 4, 8), 4, 32), ((2, 4, 8), (2, 4, 4), 16)):  # twice, side by side
        assert bases.approximate(tile, 2 * rank).error <= bases.approximate(half, rank).error + 1e-9


def test_a_tile_twice_as_large_has_the_error_of_the_half() -> None:
    """Strassen's algorithm in each product: the orders of sides and indices of the two must agree."""
    for tile, half, rank in (((8, 8, 8), (4, 4, 4), 24), ((4, 8, 8), (2, 4, 4), 12), ((8, 4, 8), (4, 2, 4), 12)):
        basis, small = bases.approximate(tile, 7 * rank), bases.approximate(half, rank)
        assert basis.tile == tile and basis.rank == 7 * rank
        assert basis.error == pytest.approx(small.error, abs=1e-12)
    with pytest.raises(BasisError, match="no approximate basis"):
        bases.approximate(8, 167)
    with pytest.raises(BasisError, match="no approximate basis"):
        bases.approximate((8, 8, 6), 168)


def test_a_tile_with_a_side_of_one_has_what_no_basis_can_beat() -> None:
    """A product taken twice, one of another tile's order, or all of them from the same rows of W."""
    for tile in ((1, 4, 4), (4, 1, 4), (4, 4, 1), (1, 3, 4), (5, 1, 2), (1, 4, 1)):
        for rank in range(1, math.prod(tile)):
            basis = bases.approximate(tile, rank)
            assert (basis.tile, basis.rank) == (tile, rank)
            assert basis.error == pytest.approx(1 - rank / math.prod(tile), abs=1e-12)
    used = bases.approximate((1, 4, 4), 9).weight_encoder.sum(dim=0)
    assert {*used.sum(dim=0).tolist(), *used.sum(dim=1).tolist()} == {2.0, 3.0}


@pytest.mark.parametrize(("tile", "rank"), SHIPPED)
def test_every_order_of_the_sides_is_served(tile: tuple[int, int, int], rank: int) -> None:
    """The wrong symmetry applied: tile and rank would fit, and the products be wrong."""
    error = bases.approximate(tile, rank).error
    for order in set(permutations(tile)):
        basis = bases.approximate(order, rank)
        assert basis.tile == order and basis.rank == rank
        assert basis.error == pytest.approx(error, abs=1e-12)
        assert basis.name == "x".join(map(str, tile)) + f"_r{rank}"


def test_missing_approximation_lists_what_ships() -> None:
    """A user who asks for rank 50 is not told that 49 exists."""
    with pytest.raises(BasisError, match=r"tile \(4, 4, 4\) at rank 50") as raised:
        bases.approximate(4, 50)
    for tile, rank in SHIPPED:
        listed = str(raised.value).split("x".join(map(str, tile)) + ": ")[1].split(";")[0].split(".")[0]
        assert str(rank) in listed.split(", ")
    for rank in (24.0, "24", None, True, [24]):
        with pytest.raises(BasisError, match="must be an integer"):
            bases.approximate(4, rank)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="tile must be"):
        bases.approximate("4x4x4", 24)  # type: ignore[arg-type]


def test_the_list_of_shipped_bases_cannot_be_damaged() -> None:
    """One caller's edit of the cached dictionary changing what everyone gets."""
    with pytest.raises(TypeError):
        bases.shipped()[(4, 4, 4), 24] = "mine.json"  # type: ignore[index]
    assert bases.approximate(4, 24) is bases.approximate((4, 4, 4), 24)
