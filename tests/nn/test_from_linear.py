"""If these fail, a layer that takes over from a dense one starts further from it than it must, or loses what it carried."""

import pytest
import torch
from torch import nn

from strassen_tile import STLConfig, STLLinear, stl_linear
from strassen_tile.errors import ConfigError, ShapeError

SIZES = [(8, 8), (9, 10), (3, 17), (1, 1), (0, 5), (5, 0)]
EXACT = {
    "naive": STLConfig(tile=(2, 3, 2), rank=12, basis="naive"),
    "naive per tile": STLConfig(tile=(2, 3, 2), rank=12, basis="naive", encoder_scope="tile"),
    "naive causal": STLConfig(tile=(3, 2, 2), rank=12, basis="naive", mixing="causal"),
    "naive rows apart": STLConfig(tile=(1, 3, 2), rank=6, basis="naive", mixing="none"),
    "strassen": STLConfig(tile=2, rank=7, basis="strassen"),
    "strassen twice": STLConfig(tile=4, rank=49, basis="strassen", encoder_scope="tile"),
}


def dense(k, m, **options):
    linear = nn.Linear(k, m, dtype=torch.float64, **options)
    if linear.weight.numel():
        nn.init.normal_(linear.weight)
    return linear


def relative_error(found, expected):
    return ((found - expected).square().sum() / expected.square().sum()).item()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("config", EXACT.values(), ids=EXACT)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_exact_basis_is_the_dense_layer(config, size):
    linear = dense(*size)
    layer = STLLinear.from_linear(linear, config)
    for n in (1, 5, 8):
        x = torch.randn(2, n, size[0], dtype=torch.float64)
        torch.testing.assert_close(layer(x), linear(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("tile", "rank"), [(4, 24), (4, 47), (2, 5), ((2, 4, 4), 16)], ids=str)
def test_approximate_basis_errs_by_its_own_error(tile, rank):
    config = STLConfig(tile=tile, rank=rank, basis="approximate")
    expected = config.load_basis().error
    linear, x = dense(128, 128, bias=False), torch.randn(8, 16, 128, dtype=torch.float64)
    error = relative_error(STLLinear.from_linear(linear, config)(x), linear(x))
    assert error == pytest.approx(expected, rel=0.1)


def operator_error(layer, linear, p):
    """E‖layer(X) − linear(X)‖² over Gaussian X of p rows: the squared distance of the two linear maps."""
    k = linear.in_features
    basis = torch.eye(p * k, dtype=torch.float64).view(p * k, p, k)
    return (layer(basis) - linear(basis)).square().sum()


RANDOM = {
    "one encoder": STLConfig(tile=(2, 3, 2), rank=5),
    "an encoder a tile": STLConfig(tile=(2, 3, 2), rank=5, encoder_scope="tile"),
    "causal": STLConfig(tile=(3, 2, 2), rank=6, mixing="causal"),
    "rows apart": STLConfig(tile=4, rank=6, mixing="none"),
}


@pytest.mark.parametrize("config", RANDOM.values(), ids=RANDOM)
def test_fit_of_a_random_basis_is_the_optimum_on_gaussian_inputs(config):
    linear = dense(8, 7, bias=False)
    layer = STLLinear.from_linear(linear, config)
    best = operator_error(layer, linear, config.pqs[0])
    (gradient,) = torch.autograd.grad(best, layer.encoded_weight)
    at_zero = linear.weight.square().sum() * config.pqs[0]
    assert best < at_zero  # it does fit something
    assert gradient.abs().max() < 1e-4 * gradient.numel() ** -0.5 * at_zero  # and the ridge hardly shows
    start = layer.encoded_weight.detach().clone()
    for scale in (1e-2, 1e-1, 1.0):
        for _ in range(20):
            with torch.no_grad():
                layer.encoded_weight.copy_(start + scale * torch.randn_like(start))
            assert operator_error(layer, linear, config.pqs[0]) > best


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("inputs", [None, torch.randn(2, 5, 8, dtype=torch.float64)], ids=["blind", "calibrated"])
@pytest.mark.parametrize("config", RANDOM.values(), ids=RANDOM)
@pytest.mark.parametrize(("k", "m"), [(0, 5), (8, 0), (0, 0), (1, 1), (8, 1)])
def test_any_size_is_fitted(k, m, config, inputs):
    linear = dense(k, m)
    inputs = None if inputs is None else inputs[..., :k]
    layer = STLLinear.from_linear(linear, config, inputs=inputs)
    x = torch.randn(2, 5, k, dtype=torch.float64)
    assert layer(x).shape == (2, 5, m)
    assert layer(x).isfinite().all()
    if not k:
        torch.testing.assert_close(layer(x), linear(x))


def test_more_encoders_fit_at_least_as_well():
    # On average over starts: each start draws other encoders.
    errors = {"layer": 0.0, "tile": 0.0}
    for _ in range(12):
        linear = dense(24, 16, bias=False)
        for scope in errors:
            config = STLConfig(tile=4, rank=20, encoder_scope=scope)
            errors[scope] += operator_error(STLLinear.from_linear(linear, config), linear, 4).item() / 12
    assert errors["tile"] < 1.02 * errors["layer"]


def test_the_same_encoder_everywhere_fits_the_same_as_one():
    from strassen_tile.nn import fit

    weight, r = torch.randn(9, 7, dtype=torch.float64), 5
    encoder, decoder = torch.randn(r, 2, 3, dtype=torch.float64), torch.randn(r, 2, 2, dtype=torch.float64)
    one = fit.encode_weight(weight, encoder, decoder)
    each = fit.encode_weight(weight, encoder.expand(3, -1, -1, -1), decoder.expand(4, -1, -1, -1))
    torch.testing.assert_close(each, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", RANDOM.values(), ids=RANDOM)
def test_calibration_is_least_squares_on_its_inputs(config):
    linear = dense(6, 5, bias=False)
    x = torch.randn(20, 7, 6, dtype=torch.float64)
    torch.manual_seed(3)
    closed = STLLinear.from_linear(linear, config)
    torch.manual_seed(3)
    fitted = STLLinear.from_linear(linear, config, inputs=x)
    assert torch.equal(closed.encoder, fitted.encoder)
    encoder, decoder = fitted.factors()
    # Y is linear in Ŵ: the columns of the design are the outputs for unit Ŵ.
    units = torch.eye(fitted.encoded_weight.numel(), dtype=torch.float64).view(-1, *fitted.encoded_weight.shape)
    columns = [stl_linear(x, unit, encoder, decoder, out_features=5).flatten() for unit in units]
    design, target = torch.stack(columns, dim=1).detach(), linear(x).detach().flatten()
    solution = torch.linalg.lstsq(design, target.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    best = float((design @ solution - target).norm())
    found = float((fitted(x) - linear(x)).detach().norm())
    assert best > 0.01 * target.norm()  # there is something left over
    assert found == pytest.approx(best, rel=1e-6)
    assert found < (closed(x) - linear(x)).norm()
    if torch.linalg.matrix_rank(design) == design.shape[1]:
        torch.testing.assert_close(fitted.encoded_weight.detach().flatten(), solution, rtol=1e-4, atol=1e-4)


def test_calibration_never_does_worse_than_the_closed_form():
    # Fewer rows than unknowns, rows of very different sizes, and dead features.
    linear = dense(16, 8)
    config = STLConfig(tile=4, rank=20)
    for scale in (torch.ones(16), torch.logspace(-3, 3, 16), torch.zeros(16)):
        x = torch.randn(2, 5, 16, dtype=torch.float64) * scale
        torch.manual_seed(3)
        closed = STLLinear.from_linear(linear, config)
        torch.manual_seed(3)
        fitted = STLLinear.from_linear(linear, config, inputs=x)
        assert (fitted(x) - linear(x)).norm() <= (closed(x) - linear(x)).norm() * (1 + 1e-9)
        assert fitted.encoded_weight.isfinite().all()


@pytest.mark.parametrize("config", [STLConfig(rank=6), STLConfig(rank=49, basis="strassen")], ids=["random", "given"])
def test_what_the_dense_layer_carried_is_kept(config):
    linear = nn.Linear(9, 10, dtype=torch.bfloat16).eval()
    before = {name: p.clone() for name, p in linear.named_parameters()}
    layer = STLLinear.from_linear(linear, config)
    assert not layer.training
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert torch.equal(layer.bias, linear.bias)
    assert layer.bias.data_ptr() != linear.bias.data_ptr()
    assert all(torch.equal(p, before[name]) for name, p in linear.named_parameters())
    assert STLLinear.from_linear(nn.Linear(9, 10, bias=False).train(), config).bias is None
    assert STLLinear.from_linear(nn.Linear(9, 10).train(), config).training


def test_frozen_stays_frozen():
    linear = nn.Linear(8, 8)
    linear.weight.requires_grad_(False)
    layer = STLLinear.from_linear(linear, STLConfig(rank=6))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    linear = nn.Linear(8, 8).requires_grad_(True)
    assert all(p.requires_grad for p in STLLinear.from_linear(linear, STLConfig(rank=6)).parameters())


def test_from_a_layer_without_numbers():
    layer = STLLinear.from_linear(nn.Linear(8, 8, device="meta", dtype=torch.float64).eval(), STLConfig(rank=6))
    assert all(p.is_meta and p.dtype == torch.float64 for p in layer.parameters())
    assert not layer.training


def test_random_start_takes_only_the_scale():
    linear, config = dense(64, 64), STLConfig(rank=24, init="random")
    x = torch.randn(4, 8, 64, dtype=torch.float64)
    fitted = relative_error(STLLinear.from_linear(linear, STLConfig(rank=24))(x), linear(x))
    assert fitted < 1.0 < relative_error(STLLinear.from_linear(linear, config)(x), linear(x))


def test_calibration_inputs_that_do_not_fit_are_refused():
    linear = nn.Linear(8, 8)
    for inputs in (torch.randn(2, 5, 9), torch.randn(8)):
        with pytest.raises(ShapeError, match="inputs must be"):
            STLLinear.from_linear(linear, STLConfig(rank=6), inputs=inputs)
    for value in (float("nan"), float("inf"), 1e200):
        inputs = torch.randn(2, 5, 8, dtype=torch.float64)
        inputs[1, 2, 3] = value
        for rounds in (0, 2):
            with pytest.raises(ShapeError, match="NaN, infinity"):
                STLLinear.from_linear(linear, STLConfig(rank=6), inputs, rounds=rounds)
    for inputs in ([[1.0]], torch.ones(2, 5, 8, dtype=torch.int64), torch.ones(2, 5, 8, dtype=torch.complex64)):
        with pytest.raises(ShapeError, match="real floating-point"):
            STLLinear.from_linear(linear, STLConfig(rank=6), inputs)
    for rounds in (-1, 1.5, "3", True):
        with pytest.raises(ConfigError, match="rounds must be"):
            STLLinear.from_linear(linear, STLConfig(rank=6), rounds=rounds)
    with pytest.raises(ShapeError, match="batch of rows"):
        STLLinear.from_linear(linear, STLConfig(rank=6), inputs=torch.randn(16, 8))
    STLLinear.from_linear(linear, STLConfig(rank=6, mixing="none"), inputs=torch.randn(16, 8))
