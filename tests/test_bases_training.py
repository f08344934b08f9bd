"""Bases trained on data: the loss is the product's error, training lowers it, and it fits what it is shown."""

import itertools

import pytest
import torch

from strassen_tile import Basis, bases, reference
from strassen_tile.bases import training
from strassen_tile.errors import BasisError, ShapeError


def error(basis: Basis, x: torch.Tensor, w: torch.Tensor) -> float:
    exact = x.double() @ w.double()
    return float((reference.stl_matmul(x.double(), w.double(), basis) - exact).square().sum() / exact.square().sum())


def test_the_loss_is_the_error() -> None:
    basis = bases.random((2, 3, 1), 4)
    x, w = torch.randn(7, 8), torch.randn(8, 5)  # ragged
    factors = [getattr(basis, field).float() for field in ("encoder", "weight_encoder", "decoder")]
    assert float(training._loss(factors, x, w)) == pytest.approx(error(basis, x, w), rel=1e-5)


def test_gaussian_batches_train_towards_the_least_error() -> None:
    start = bases.random(2, 6)
    seen = []
    found = training.train(start, steps=800, lr=2e-2, every=200, progress=lambda *entry: seen.append(entry))
    assert seen == list(found.history)
    assert [step for step, _ in seen] == [200, 400, 600, 800]
    assert found.basis.error < 0.3 < start.error
    assert found.basis.error == pytest.approx(seen[-1][1], abs=0.05)
    again = training.train(start, steps=800, lr=2e-2, every=200)
    assert torch.equal(again.basis.encoder, found.basis.encoder)


def test_sgd_from_a_given_start() -> None:
    start = bases.truncated(1, 6)
    found = training.train(start, steps=300, lr=1e-2, optimizer="sgd")
    assert found.basis.error < start.error


def test_a_basis_fits_the_products_that_it_is_shown() -> None:
    """Of matrices of few directions far less is lost than on Gaussian ones, and parts come from anywhere in them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2, generator=generator) @ torch.randn(2, 32, generator=generator)
    w = torch.randn(32, 24, generator=generator)
    start = bases.random(2, 4, seed=1)
    batches = training.drawn(start, x, w, tiles=16)
    first, second = next(batches), next(batches)
    assert first[0].shape == (32, 32)
    assert first[1].shape == (32, 32)
    assert not torch.equal(first[0], second[0])
    assert all(any(torch.equal(rows, x[at : at + 2]) for at in range(0, 64, 2)) for rows in first[0].split(2))
    found = training.train(start, batches, steps=800, lr=2e-2)
    assert error(found.basis, x, w) < 0.6 * bases.approximate(2, 4).error


@pytest.mark.parametrize(
    "options,said",
    [
        ({"steps": 0}, "must be positive"),
        ({"every": 0}, "must be positive"),
        ({"lr": 0}, "must be positive"),
        ({"lr": float("nan")}, "must be positive"),
        ({"optimizer": "lion"}, "optimizer must be"),
    ],
)
def test_bad_arguments(options: dict, said: str) -> None:
    with pytest.raises(BasisError, match=said):
        training.train(bases.random(2, 4), **options)


def test_the_state_of_the_caller_does_not_matter() -> None:
    """Gradients off, other defaults, batches of a layer's own weight: as without; and nothing of the caller's changes."""
    start, layer = bases.random(2, 4), torch.nn.Linear(8, 8)
    x = torch.randn(16, 8)

    def trained(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        batches = training.drawn(start, x.to(dtype), layer.weight.mT.to(dtype))
        return training.train(start, batches, steps=3).basis.encoder

    expected = trained()
    assert layer.weight.grad is None
    assert torch.equal(trained(torch.float64), expected)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.device("meta")):
        with mode:
            assert torch.equal(trained(), expected)
            assert training.train(start, steps=2).basis.rank == 4
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(trained(torch.float32), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    for kind in (iter, list):
        with pytest.raises(BasisError, match="batches end after 1"):
            training.train(start, kind([(torch.ones(4, 4), torch.ones(4, 4))]), steps=2)


def test_divergence_and_shapes() -> None:
    with pytest.raises(BasisError, match="diverged at step"):
        training.train(bases.random(2, 4), steps=200, lr=1e3, optimizer="sgd")
    with pytest.raises(ShapeError, match="at least 2 rows"):
        training.drawn(bases.random(2, 4), torch.ones(1, 4), torch.ones(4, 4))
    for x, w in (
        (torch.ones(4, 3), torch.ones(4, 4)),
        (torch.ones(2, 4, 4), torch.ones(4, 4)),
        (torch.ones(0, 4),) * 2,
    ):
        with pytest.raises(ShapeError, match="batch 1: x must be"):
            training.train(bases.random(2, 4), [(x, w)], steps=1)
    for wrong in ({"lr": "a"}, {"lr": 1e39}, {"seed": 2**70}, {"seed": None}):
        with pytest.raises(BasisError, match="must be"):
            training.train(bases.random(2, 4), steps=1, **wrong)
    for wrong in ({"tiles": 0}, {"tiles": 1.5}, {"seed": None}):
        with pytest.raises(BasisError, match="tiles must be"):
            training.drawn(bases.random(2, 4), torch.ones(4, 4), torch.ones(4, 4), **wrong)
    batches = itertools.repeat((torch.ones(4, 4), torch.zeros(4, 4)))
    assert training.train(bases.random(2, 4), batches, steps=2).basis.rank == 4
