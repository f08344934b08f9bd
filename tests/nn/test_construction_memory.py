"""A layer takes, while it is made, little more memory than it keeps."""

import pytest
import torch
from torch import nn

from memory import peak, size
from strassen_tile import STLConfig, STLLinear

CONFIGS = {
    "default": STLConfig(),
    "none": STLConfig(mixing="none"),
    "causal": STLConfig(mixing="causal"),
    "tile scope": STLConfig(encoder_scope="tile"),
    "noise behind a basis": STLConfig(rank=49, basis="strassen", init="random"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_of_a_random_start(name: str, dtype: torch.dtype) -> None:
    layer, most = peak(lambda: STLLinear(2048, 1024, config=CONFIGS[name], dtype=dtype))
    assert size(layer.parameters()) <= most <= 1.5 * size(layer.parameters())


def test_of_taking_the_scale_of_a_dense_layer() -> None:
    dense, config = nn.Linear(2048, 1024), STLConfig(init="random")
    layer, most = peak(lambda: STLLinear.from_linear(dense, config))
    assert most <= 1.5 * size(layer.parameters())


@pytest.mark.parametrize("scope", ["layer", "tile"])
def test_a_fit_in_blocks_is_the_fit(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one column tile and one block of all, ragged edges included."""
    dense, layers = nn.Linear(30, 22, dtype=torch.float64), []
    for block in (1, 1 << 20):
        monkeypatch.setattr("strassen_tile.nn.fit._BLOCK", block)
        torch.manual_seed(0)
        layers.append(STLLinear.from_linear(dense, STLConfig(rank=20, encoder_scope=scope)))
    torch.testing.assert_close(layers[0].encoded_weight, layers[1].encoded_weight)
