"""Basis: what it accepts, and what it says of itself."""

import math
import time

import pytest
import torch
from torch import Tensor

from strassen_tile import Basis, algebra, bases, reference
from strassen_tile.errors import BasisError

FACTORS = ("encoder", "weight_encoder", "decoder")
HUGE = torch.full((1, 1, 1), 1e200, dtype=torch.float64)
ONE = [[[1.0]]]
SMALL = [bases.random((2, 3, 1), 4, seed=1), bases.random((1, 2, 3), 2), bases.strassen(), bases.approximate(2, 5)]


def apply(basis: Basis, x: Tensor, w: Tensor) -> Tensor:
    """One tile product (or a batch of them), straight from the definition."""
    return sum(
        (e * x).sum((-2, -1))[..., None, None] * (f * w).sum((-2, -1))[..., None, None] * d
        for e, f, d in zip(basis.encoder, basis.weight_encoder, basis.decoder, strict=True)
    )


def tiles(basis: Basis, batch: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    (p, q, s), generator = basis.tile, torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, *size, generator=generator, dtype=torch.float64) for size in ((p, q), (q, s)))


def looped_error(basis: Basis) -> float:
    (p, q, s), total = basis.tile, 0.0
    e, f, d = (getattr(basis, field).tolist() for field in FACTORS)
    for index in range((p * q * s) ** 2):
        a, b, c, g, h, m = (int(i) for i in torch.unravel_index(torch.tensor(index), (p, q, q, s, p, s)))
        tensor = float(b == c and a == h and g == m)
        total += (sum(e[k][a][b] * f[k][c][g] * d[k][h][m] for k in range(basis.rank)) - tensor) ** 2
    return total / (p * q * s)


BAD = {
    "a string": ("abc", "rectangular"), "none": (None, "rectangular"), "ragged": ([[[1.0], [1.0, 2.0]]], "rectangular"),
    "complex": (torch.ones(1, 1, 1, dtype=torch.complex64), "complex"), "complex list": ([[[1j]]], "complex"),
    "nan": ([[[math.nan]]], "finite"), "inf": ([[[-math.inf]]], "finite"), "int overflow": ([[[10**400]]], "too large"),
    "matrix": ([[1.0]], "three"), "rank 0": (torch.ones(0, 1, 1), r"\(0, 1, 1\)"), "empty": ([], "three"),
    "other rank": (torch.ones(2, 1, 1), "fit together"), "other q": (torch.ones(1, 1, 2), "fit together"),
    "other side": (torch.ones(1, 2, 1), "fit together"),
    "meta": (torch.ones(1, 1, 1, device="meta"), "rectangular"),
    "sparse": (torch.ones(1, 1, 1).to_sparse(), "rectangular"),
}  # fmt: skip


@pytest.mark.parametrize("field", range(3))
@pytest.mark.parametrize("case", BAD)
def test_malformed_factors_are_refused_by_name(case: str, field: int) -> None:
    """A basis that cannot multiply exists, or its refusal does not say which factor is wrong."""
    value, message = BAD[case]
    factors = [ONE, ONE, ONE]
    factors[field] = value
    with pytest.raises(BasisError, match=message) as raised:
        Basis(*factors)
    assert FACTORS[field] in str(raised.value)


def test_numbers_come_in_without_rounding_and_stay_ours() -> None:
    """Lists rounded to the default float32 (a saved basis would lose half its digits), or tensors shared with callers."""
    numpy = pytest.importorskip("numpy")
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert Basis([[[0.1]]], ONE, numpy.full((1, 1, 1), 0.1)).encoder.item() == 0.1
    finally:
        torch.set_default_dtype(torch.float32)
    mine = torch.ones(1, 1, 1, dtype=torch.float64, requires_grad=True)
    basis = Basis(mine, mine.detach().numpy(), ONE)
    mine.data.fill_(7.0)
    assert basis.encoder.item() == basis.weight_encoder.item() == 1.0
    assert not basis.encoder.requires_grad and basis.encoder.dtype == torch.float64


def test_a_basis_outlives_the_context_it_was_made_in() -> None:
    """Models are built under `torch.device("meta")` and in inference mode; the basis must work there and afterwards."""
    with torch.device("meta"):
        assert bases.strassen().refit_decoder().is_exact and bases.naive(1, 2, 3).is_exact
        assert bases.random(2, 3).encoder.device.type == Basis(ONE, ONE, ONE).encoder.device.type == "cpu"
    with torch.inference_mode():
        basis = bases.strassen().balance()
    x = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    reference.stl_matmul(x, x, basis).sum().backward()
    assert torch.equal(x.grad, torch.full((2, 2), 4.0, dtype=torch.float64))


@pytest.mark.parametrize("basis", SMALL, ids=repr)
def test_error_and_kappa_against_loops(basis: Basis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong error or kappa chooses the wrong basis; both branches of the error must give the definition."""
    assert basis.error == pytest.approx(looped_error(basis), rel=1e-12, abs=1e-25)
    monkeypatch.setattr(algebra, "EXPLICIT_UP_TO", 0)
    assert Basis(*(getattr(basis, f) for f in FACTORS)).error == pytest.approx(basis.error, rel=1e-12, abs=1e-25)
    p, q, s = basis.tile
    squares = [[sum(v * v for row in term for v in row) for term in getattr(basis, f).tolist()] for f in FACTORS]
    assert basis.kappa == pytest.approx(sum(map(math.prod, zip(*squares, strict=True))) / (p * q * s), rel=1e-12)
    assert basis.flop_ratio == basis.rank / (p * q * s) and basis.param_ratio == basis.rank / (q * s)


def test_error_is_the_expected_error_of_gaussian_products() -> None:
    """The number promised to users is the error they will measure: five standard errors of 20000 products."""
    basis = bases.approximate(2, 4)
    x, w = tiles(basis, 20000)
    squares = (apply(basis, x, w) - x @ w).square().sum((1, 2)) / math.prod(basis.tile)
    assert abs(squares.mean().item() - basis.error) < 5 * squares.std().item() / 20000**0.5 < 0.05


def test_large_tiles_use_gram_matrices_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile beyond the explicit limit would get a wrong error where nobody can check it by hand, or take minutes."""
    start = time.process_time()
    assert bases.random((32, 32, 32), 2).error > 0
    assert time.process_time() - start < 1
    basis = bases.random((16, 16, 17), 3)
    gram = basis.error
    monkeypatch.setattr(algebra, "EXPLICIT_UP_TO", 2**60)
    assert gram == pytest.approx(Basis(*(getattr(basis, f) for f in FACTORS)).error, rel=1e-11)


def test_large_tiles_do_not_round_to_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 - 2 + 1 cancels to rounding noise: a slightly wrong, or an overflowing, large basis must not pass for exact."""
    monkeypatch.setattr(algebra, "EXPLICIT_UP_TO", 0)
    exact = bases.strassen(2)
    off = exact.encoder.clone()
    off[3, 1, 2] += 1e-10
    assert Basis(exact.encoder, exact.weight_encoder, exact.decoder).is_exact
    wrong = Basis(off, exact.weight_encoder, exact.decoder)
    assert not wrong.is_exact and wrong.error == pytest.approx(looped_error_of_one(exact, 3), rel=1e-6)
    assert not Basis(HUGE, HUGE, HUGE).is_exact


def looped_error_of_one(basis: Basis, term: int) -> float:
    """The error that 1e-10 on one entry of E_term makes: the square of 1e-10·F_term⊗D_term."""
    norms = [sum(v * v for v in getattr(basis, f)[term].flatten().tolist()) for f in FACTORS[1:]]
    return 1e-20 * math.prod(norms) / math.prod(basis.tile)


def test_exactness_allows_rounding_of_thirds_only() -> None:
    """1/3 is not a float64, and the algorithm is exact all the same; an error of 1e-9 is not rounding."""
    b = bases.strassen()
    assert Basis(b.encoder / 3, b.weight_encoder * 7, b.decoder * 3 / 7).is_exact
    assert not Basis(b.encoder * (1 + 1e-9), b.weight_encoder, b.decoder).is_exact
