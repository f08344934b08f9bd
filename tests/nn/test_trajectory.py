"""Whole training runs: on an exact basis with Ŵ = F·W the network is the dense one, step by step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import strassen_tile as stl
from strassen_tile.nn.init import normalised
from strassen_tile.ops.gradients import encode

CONFIGS = {
    "naive": stl.STLConfig(basis="naive", tile=(2, 3, 4), rank=24, train_encoder=False, train_decoder=False),
    "strassen": stl.STLConfig(basis="strassen", tile=4, rank=49, train_encoder=False, train_decoder=False),
}


class Encoded(nn.Module):
    """Ŵ as a function of a dense weight (K, M), which is what the optimiser sees."""

    def __init__(self, weight: torch.Tensor, weight_encoder: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.weight_encoder = weight, weight_encoder

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return encode(weight[None], self.weight_encoder)

    def right_inverse(self, encoded: torch.Tensor) -> torch.Tensor:
        return self.weight


def network() -> nn.Module:
    torch.manual_seed(3)
    model = stl.models.t2t_vit(
        "t2t_vit_nano", num_classes=10, image_size=8, in_channels=1, embed_dim=36, heads=2, token_dropout=0.0
    )
    return model.double()


def losses(model: nn.Module, steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randn(steps, 16, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (steps, 16), generator=generator)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    history = []
    for x, y in zip(pixels, labels, strict=True):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.detach())
    return torch.stack(history)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "naive" else n for n in CONFIGS])
def test_exact_network_follows_the_dense_one(name: str) -> None:
    config = CONFIGS[name]
    dense, other = network(), network()
    originals = {n: m for n, m in other.named_modules() if isinstance(m, nn.Linear)}
    conversion = stl.convert(other, config, example_inputs=torch.randn(2, 1, 8, 8, dtype=torch.float64))
    assert len(conversion.converted) > 8
    weight_encoder = normalised(config.load_basis()).weight_encoder
    for layer_name, layer in conversion.converted.items():
        dense_weight = originals[layer_name].weight.detach().mT.contiguous()
        parametrize.register_parametrization(layer, "encoded_weight", Encoded(dense_weight, weight_encoder))
    expected, found = losses(dense, 30), losses(other, 30)
    assert (expected[0] - expected[-1]).abs() > 1e-3  # training moves, or following it would be nothing
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_an_approximate_network_does_not() -> None:
    """The comparison above can fail: a basis that is not exact leaves the dense trajectory at the first step."""
    other = network()
    stl.convert(other, stl.STLConfig(basis="approximate", rank=48), example_inputs=torch.randn(2, 1, 8, 8).double())
    assert (losses(other, 2) - losses(network(), 2)).abs().max() > 1e-6
