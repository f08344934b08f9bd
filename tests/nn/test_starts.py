"""If these fail, a start is not what it is called: not orthonormal, not of signs, not what matters most of Strassen's terms."""

import itertools

import pytest
import torch
from torch import nn

from strassen_tile import Basis, STLConfig, STLLinear, bases, convert
from strassen_tile.errors import BasisError, ConfigError
from strassen_tile.nn.init import start_factors

DRAWN = ["random", "orthogonal", "signs"]


def drawn(copies=1, **config):
    made = STLConfig(**config)
    return start_factors(made, made.load_basis(), copies, copies)


@pytest.mark.parametrize("scope", ["layer", "tile"])
@pytest.mark.parametrize(("tile", "rank"), [(4, 24), ((2, 4, 4), 12), (8, 40), ((1, 4, 4), 6), ((3, 2, 5), 3)], ids=str)
def test_orthogonal_factors_are_orthonormal_up_to_a_number(tile, rank, scope):
    for factor in drawn(3, tile=tile, rank=rank, basis="orthogonal", encoder_scope=scope):
        for matrix in factor.flatten(-2).view(-1, rank, factor[..., 0, :, :].numel() // factor[..., 0, 0, 0].numel()):
            short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
            gram = short @ short.mT
            torch.testing.assert_close(gram, gram[0, 0] * torch.eye(len(gram)).double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("basis", DRAWN)
@pytest.mark.parametrize(("tile", "rank"), [(4, 24), ((2, 4, 4), 12), (8, 192), ((1, 4, 4), 6)], ids=str)
def test_drawn_factors_have_the_same_mean_square(tile, rank, basis):
    """Exactly, but for Gaussian ones: theirs is a mean of `count` squares, with a deviation of √(2/count)."""
    encoder, decoder = drawn(tile=tile, rank=rank, basis=basis)
    for factor, expected in ((encoder, 1 / encoder[0].numel()), (decoder, 1 / rank)):
        within = 4 * (2 / factor.numel()) ** 0.5 if basis == "random" else 1e-12
        assert float(factor.square().mean()) == pytest.approx(expected, rel=within)


def test_the_random_start_is_the_one_it_was():
    """Rows of old runs are made again from their seeds."""
    torch.manual_seed(3)
    encoder, decoder = drawn(tile=(2, 3, 4), rank=5)
    torch.manual_seed(3)
    assert torch.equal(encoder, torch.randn(5, 2, 3, dtype=torch.float64) / 6**0.5)
    assert torch.equal(decoder, torch.randn(5, 2, 4, dtype=torch.float64) / 5**0.5)


@pytest.mark.parametrize("mixing", ["sequence", "none", "causal"])
def test_signs_have_one_size_each(mixing):
    encoder, decoder = drawn(2, tile=4, basis="signs", mixing=mixing, encoder_scope="tile")
    per_term, per_row = encoder.abs().flatten(2), decoder.abs().transpose(1, 2).flatten(2)
    for values in (per_term, per_row):
        largest = values.amax(dim=-1, keepdim=True)
        assert bool(((values == 0) | (values == largest)).all()) and bool(largest.gt(0).all())
    assert bool((per_term == 0).any()) == (mixing == "causal")
    assert len(encoder.sign().unique()) == len(decoder.sign().unique()) == 2 + (mixing == "causal")


def test_causal_rows_of_signs_see_earlier_ones_only():
    layer = STLLinear(8, 8, config=STLConfig(basis="signs", mixing="causal"), dtype=torch.float64)
    rows = torch.autograd.functional.jacobian(layer, torch.randn(1, 8, 8).double()).abs().sum(dim=(2, 5)).squeeze()
    assert torch.equal(rows > 0, torch.kron(torch.eye(2), torch.ones(4, 4).tril()) > 0)


def test_orthogonal_starts_are_refused_where_they_would_be_cut():
    config = STLConfig(basis="orthogonal", mixing="causal")
    for fails in (config.load_basis, lambda: STLLinear(8, 8, config=config)):
        with pytest.raises(ConfigError, match="mixing='causal' takes 'random', 'signs' or 'naive'"):
            fails()
    STLLinear(8, 8, config=STLConfig(tile=(1, 4, 4), basis="orthogonal", mixing="causal"))
    with pytest.raises(ConfigError, match="basis 'truncated' lets rows see later ones"):
        STLLinear(8, 8, config=STLConfig(basis="truncated", mixing="causal"))


@pytest.mark.filterwarnings("ignore:rank 24 on a tile")
@pytest.mark.parametrize("basis", DRAWN)
def test_a_fit_to_drawn_factors_is_exact_where_terms_span_everything(basis):
    linear = nn.Linear(12, 8).double()
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    config = STLConfig(tile=(1, 4, 4), rank=24, basis=basis, init="fit")
    torch.testing.assert_close(STLLinear.from_linear(linear, config)(x), linear(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("basis", ["orthogonal", "signs"])
def test_drawn_starts_follow_the_global_seed_and_leave_the_weight_alone(basis):
    config = STLConfig(rank=6, basis=basis)
    assert not config.fits
    first, other = STLLinear(8, 8, config=config), STLLinear(8, 8, config=config)
    torch.manual_seed(0)
    again = STLLinear(8, 8, config=config)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.encoder, other.encoder)


def without(basis, dropped):
    kept = [k for k in range(basis.rank) if k not in dropped]
    return Basis(*(getattr(basis, f)[kept] for f in ("encoder", "weight_encoder", "decoder"))).refit_decoder()


def test_truncation_drops_the_term_that_matters_least():
    best = min(without(bases.strassen(1), {k}).error for k in range(7))
    assert bases.truncated(1, 6).error == pytest.approx(best, abs=1e-12)
    best = min(without(bases.strassen(2), {k}).error for k in range(49))
    assert bases.truncated(2, 48).error == pytest.approx(best, abs=1e-12)
    for rank in (40, 30, 20, 10):  # later on, too
        best = min(without(bases.truncated(2, rank), {k}).error for k in range(rank))
        assert bases.truncated(2, rank - 1).error == pytest.approx(best, abs=1e-9)
    tried = [without(bases.strassen(1), set(pair)).error for pair in itertools.combinations(range(7), 2)]
    assert bases.truncated(1, 5).error == pytest.approx(min(tried), abs=1e-12)  # one by one finds the best pair here


@pytest.mark.parametrize(("levels", "rank"), [(1, 3), (2, 16), (2, 24), (2, 32), (3, 192)])
def test_truncated_terms_are_strassens_with_the_best_decoder(levels, rank):
    basis, whole = bases.truncated(levels, rank), bases.strassen(levels)
    pairs = {tuple(row) for row in torch.cat([whole.encoder, whole.weight_encoder], dim=2).flatten(1).tolist()}
    chosen = {tuple(row) for row in torch.cat([basis.encoder, basis.weight_encoder], dim=2).flatten(1).tolist()}
    assert chosen < pairs and len(chosen) == rank
    assert basis.error == pytest.approx(basis.refit_decoder().error, abs=1e-10)
    assert basis.kappa < whole.kappa


@pytest.mark.parametrize(("rank", "error"), [(16, 0.770), (20, 0.685), (24, 0.600), (32, 0.432)])
def test_errors_are_those_that_are_stated(rank, error):
    assert bases.truncated(2, rank).error == pytest.approx(error, abs=6e-4)


def test_all_terms_are_strassens_algorithm():
    for field in ("encoder", "weight_encoder", "decoder"):
        assert torch.equal(getattr(bases.truncated(2, 49), field), getattr(bases.strassen(2), field))


@pytest.mark.parametrize("wrong", [(0, 1), (4, 7), (True, 1), (2.0, 7), (2, 0), (2, 50), (2, None), (1, True)], ids=str)
def test_truncation_refuses(wrong):
    with pytest.raises(BasisError, match=r"truncated takes (levels|a rank) of 1 to"):
        bases.truncated(*wrong)


def test_truncated_starts_are_of_cubes():
    assert STLConfig(basis="truncated").rank == 24
    assert STLConfig(basis="truncated", rank=30).load_basis().rank == 30
    for wrong in ({"tile": (2, 4, 4)}, {"mixing": "none"}):
        with pytest.raises(ConfigError, match="basis 'truncated' needs a cubic tile"):
            STLConfig(basis="truncated", **wrong).load_basis()


@pytest.mark.parametrize("basis", [*DRAWN, "approximate"])
@pytest.mark.parametrize(("k", "m"), [(64, 256), (256, 64)])
def test_the_spectral_rule_sets_each_factor(k, m, basis):
    """√(1/d_in)·min(1, √(d_out/d_in)): 16→24, K/4→M/4, 24→16. Of Ŵ's samples the deviation is told to 2 % (5 sigma)."""
    linear = nn.Linear(k, m)
    nn.init.zeros_(linear.weight)  # the scale of what was there does not count
    config = STLConfig(basis=basis, init="spectral")
    model = nn.Sequential(linear)
    convert(model, config, example_inputs=torch.randn(2, 4, k), filter_fn=lambda module, name: True, force_mixing=["0"])
    assert model[0].config == config
    for layer in (model[0], STLLinear.from_linear(linear, config), STLLinear(k, m, config=config)):
        expected = (4 / k) ** 0.5 * min(1, (m / k) ** 0.5)
        assert float(layer.encoded_weight.detach().square().mean().sqrt()) == pytest.approx(expected, rel=0.02)
        if basis in ("orthogonal", "signs"):
            assert float(layer.encoder.detach().square().mean().sqrt()) == pytest.approx(1 / 4, rel=1e-5)
            wanted = (1 / 24) ** 0.5 * (16 / 24) ** 0.5
            assert float(layer.decoder.detach().square().mean().sqrt()) == pytest.approx(wanted, rel=1e-5)
