"""If these fail, Monarch, or the rotated control, is not what a comparison says it is, or starts from somewhere else."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from strassen_tile import baselines, cost
from strassen_tile.baselines import MonarchLinear, RotatedLinear
from strassen_tile.errors import ConfigError

SIZES = [(6, 10, 8, 4), (12, 8, 12, 3), (5, 3, 2, 2), (7, 7, 3, 1), (8, 8, 32, 4), (2, 9, 4, 4)]  # K, M, R, blocks


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def whole(layer):
    """B₂ P B₁ by whole matrices: B₁ (R, K), a permutation matrix (R, R), B₂ (M, R)."""
    b, inner, _ = layer.first.shape
    permutation = torch.zeros(b * inner, b * inner, dtype=torch.float64)
    for block in range(b):
        for number in range(inner):
            permutation[number * b + block, block * inner + number] = 1
    first, second = torch.block_diag(*layer.first.detach()), torch.block_diag(*layer.second.detach())
    return (second @ permutation @ first)[: layer.out_features, : layer.in_features]


@pytest.mark.parametrize(("k", "m", "width", "blocks"), SIZES)
def test_monarch_is_its_matrices(k, m, width, blocks):
    layer = MonarchLinear(k, m, width=width, blocks=blocks, dtype=torch.float64)
    x = drawn(2, 7, k)
    torch.testing.assert_close(layer(x), x @ whole(layer).mT + layer.bias, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[0, 0]), layer(x)[0, 0])
    torch.testing.assert_close(layer.product(), whole(layer), rtol=1e-12, atol=1e-12)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    found = layer.cost(7, 2)
    padded = -(-k // blocks) + -(-m // blocks)
    assert found.flops == 2 * 14 * width * padded
    if width > blocks:  # PyTorch multiplies by blocks of one row number by number, which it does not count
        assert found.flops == counter.get_total_flops()
    assert found.params == layer.first.numel() + layer.second.numel()
    assert found.dense_flops == 2 * 14 * k * m


@pytest.mark.parametrize(("k", "m", "width", "blocks"), SIZES[:3])
def test_gradients(k, m, width, blocks):
    layer = MonarchLinear(k, m, width=width, blocks=blocks, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (drawn(3, k).requires_grad_(), *layer.parameters()))


@pytest.mark.parametrize(("k", "m"), [(64, 64), (64, 192), (6, 10), (37, 23)])
def test_start_has_the_variance_of_the_dense_one(k, m):
    torch.manual_seed(1)
    linear = nn.Linear(k, m, dtype=torch.float64).eval()
    layer = MonarchLinear.from_linear(linear, 0.375)
    assert float(whole(layer).norm()) == pytest.approx(float(linear.weight.detach().norm()), rel=1e-12)
    assert torch.equal(layer.bias, linear.bias)
    assert not layer.training
    assert layer.cost(5).flop_ratio <= 0.375 + 1e-12 or layer.width == 4
    other = MonarchLinear.from_linear(linear, 0.375)
    assert not torch.equal(layer.first, other.first)
    if k == m == 64:
        assert layer.width == 48
        assert layer.cost(5).flop_ratio == 0.375


def test_every_output_sees_every_input():
    layer = MonarchLinear.from_linear(nn.Linear(64, 32, dtype=torch.float64), 0.375)
    assert bool((whole(layer) != 0).all())
    apart = MonarchLinear(64, 32, width=8, dtype=torch.float64)  # two numbers a block, of the four there are to see
    assert float((whole(apart) != 0).double().mean()) == 0.5


def test_the_fit_is_the_nearest():
    """A product of this form is found again; of another weight, no change of a factor comes nearer."""
    layer = MonarchLinear(10, 7, width=16, dtype=torch.float64)
    weight = whole(layer)
    again = MonarchLinear(10, 7, width=16, dtype=torch.float64)
    again.fit(weight)
    torch.testing.assert_close(whole(again), weight, rtol=1e-10, atol=1e-10)
    other = drawn(12, 8)
    found = MonarchLinear(8, 12, width=16, dtype=torch.float64)
    found.fit(other)
    left = 0.0
    for c in range(4):
        for j in range(4):
            left += float(torch.linalg.svdvals(other[3 * c : 3 * c + 3, 2 * j : 2 * j + 2])[1:].square().sum())
    assert float((whole(found) - other).square().sum()) == pytest.approx(left, rel=1e-10)
    distance = (found.product() - other).square().sum()
    gradients = torch.autograd.grad(distance, [found.first, found.second])
    assert all(float(gradient.abs().max()) < 1e-10 for gradient in gradients)
    assert left > 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MonarchLinear(8, 8, width=6), "multiple of blocks=4; got 6"),
        (lambda: MonarchLinear(8, 8, width=0), "width must be a positive"),
        (lambda: MonarchLinear(8, 8, width=8, blocks=0), "blocks must be >= 1; got 0"),
        (lambda: baselines.monarch(0.5, blocks=0), "blocks must be >= 1; got 0"),
        (lambda: MonarchLinear.from_linear(nn.Linear(8, 8), float("nan")), "flop_ratio must be positive"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


@pytest.mark.parametrize(("k", "m"), [(6, 10), (9, 4), (1, 3)])
def test_rotated_starts_dense_and_is_its_matrices(k, m):
    linear = nn.Linear(k, m, dtype=torch.float64).eval()
    layer, x = RotatedLinear(linear), drawn(2, 7, k)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-12, atol=1e-12)
    for rotation, side in ((layer.rotation_in, k), (layer.rotation_out, m)):
        torch.testing.assert_close(rotation @ rotation.mT, torch.eye(side, dtype=torch.float64))
        assert side == 1 or not torch.allclose(rotation.abs(), torch.eye(side, dtype=torch.float64))
    with torch.no_grad():
        layer.weight.copy_(drawn(m, k))
    expected = torch.einsum("nk,jk,ij,oi->no", x[0], layer.rotation_in, layer.weight, layer.rotation_out)
    torch.testing.assert_close(layer(x[0]), expected + linear.bias, rtol=1e-12, atol=1e-12)
    assert layer.cost(7, 2) == cost.dense(14, k, m, itemsize=8)
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
    assert torch.autograd.gradcheck(lambda x, _: layer(x), (x[0].requires_grad_(), layer.weight))


@pytest.mark.parametrize(("optimizer", "alike"), [(torch.optim.SGD, True), (torch.optim.Adam, False)])
def test_a_rotation_is_nothing_to_sgd_and_something_to_adam(optimizer, alike):
    torch.manual_seed(0)
    dense = nn.Linear(6, 10, dtype=torch.float64)
    rotated = RotatedLinear(nn.Linear(6, 10, dtype=torch.float64))
    with torch.no_grad():
        rotated.weight.copy_(rotated.rotation_out.T @ dense.weight @ rotated.rotation_in.T)
        rotated.bias.copy_(dense.bias)
    x, wanted = drawn(20, 6), drawn(20, 10)
    for layer in (dense, rotated):
        steps = optimizer(layer.parameters(), lr=0.05, weight_decay=0.1)
        for _ in range(5):
            steps.zero_grad()
            (layer(x) - wanted).square().mean().backward()
            steps.step()
    error = float((rotated.dense_weight() - dense.weight).detach().norm() / dense.weight.detach().norm())
    assert error < 1e-12 if alike else error > 1e-2


def test_rotated_keeps_its_rotation_and_its_precision():
    layer = RotatedLinear(nn.Linear(32, 32))
    other = RotatedLinear(nn.Linear(32, 32))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 32)
    assert torch.equal(layer(x), other(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.dense_weight().dtype == torch.float32
        assert layer(x).dtype == torch.bfloat16


def test_methods_convert_and_undo():
    for method, kind in ((baselines.monarch(0.5), MonarchLinear), (baselines.rotated(), RotatedLinear)):
        model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU())
        layers = list(model)
        done = method.apply(model, torch.randn(3, 6), None)
        assert [type(model[i]) for i in (0, 2)] == [kind, kind]
        assert model(torch.randn(3, 6)).shape == (3, 10)
        done.undo()
        assert list(model) == layers
    assert baselines.monarch(0.5).label == "monarch"
    assert baselines.rotated().label == "rotated"
