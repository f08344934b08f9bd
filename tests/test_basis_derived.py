"""Algorithms made from algorithms: products, symmetries, refits, balance and rounding."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from strassen_tile import Basis, algebra, bases, reference
from strassen_tile.bases import exact
from strassen_tile.errors import BasisError

FACTORS = ("encoder", "weight_encoder", "decoder")
INEXACT = [bases.random((2, 3, 1), 4, seed=1), bases.random((1, 2, 3), 2), bases.approximate(2, 5)]
ROUNDED = [(2, 4), (2, 6), ((2, 4, 4), 12), (4, 16), (4, 24), (4, 40), (4, 48), ((8, 4, 4), 64)]


def apply(basis: Basis, x: Tensor, w: Tensor) -> Tensor:
    """One tile product (or a batch of them), straight from the definition."""
    return sum(
        (e * x).sum((-2, -1))[..., None, None] * (f * w).sum((-2, -1))[..., None, None] * d
        for e, f, d in zip(basis.encoder, basis.weight_encoder, basis.decoder, strict=True)
    )


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_factor(basis: Basis, field: str, factor: Tensor) -> Basis:
    return Basis(**{**{f: getattr(basis, f) for f in FACTORS}, field: factor})


def norm_and_inner(basis: Basis) -> tuple[float, float]:
    """‖A‖²/pqs and ⟨T, A⟩/pqs of A = Σ E⊗F⊗D; both multiply when tensors do."""
    flat = torch.einsum("kab,kbc,kac->", *(getattr(basis, f) for f in FACTORS))
    grams = [torch.einsum("kab,lab->kl", getattr(basis, f), getattr(basis, f)) for f in FACTORS]
    return float((grams[0] * grams[1] * grams[2]).sum()) / math.prod(basis.tile), float(flat) / math.prod(basis.tile)


def test_kron_nests_the_algorithms() -> None:
    """Outer and inner swapped, or ranks paired in the wrong order: then strassen(2) would not multiply."""
    outer, inner = bases.random((2, 1, 3), 2, seed=3), bases.random((1, 2, 2), 3, seed=4)
    product = outer.kron(inner)
    assert product.tile == (2, 2, 6) and product.rank == 6
    x, w = normal(2, 2), normal(2, 6, seed=1)
    blocks_x, blocks_w = x.reshape(2, 1, 1, 2).transpose(1, 2), w.reshape(1, 2, 3, 2).transpose(1, 2)
    nested = sum(
        torch.einsum("ab,cd->acbd", d, apply(inner, (e[..., None, None] * blocks_x).sum((0, 1)),
                                             (f[..., None, None] * blocks_w).sum((0, 1)))).reshape(2, 6)
        for e, f, d in zip(outer.encoder, outer.weight_encoder, outer.decoder, strict=True)
    )  # fmt: skip
    torch.testing.assert_close(apply(product, x, w), nested, rtol=1e-12, atol=1e-12)
    assert product.kappa == pytest.approx(outer.kappa * inner.kappa)
    (norm_a, inner_a), (norm_b, inner_b) = norm_and_inner(outer), norm_and_inner(inner)
    assert product.error == pytest.approx(1 - 2 * inner_a * inner_b + norm_a * norm_b)
    assert bases.strassen().kron(bases.naive(1, 3, 2)).is_exact
    assert bases.strassen().kron(bases.approximate(2, 5)).error == pytest.approx(bases.approximate(2, 5).error)


@pytest.mark.parametrize("basis", INEXACT, ids=repr)
def test_symmetries(basis: Basis) -> None:
    """A factor transposed or moved wrongly: shipped bases serve every order of their sides by these two."""
    p, q, s = basis.tile
    x, w, z = normal(p, q), normal(q, s, seed=1), normal(s, p, seed=2)
    cycled, flipped = basis.cycle(), basis.transpose()
    assert cycled.tile == (q, s, p) and flipped.tile == (s, q, p)
    for other in (cycled, flipped):
        assert other.error == pytest.approx(basis.error) and other.kappa == pytest.approx(basis.kappa)
    torch.testing.assert_close(apply(flipped, w.mT, x.mT), apply(basis, x, w).mT, rtol=1e-12, atol=1e-12)
    traces = [(x @ apply(cycled, w, z)).trace(), (apply(basis, x, w) @ z).trace()]
    torch.testing.assert_close(*traces, rtol=1e-12, atol=1e-12)
    for field in FACTORS:
        for same in (cycled.cycle().cycle(), flipped.transpose()):
            assert torch.equal(getattr(same, field), getattr(basis, field))


@pytest.mark.parametrize("field", ["decoder", "weight_encoder"])
@pytest.mark.parametrize("basis", INEXACT, ids=repr)
def test_refit_is_the_least_squares_optimum(basis: Basis, field: str) -> None:
    """A refit that is not the optimum: the error is quadratic, so a central difference is its slope, which must be 0."""
    start = with_factor(basis, field, normal(*getattr(basis, field).shape))
    best = getattr(start, f"refit_{field}")()
    assert best.error < start.error
    for other in FACTORS:
        assert other == field or torch.equal(getattr(best, other), getattr(start, other))
    fitted = getattr(best, field)
    for entry in range(fitted.numel()):
        step = torch.zeros_like(fitted)
        step.view(-1)[entry] = 0.1
        up, down = (with_factor(best, field, fitted + sign * step).error for sign in (1, -1))
        assert abs(up - down) < 1e-10 and up >= best.error - 1e-12
    for seed in range(5):
        assert with_factor(best, field, fitted + 1e-3 * normal(*fitted.shape, seed=seed)).error > best.error


def test_refit_of_dependent_terms_and_of_exact_encoders() -> None:
    """Two equal terms make the normal equations singular; Strassen's encoders must give Strassen's decoder back."""
    b = bases.strassen()
    assert b.refit_decoder().is_exact and b.refit_weight_encoder().is_exact
    twice = Basis(*(torch.cat([getattr(b, field)] * 2) for field in FACTORS)).refit_decoder()
    assert twice.error < 1e-20 and twice.decoder.abs().max() <= 1.0
    huge = torch.full((1, 1, 1), 1e200, dtype=torch.float64)
    with pytest.raises(BasisError, match="too large"):
        Basis(huge, huge, [[[1.0]]]).refit_decoder()


def test_balance_changes_nothing_but_the_scales() -> None:
    """Scales that are not powers of two change rounding, so an exact basis would stop being exact."""
    b = bases.approximate(4, 24)
    scales = torch.exp2(torch.linspace(-30, 30, 24, dtype=torch.float64).round())[:, None, None]
    skewed = Basis(b.encoder * scales, b.weight_encoder / scales.square(), b.decoder * scales)
    balanced = skewed.balance()
    for dtype in (torch.float64, torch.float32):
        x, w = normal(8, 12, dtype=dtype), normal(12, 8, seed=1, dtype=dtype)
        assert torch.equal(reference.stl_matmul(x, w, balanced), reference.stl_matmul(x, w, skewed))
    norms = torch.stack([getattr(balanced, field).flatten(1).norm(dim=1) for field in FACTORS])
    assert (norms.amax(0) / norms.amin(0)).max() <= 2**1.5  # two roundings of half a power, and their sum
    assert balanced.error == pytest.approx(b.error)


def test_balance_of_terms_that_have_no_scale() -> None:
    """A factor of zeros, or one whose norm overflows, turned into nan."""
    dead, huge = torch.zeros(1, 1, 1), torch.full((1, 1, 1), 1e300, dtype=torch.float64)
    for basis in (Basis(dead, huge, huge), Basis(huge, dead, huge), Basis(dead, dead, dead)):
        assert basis.balance().error == 1.0
    assert Basis(huge, 1 / huge, [[[1.0]]]).balance().is_exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantize_leaves_dyadic_algorithms_alone(dtype: torch.dtype) -> None:
    """Strassen in bf16 no longer exact, though bf16 holds its coefficients."""
    for basis in (bases.strassen(1), bases.strassen(2), bases.naive(2, 3, 4), bases.approximate(4, 49)):
        assert basis.quantize(dtype).is_exact
    b = bases.strassen()
    lopsided = Basis(b.encoder * 64, b.weight_encoder / 64, b.decoder)
    assert all(torch.equal(getattr(lopsided.quantize(dtype), f), getattr(lopsided, f)) for f in FACTORS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tile", "rank"), ROUNDED)
def test_quantize_rounds_and_then_refits(tile: object, rank: int, dtype: torch.dtype) -> None:
    """Coefficients the dtype cannot hold, or a decoder that was not fitted to the rounded encoders.

    The error grows with kappa: over all shipped bases by at most 1.4 kappa (eps/4)², which is 7.3e-3 in bf16, 1.1e-4 in fp16.
    """
    b = bases.approximate(tile, rank)
    rounded = b.quantize(dtype)
    for field, held in zip(FACTORS, (dtype, dtype, torch.float32), strict=True):
        factor = getattr(rounded, field)
        assert torch.equal(factor.to(held).double(), factor)
    naive = Basis(b.encoder.to(dtype), b.weight_encoder.to(dtype), b.decoder.float())
    assert rounded.error < naive.error
    assert rounded.error < b.error + 1.5 * b.kappa * (torch.finfo(dtype).eps / 4) ** 2
    assert rounded.error == pytest.approx(rounded.refit_decoder().error, rel=1e-5)


def test_quantize_wants_a_floating_point_dtype() -> None:
    for dtype in (torch.int8, torch.complex64, "bfloat16", None, float):
        with pytest.raises(BasisError, match="floating-point dtype"):
            bases.approximate(2, 5).quantize(dtype)


def test_the_symmetries_keep_what_is_exact() -> None:
    """A transpose or an inverse in the wrong place: the moved algorithm would not multiply."""
    basis = bases.strassen().kron(bases.naive(1, 3, 2))
    p, q, s = basis.tile
    sides = [torch.eye(side, dtype=torch.float64) + 0.3 * normal(side, side, seed=side) for side in (p, q, s)]
    factors = basis.encoder, basis.weight_encoder, basis.decoder
    assert Basis(*algebra.moved(factors, *sides)).is_exact
    x, w = normal(p, q), normal(q, s, seed=1)
    a, b, c = sides
    moved = apply(Basis(*algebra.moved(factors, a, b, c)), x, w)
    # By its definition: A⁻¹ (A X B⁻¹ · B W C⁻¹) C.
    inside = apply(basis, a @ x @ torch.linalg.inv(b), b @ w @ torch.linalg.inv(c))
    torch.testing.assert_close(moved, torch.linalg.inv(a) @ inside @ c)


@pytest.mark.parametrize(
    "basis,kappa", [(bases.strassen(), 2.7778), (bases.strassen(2), 7.7161), (bases.naive(2, 2, 2), 1)]
)
def test_conditioned(basis: Basis, kappa: float) -> None:
    better = basis.conditioned(starts=2)
    assert better.is_exact
    assert better.tile == basis.tile
    assert better.rank == basis.rank
    assert better.kappa == pytest.approx(kappa, rel=1e-4)
    assert better.growth_factor <= basis.growth_factor
    norms = [getattr(better, field).flatten(1).norm(dim=1) for field in FACTORS]
    assert better.growth_factor == pytest.approx(sum(float(e * f * d) for e, f, d in zip(*norms, strict=True)))


def test_conditioned_takes_exact_bases_only() -> None:
    with pytest.raises(BasisError, match="keeps exact bases exact"):
        bases.approximate(2, 5).conditioned()
    with pytest.raises(BasisError, match="starts must be"):
        bases.strassen().conditioned(starts=0)


def test_growth_factor_of_strassen() -> None:
    """12 + 2√2, as published."""
    e, f, d = (
        torch.tensor(rows)
        for rows in (exact._STRASSEN_ENCODER, exact._STRASSEN_WEIGHT_ENCODER, exact._STRASSEN_DECODER)
    )
    assert Basis(e, f, d).growth_factor == pytest.approx(12 + 2 * math.sqrt(2))


def test_oriented() -> None:
    basis = bases.random((1, 2, 3), 2, seed=4)
    for tile in itertools.permutations((1, 2, 3)):
        turned = basis.oriented(tile)
        assert turned.tile == tile
        assert turned.error == pytest.approx(basis.error)
    with pytest.raises(BasisError, match="no other order"):
        basis.oriented((2, 2, 3))
