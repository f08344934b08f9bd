"""E, Ŵ and D fitted together: errors that only fall, what can be exact is, and each step a minimum of its factor."""

from itertools import pairwise

import pytest
import torch

from strassen_tile import STLConfig, STLLinear, reference
from strassen_tile.errors import ConfigError, ShapeError
from strassen_tile.nn import alternating, alternating_apart, normal_equations
from strassen_tile.nn.alternate import fit_factors
from strassen_tile.nn.alternating_apart import Apart
from strassen_tile.nn.alternating_shared import Shared
from strassen_tile.nn.fit import encode_weight

K, M = 18, 13


def problem(tile: tuple[int, int, int], rank: int, seed: int = 0, scope: str = "layer") -> tuple[torch.Tensor, ...]:
    """Inputs whose features and neighbouring rows depend on each other, a weight, and factors to start from."""
    torch.manual_seed(seed)
    layer = STLLinear(K, M, config=STLConfig(tile=tile, rank=rank, encoder_scope=scope)).double()
    mix = torch.randn(K, K, dtype=torch.float64) * torch.logspace(0, -1.5, K, dtype=torch.float64)
    x = torch.randn(7, 8, K, dtype=torch.float64) @ mix
    x[:, 1:] += 0.5 * x[:, :-1]
    return x, torch.randn(K, M, dtype=torch.float64), layer.encoder, layer.encoded_weight, layer.decoder


def loss(x: torch.Tensor, w: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
    return (reference.stl_linear(x, factors[1], factors[0], factors[2], out_features=M) - x @ w).square().sum()


@pytest.mark.parametrize("scope", ["layer", "tile"])
@pytest.mark.parametrize("tile,rank", [((4, 4, 4), 20), ((1, 4, 4), 6), ((2, 3, 5), 7)])
def test_errors_fall(tile: tuple[int, int, int], rank: int, scope: str) -> None:
    x, w, *factors = problem(tile, rank, scope=scope)
    found = fit_factors(x, w, *factors, rounds=6, damping=0.0)
    assert len(found.errors) == 7
    errors = [max(error, 1e-12) for error in found.errors]  # rounding: seven pairs of tiles can be had exactly
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[1]
    # Against the definition, ragged edges cut off: features and outputs that lie over them count nothing.
    assert float(loss(x, w, *found[:3]) / (x @ w).square().sum()) == pytest.approx(
        found.errors[-1], rel=1e-6, abs=1e-12
    )


@pytest.mark.parametrize("scope", ["layer", "tile"])
@pytest.mark.parametrize("step,which", [("weight", 1), ("encoder", 0), ("decoder", 2)])
def test_each_step_is_a_minimum(step: str, which: int, scope: str, monkeypatch) -> None:
    """The gradient of its factor is zero after it, by autograd through the definition; of encoders of tiles the last's is."""
    monkeypatch.setattr(normal_equations, "RIDGE", 1e-13)
    monkeypatch.setattr(alternating_apart, "_ITERATIONS", 40)  # to their end, which a round of a fit does not wait for
    x, w, *factors = problem((2, 3, 5), 4, scope=scope)
    steps = Apart if scope == "tile" else Shared
    if step != "weight":
        monkeypatch.setattr(steps, "weight", lambda self, factors: factors.w)
    if step != "encoder":
        monkeypatch.setattr(steps, "encoder", lambda self, factors: factors.e)
    if step != "decoder":
        monkeypatch.setattr(alternating, "_decoder", lambda factors, *equations: factors.d)
    found = list(fit_factors(x, w, *factors, rounds=1, damping=0.0)[:3])
    found[which] = found[which].detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x, w, *found), found[which])
    before = [factor.detach().clone().requires_grad_() for factor in factors]
    (first,) = torch.autograd.grad(loss(x, w, *before), before[which])
    if scope == "tile" and step == "encoder":
        gradient, first = gradient[-1], first[-1]
    assert float(gradient.norm()) < 1e-6 * float(first.norm())


def test_encoders_of_tiles_fit_no_worse_than_one_for_all() -> None:
    x, w, *factors = problem((1, 4, 4), 6)
    each = (factors[0].expand(5, -1, -1, -1), factors[1], factors[2].expand(4, -1, -1, -1))
    shared, apart = (fit_factors(x, w, *start, rounds=8).errors for start in (factors, each))
    assert apart[0] == pytest.approx(shared[0], rel=1e-9)
    assert apart[-1] < 0.8 * shared[-1]


@pytest.mark.parametrize("tile,rank", [((1, 4, 4), 6), ((2, 3, 5), 7), ((1, 4, 4), 15), ((2, 3, 5), 1)])
def test_the_start_of_low_rank_is_the_best_product_of_its_rank(tile: tuple[int, int, int], rank: int) -> None:
    """By a truncated SVD of the outputs in float64; terms beyond the smaller side, or not one for each row, are put to use."""
    x, w, *factors = problem(tile, rank, scope="tile")
    values = torch.linalg.svdvals((x @ w).flatten(0, 1)).square()
    found = fit_factors(x, w, *factors, rounds=1, damping=0.0, low_rank=True)
    if rank < tile[0]:  # no rank at all: the start given
        assert found.errors[0] <= 1 + 1e-9
        return
    lost = float(values[rank // tile[0] :].sum() / values.sum())
    assert found.errors[0] == pytest.approx(lost, rel=1e-9, abs=1e-12)
    if rank % tile[0]:
        assert float(found.encoded_weight[-1].abs().max()) > 1e-3 * float(found.encoded_weight.abs().max())
    assert found.errors[1] < 0.7 * lost + 1e-12


def test_a_start_that_is_nearer_than_low_rank_stays() -> None:
    """So an exact basis does; and what is worse than low rank does not."""
    x, w, *factors = problem((1, 4, 4), 6, scope="tile")
    layer = STLLinear(K, M, config=STLConfig(tile=(1, 4, 4), rank=16, basis="naive", encoder_scope="tile")).double()
    encoder, decoder = (f.detach() for f in (layer.encoder, layer.decoder))
    exact = fit_factors(x, w, encoder, encode_weight(w, encoder, decoder), decoder, rounds=1, low_rank=True)
    assert exact.errors[0] < 1e-12
    given, low = (fit_factors(x, w, *factors, rounds=4, low_rank=low).errors for low in (False, True))
    assert low[0] < given[0] and low[-1] < given[-1]
    near = fit_factors(x, w, *factors, rounds=8)[:3]
    assert fit_factors(x, w, *near, rounds=1, low_rank=True).errors == fit_factors(x, w, *near, rounds=1).errors


@pytest.mark.parametrize("scope", ["layer", "tile"])
@pytest.mark.parametrize("reach", [0.0, 30.0])
def test_errors_fall_however_far_a_round_reaches(reach: float, scope: str, monkeypatch) -> None:
    monkeypatch.setattr(alternating, "_REACH", reach)
    x, w, *factors = problem((1, 4, 4), 6, scope=scope)
    found = fit_factors(x, w, *factors, rounds=8, damping=0.0)
    errors = found.errors
    assert all(after <= before for before, after in pairwise(errors)) and errors[-1] < 0.9 * errors[2]
    assert float(loss(x, w, *found[:3]) / (x @ w).square().sum()) == pytest.approx(errors[-1], rel=1e-6)


def test_reaching_ahead_gets_further(monkeypatch) -> None:
    x, w, *factors = problem((1, 4, 4), 6, scope="tile")
    ended = []
    for reach in (0.0, alternating._REACH):
        monkeypatch.setattr(alternating, "_REACH", reach)
        ended.append(fit_factors(x, w, *factors, rounds=12, damping=0.01).errors[-1])
    assert ended[1] < ended[0]


def test_equations_of_products_are_those_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(3, n, n - 1, dtype=torch.float64, generator=generator) for n in (5, 4))  # of less rank
    left, right = one @ one.mT, other @ other.mT
    left[2] = 0  # a tile that nothing is known of
    rest = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    products = normal_equations.Products(left, right)
    for at in range(3):
        wanted = normal_equations.step(torch.kron(left[at], right[at]), rest.reshape(-1, 1)).view(5, 4)
        torch.testing.assert_close(products.step(at, rest), wanted, rtol=1e-6, atol=1e-8 * float(wanted.abs().max()))


def test_what_can_be_exact_is() -> None:
    """Inputs of few directions leave room: fewer unknowns than a product has are enough."""
    x, w, *factors = problem((1, 4, 4), 6)
    low = x[..., :3] @ torch.randn(3, K, dtype=torch.float64)
    assert fit_factors(low, w, *factors, rounds=30, damping=0.0).errors[-1] < 1e-6


@pytest.mark.parametrize("scope", ["layer", "tile"])
def test_few_rows_are_not_learnt_by_heart(scope: str) -> None:
    """Fitted to a few rows alone, a layer is far off on others; white rows of a tenth of their energy keep it near."""
    x, w, *factors = problem((1, 4, 4), 8, scope=scope)
    lost = []
    for damping in (0.0, 0.1):
        found = fit_factors(x[:2], w, *factors, rounds=6, damping=damping)
        lost.append(float(loss(x[2:], w, *found[:3]) / (x[2:] @ w).square().sum()))
    assert lost[1] < 0.5 * lost[0]


def test_white_rows() -> None:
    """As many rows of Gaussian noise of that energy, but for the noise."""
    x, w, *factors = problem((2, 3, 5), 4)
    noise = torch.randn(20_000, 2, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noise *= (0.2 * x.square().sum() / noise.square().sum()).sqrt()
    pairs = torch.cat([x.view(-1, 2, K), noise])
    damped, noisy = (fit_factors(rows, w, *factors, rounds=3, damping=d) for rows, d in ((x, 0.2), (pairs, 0.0)))
    assert damped.errors == pytest.approx(noisy.errors, rel=0.02)


def test_dtypes_and_inputs_stay() -> None:
    x, w, *factors = problem((4, 4, 4), 8)
    single = [factor.detach().float() for factor in factors]
    before = [factor.clone() for factor in single]
    found = fit_factors(x.float(), w.float(), *single, rounds=2)
    assert all(factor.dtype == torch.float32 for factor in found[:3])
    assert all(torch.equal(one, other) for one, other in zip(single, before, strict=True))
    assert torch.isfinite(found.encoder).all()
    uneven = torch.cat([x, x[:, :1]], dim=1)  # a ninth row, in a tile over the edge
    assert fit_factors(uneven, w, *factors, rounds=2).errors == fit_factors(x, w, *factors, rounds=2).errors
    assert fit_factors(torch.zeros_like(x), w, *factors, rounds=1).errors == (0.0, 0.0)


@pytest.mark.parametrize("scope", ["layer", "tile"])
def test_scales_of_inputs(scope: str) -> None:
    """Inputs whose squares are beyond float32, small or large, are fitted to as others are."""
    x, w, *factors = problem((1, 4, 4), 6, scope=scope)
    usual = fit_factors(x, w, *factors, rounds=3).errors
    for scale in (1e-25, 1e25):
        assert fit_factors(scale * x, w, *factors, rounds=3).errors == pytest.approx(usual, rel=1e-4)


def test_bad_input() -> None:
    x, w, *factors = problem((4, 4, 4), 8)
    with pytest.raises(ShapeError, match="inputs must be"):
        fit_factors(x[..., :5], w, *factors)
    with pytest.raises(ShapeError, match="4 rows a sample"):
        fit_factors(x[:, :3], w, *factors)
    with pytest.raises(ConfigError, match="rounds"):
        fit_factors(x, w, *factors, rounds=0)
    with pytest.raises(ShapeError, match="or those of each tile"):
        fit_factors(x, w, factors[0].expand(5, -1, -1, -1), *factors[1:])
    with pytest.raises(ConfigError, match="low_rank needs an encoder for each tile"):
        fit_factors(x, w, *factors, low_rank=True)
