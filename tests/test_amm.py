"""`st.amm`: predicted errors are the measured ones, signs make it unbiased, and a budget is kept or refused."""

import itertools
from statistics import mean, stdev

import pytest
import torch

import strassen_tile as st
from strassen_tile import bases
from strassen_tile.amm import expected_error, kept, total_ratio
from strassen_tile.errors import BasisError, ConfigError, ShapeError


def operands(n: int = 96, k: int = 128, m: int = 112, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator), torch.randn(k, m, generator=generator)


def error(found: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> float:
    exact = x.double() @ w.double()
    return float((found.double() - exact).square().sum() / exact.square().sum())


KNOWN = [  # other orders of the sides are the same numbers, turned
    pytest.param(
        basis,
        id=f"{basis.name} {basis.tile}",
        marks=[] if list(basis.tile) == sorted(basis.tile) else [pytest.mark.slow],
    )
    for basis in bases.known()
]


@pytest.mark.parametrize("basis", KNOWN)
def test_errors_are_as_predicted(basis: st.Basis) -> None:
    """Of every basis, biased and not: within what a few Gaussian products leave open."""
    x, w = operands()
    for unbiased in (False, True):
        found = st.amm(x, w, basis=basis, unbiased=unbiased)
        assert found.basis is basis
        if basis.is_exact:
            assert error(found.value, x, w) < 1e-10
            assert found.error == 0
            continue
        measured = [
            error(st.amm(*operands(seed=seed), basis=basis, unbiased=unbiased, seed=seed).value, *operands(seed=seed))
            for seed in range(12)
        ]
        # Five standard errors of the mean: errors of a basis that lacks a few products only differ by 6 % from draw to draw.
        assert abs(mean(measured) - found.error) < 5 * stdev(measured) / 12**0.5
        assert mean(measured) == pytest.approx(found.error, rel=0.06)


def test_unbiased_on_operands_with_structure() -> None:
    """The mean over many draws is the product, also of matrices that are anything but random; without signs it is not."""
    x, w = torch.ones(5, 7), torch.arange(21.0).reshape(7, 3)
    basis = bases.approximate(2, 5)
    draws = torch.stack([st.amm(x, w, basis=basis, unbiased=True, seed=seed).value for seed in range(1200)]).double()
    exact, spread = x.double() @ w.double(), draws.std(dim=0) / len(draws) ** 0.5
    assert ((draws.mean(dim=0) - exact).abs() < 4.5 * spread).all()
    plain = st.amm(x, w, basis=basis).value.double()
    assert ((plain - exact).abs() > 4.5 * spread).any()


def test_signs_are_fresh_for_every_column_tile() -> None:
    """Inner index 0 of every tile against 1: nothing is to be summed, and what errs adds up as the root of the tiles."""
    basis, squares = bases.approximate(2, 5), []
    for k in (4, 64):
        x, w = torch.ones(8, k), torch.ones(k, 8)
        x[:, 1::2], w[0::2] = 0, 0
        draws = [st.amm(x, w, basis=basis, unbiased=True, seed=seed).value for seed in range(600)]
        squares.append(float(torch.stack(draws).square().mean()))
    assert squares[1] / squares[0] == pytest.approx(16, rel=0.5)  # 256 with the same ones for all


def test_what_is_kept() -> None:
    """Against the tensors written out."""
    basis = bases.approximate((2, 2, 4), 6)
    p, q, s = basis.tile
    target = torch.zeros(p, q, q, s, p, s, dtype=torch.float64)
    for i, j, k in itertools.product(range(p), range(q), range(s)):
        target[i, j, j, k, i, k] = 1.0
    tensor = torch.einsum("kab,kcd,kef->abcdef", basis.encoder, basis.weight_encoder, basis.decoder)
    assert kept(basis) == pytest.approx(float((target * tensor).sum()) / target.sum())
    scaled = tensor / kept(basis)
    assert expected_error(basis, True) == pytest.approx(float((scaled - target).square().sum() / target.sum()))


def test_the_best_that_the_budget_pays_for() -> None:
    x, w = operands(256, 256, 256)
    errors = []
    for budget in (0.45, 0.6, 0.75, 0.9):
        found = st.amm(x, w, budget)
        assert found.flop_ratio <= budget
        errors.append(found.error)
        others = [b for b in bases.known() if total_ratio(b, (1, 256, 256, 256)) <= budget]
        least = min(expected_error(b, False) for b in others)
        assert found.error == pytest.approx(min(least, 1 - int(256 * budget) / 256))
        assert (found.basis is None) == (found.error < least - 1e-12)
    assert errors == sorted(errors, reverse=True)
    exact = st.amm(x, w, 1.0)
    assert exact.basis.is_exact
    assert exact.error == 0
    small = st.amm(x[:3, :3], w[:3, :3], 1.0)
    assert small.basis is None
    assert torch.equal(small.value, x[:3, :3] @ w[:3, :3])


def test_where_leaving_out_inner_indices_errs_less() -> None:
    """On small matrices, whose encoding takes what it saves; as it is, and right on average."""
    x, w = operands(60, 100, 40)
    for unbiased, expected in ((False, 0.3), (True, 3 / 7)):
        found = st.amm(x, w, 0.7, unbiased=unbiased)
        assert found.basis is None and found.flop_ratio == pytest.approx(0.7) and found.error == pytest.approx(expected)
        measured = [
            error(
                st.amm(*operands(60, 100, 40, seed), 0.7, unbiased=unbiased, seed=seed).value,
                *operands(60, 100, 40, seed),
            )
            for seed in range(40)
        ]
        assert abs(mean(measured) - expected) < 5 * stdev(measured) / 40**0.5
    draws = [
        st.amm(torch.ones(2, 9), torch.arange(18.0).reshape(9, 2), 0.4, unbiased=True, seed=s).value for s in range(900)
    ]
    spread = torch.stack(draws).std(dim=0) / 30
    assert ((torch.stack(draws).mean(dim=0) - torch.arange(18.0).reshape(9, 2).sum(dim=0)).abs() < 4.5 * spread).all()


@pytest.mark.parametrize(("rank", "least", "most"), [(24, 0.7, 1.35), (32, 0.7, 1.35), (44, 0.7, 1.35), (49, 0.4, 0.8)])
def test_rounding_in_bf16_is_counted(rank: int, least: float, most: float) -> None:
    """A basis of large kappa is not what it is in 32 bits: by kappa u², of coefficients that bf16 holds by half of it."""
    basis = bases.approximate(4, rank)
    x, w = (matrix.bfloat16() for matrix in operands(128, 256, 128))
    found = st.amm(x, w, basis=basis)
    added = error(found.value, x, w) - error(st.amm(x.double(), w.double(), basis=basis).value, x, w)
    assert least < added / (basis.kappa * 2.0**-16) < most
    assert found.error == pytest.approx(basis.error + basis.kappa * 2.0**-16, abs=1e-12)


def test_flops_of_both_operands() -> None:
    """By hand: 2NKr + 2KMr + 2NMr and the products, for one side of 4."""
    n, k, m, r = 64, 128, 32, 24
    counted = 2 * r * (n * k + k * m + n * m) + 2 * n * k * m * r / 64
    assert total_ratio(bases.approximate(4, r), (1, n, k, m)) == pytest.approx(counted / (2 * n * k * m))


def test_samples_stay_apart() -> None:
    x, w = torch.randn(3, 6, 16), torch.randn(16, 8)
    together = st.amm(x, w, basis=bases.approximate(4, 24)).value
    assert together.shape == (3, 6, 8)
    for sample, alone in zip(together, x, strict=True):
        torch.testing.assert_close(sample, st.amm(alone, w, basis=bases.approximate(4, 24)).value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    x, w = (matrix.to(dtype) for matrix in operands(32, 64, 48))
    for unbiased in (False, True):
        found = st.amm(x, w, 0.9, unbiased=unbiased)
        assert found.value.dtype == dtype
        assert error(found.value, x, w) == pytest.approx(found.error, rel=0.3)


def test_gradients_flow() -> None:
    x, w = (matrix.requires_grad_() for matrix in operands(16, 16, 16))
    st.amm(x, w, basis=bases.approximate(2, 5), unbiased=True).value.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert float(w.grad.abs().sum()) > 0


@pytest.mark.parametrize("x,w", [((0, 4), (4, 4)), ((4, 0), (0, 4)), ((4, 4), (4, 0)), ((0, 3, 4), (4, 5))])
def test_nothing_to_multiply(x: tuple[int, ...], w: tuple[int, int]) -> None:
    for options in ({}, {"unbiased": True}, {"flop_ratio": 0.9}):
        found = st.amm(torch.zeros(x), torch.zeros(w), **options)
        assert torch.equal(found.value, torch.zeros(x) @ torch.zeros(w))


@pytest.mark.parametrize(
    "x,w,options,kind,said",
    [
        (torch.ones(2, 3), torch.ones(4, 5), {}, ShapeError, r"\(2, 3\) and \(4, 5\)"),
        (torch.ones(3), torch.ones(3, 5), {}, ShapeError, "x must be"),
        (torch.ones(2, 3), torch.ones(3, 5).double(), {}, ShapeError, "one dtype"),
        (torch.ones(2, 3).long(), torch.ones(3, 5).long(), {}, ShapeError, "floating-point"),
        (torch.ones(2, 3, dtype=torch.cfloat), torch.ones(3, 5), {}, ShapeError, "real"),
        ([[1.0]], torch.ones(3, 5), {}, ShapeError, "x must be a tensor"),
        (
            torch.ones(2, 3),
            torch.ones(3, 5),
            {"flop_ratio": 0.1},
            ConfigError,
            "does not pay for one of 3 inner indices",
        ),
        (torch.ones(2, 3), torch.ones(3, 5), {"flop_ratio": float("nan")}, ConfigError, "positive"),
        (torch.ones(2, 3), torch.ones(3, 5), {"flop_ratio": "half"}, ConfigError, "positive"),
        (torch.ones(2, 3), torch.ones(3, 5), {"seed": 0.5}, ConfigError, "seed"),
        (torch.ones(2, 3), torch.ones(3, 5), {"seed": 2**70, "unbiased": True}, ConfigError, "seed"),
        (torch.ones(2, 3), torch.ones(3, 5), {"basis": "strassen"}, ConfigError, "basis must be"),
        (torch.ones(2, 3).to(torch.float8_e4m3fn), torch.ones(3, 5), {}, ShapeError, "16 bits"),
    ],
)
def test_bad_input(x: object, w: object, options: dict, kind: type, said: str) -> None:
    with pytest.raises(kind, match=said):
        st.amm(x, w, **options)


def test_a_basis_that_keeps_nothing() -> None:
    basis = bases.naive(2, 2, 2)
    nothing = st.Basis(basis.encoder, basis.weight_encoder, -basis.decoder)
    with pytest.raises(BasisError, match="cannot be rescaled"):
        st.amm(torch.ones(2, 2), torch.ones(2, 2), basis=nothing, unbiased=True)
