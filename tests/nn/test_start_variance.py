"""If these fail, a random start blows activations up or lets them die: its output has not the variance of `nn.Linear`'s."""

import pytest
import torch
from torch import nn

from strassen_tile import STLConfig, STLLinear

K, M, LAYERS = 64, 48, 24


def row_variances(make, rows=8):
    """Variance of the output, row by row of a tile, over inputs of variance one and many starts."""
    total = torch.zeros(rows, dtype=torch.float64)
    for _ in range(LAYERS):
        x = torch.randn(8, rows, K, dtype=torch.float64)
        total += make()(x).detach().square().mean(dim=(0, 2))
    return total / LAYERS


@pytest.mark.parametrize("scope", ["layer", "tile"])
@pytest.mark.parametrize("mixing", ["sequence", "none", "causal"])
@pytest.mark.parametrize(("tile", "rank"), [(4, None), ((4, 2, 8), 10)], ids=str)
def test_random_start_has_the_variance_of_a_dense_one(tile, rank, mixing, scope):
    config = STLConfig(tile=tile, rank=rank, mixing=mixing, encoder_scope=scope)
    found = row_variances(lambda: STLLinear(K, M, bias=False, config=config, dtype=torch.float64))
    dense = row_variances(lambda: nn.Linear(K, M, bias=False, dtype=torch.float64))
    assert dense.mean() == pytest.approx(1 / 3, rel=0.05)
    assert found.mean() == pytest.approx(float(dense.mean()), rel=0.12)
    assert (found / found.mean() - 1).abs().max() < 0.35  # no row of a tile is left out


@pytest.mark.parametrize("scope", ["layer", "tile"])
@pytest.mark.parametrize("basis", ["random", "orthogonal", "signs", "naive", "approximate", "truncated"])
@pytest.mark.parametrize(
    ("tile", "rank"), [((4, 4, 4), 24), ((2, 4, 4), 12), ((8, 8, 8), 192), ((1, 4, 4), 6)], ids=str
)
def test_every_start_has_it_at_every_tile(tile, rank, basis, scope):
    """A sample of it is off by about √(2/(K/q·r)/24 + ‥) of itself, less than 4 %; three times that is allowed."""
    if basis == "truncated" and tile[0] < tile[1]:
        pytest.skip("Strassen's algorithm is for cubes")
    if basis == "approximate" and tile not in ((4, 4, 4), (2, 4, 4)):
        pytest.skip("none ships")
    rank = tile[0] * tile[1] * tile[2] if basis == "naive" else rank
    config = STLConfig(tile=tile, rank=rank, basis=basis, init="random", encoder_scope=scope)
    found = row_variances(lambda: STLLinear(K, M, bias=False, config=config, dtype=torch.float64))
    assert found.mean() == pytest.approx(1 / 3, rel=0.12)
    if basis in ("random", "orthogonal", "signs"):
        assert (found / found.mean() - 1).abs().max() < 0.35


@pytest.mark.parametrize("scope", ["layer", "tile"])
def test_causal_signs_have_it_in_every_row(scope):
    config = STLConfig(basis="signs", mixing="causal", encoder_scope=scope)
    found = row_variances(lambda: STLLinear(K, M, bias=False, config=config, dtype=torch.float64))
    assert found.mean() == pytest.approx(1 / 3, rel=0.12)
    assert (found / found.mean() - 1).abs().max() < 0.35


@pytest.mark.parametrize("basis", ["naive", "strassen", "approximate"])
@pytest.mark.parametrize("scope", ["layer", "tile"])
def test_noise_behind_a_given_basis_has_it_too(basis, scope):
    rank = {"naive": 64, "strassen": 49, "approximate": 24}[basis]
    config = STLConfig(tile=4, rank=rank, basis=basis, init="random", encoder_scope=scope)
    found = row_variances(lambda: STLLinear(K, M, bias=False, config=config, dtype=torch.float64))
    assert found.mean() == pytest.approx(1 / 3, rel=0.12)


def test_scale_of_the_weight_replaced_is_taken_over():
    config = STLConfig(tile=4, rank=24, init="random")

    def small():
        linear = nn.Linear(K, M, bias=False, dtype=torch.float64)
        nn.init.normal_(linear.weight, std=0.02)
        return STLLinear.from_linear(linear, config)

    assert row_variances(small).mean() == pytest.approx(K * 0.02**2, rel=0.12)


@pytest.mark.parametrize("k", [5, 64])
def test_bias_starts_as_nn_linears(k):
    torch.manual_seed(1)
    layer = STLLinear(k, 4000, config=STLConfig(rank=6))
    torch.manual_seed(1)
    dense = nn.Linear(k, 4000)
    assert layer.bias.abs().max() <= k**-0.5
    variance = float(dense.bias.detach().square().mean())
    assert float(layer.bias.detach().square().mean()) == pytest.approx(variance, rel=0.1)


def test_features_that_fill_no_tile_do_not_weigh_less():
    # 5 features in two column tiles of 4: three of the eight encoded entries are always zero.
    config = STLConfig(tile=4, rank=24)
    total = 0.0
    for _ in range(200):
        layer = STLLinear(5, 16, bias=False, config=config, dtype=torch.float64)
        total += float(layer(torch.randn(4, 8, 5, dtype=torch.float64)).detach().square().mean()) / 200
    assert total == pytest.approx(1 / 3, rel=0.15)


def test_starts_follow_the_global_seed():
    config = STLConfig(rank=6)
    first, other = STLLinear(8, 8, config=config), STLLinear(8, 8, config=config)
    torch.manual_seed(0)
    again = STLLinear(8, 8, config=config)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.encoded_weight, other.encoded_weight)
