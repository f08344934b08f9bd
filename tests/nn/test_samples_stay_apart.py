"""If these fail, one person's data reaches another's output. Each guarantee is also broken on purpose, and seen to break."""

import pytest
import torch

from strassen_tile import STLConfig, STLLinear
from strassen_tile.errors import ShapeError

K, M = 6, 5
MIXING = {
    "sequence": STLConfig(tile=(4, 2, 3), rank=7),
    "sequence per tile": STLConfig(tile=(4, 2, 3), rank=7, encoder_scope="tile"),
    "causal": STLConfig(tile=(4, 2, 3), rank=7, mixing="causal"),
}


def samples_reached(layer, lead, n):
    """Which samples' outputs change at all when every other sample is replaced."""
    x = torch.randn(*lead, n, K, dtype=torch.float64)
    y = layer(x).flatten(0, -3)
    reached = []
    for sample in range(len(y)):
        other = torch.randn_like(x).flatten(0, -3)
        other[sample] = x.flatten(0, -3)[sample]
        reached.append(not torch.equal(layer(other.view_as(x)).flatten(0, -3)[sample], y[sample]))
    return reached


@pytest.mark.parametrize("lead", [(3,), (2, 2)], ids=str)
@pytest.mark.parametrize("n", [1, 3, 5, 6, 7, 9])
@pytest.mark.parametrize("config", MIXING.values(), ids=MIXING)
def test_no_sample_reaches_another(config, n, lead):
    layer = STLLinear(K, M, config=config, dtype=torch.float64)
    assert not any(samples_reached(layer, lead, n))

    def laid_end_to_end(x):  # without padding each sample on its own, tiles span two of them
        return layer(x.reshape(1, -1, K)).view(*x.shape[:-1], M)

    assert any(samples_reached(laid_end_to_end, lead, n))


@pytest.mark.parametrize("config", MIXING.values(), ids=MIXING)
def test_gradients_do_not_cross_samples_either(config):
    layer = STLLinear(K, M, config=config, dtype=torch.float64)
    x = torch.randn(3, 5, K, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[1].square().sum(), x)
    assert not gradient[0].any()
    assert not gradient[2].any()
    assert gradient[1].abs().sum(dim=-1).all()


@pytest.mark.parametrize("config", MIXING.values(), ids=MIXING)
def test_rows_without_samples_are_refused(config, monkeypatch):
    layer, x = STLLinear(K, M, config=config, dtype=torch.float64), torch.randn(6, K, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"\(6, 6\) is a batch of rows.*unsqueeze.*mixing='none'"):
        layer(x)
    expected = layer(x.unsqueeze(0)).squeeze(0)  # the way out that the message names

    monkeypatch.setattr(STLLinear, "check_input", lambda self, x: None)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    changed = x.clone()
    changed[0] += 1
    assert not torch.equal(layer(changed)[1], layer(x)[1])  # two rows of a batch would be two people


@pytest.mark.parametrize("scope", ["layer", "tile"])
def test_rows_apart_take_a_batch_of_rows(scope):
    layer = STLLinear(K, M, config=STLConfig(tile=4, rank=7, mixing="none", encoder_scope=scope), dtype=torch.float64)
    x = torch.randn(6, K, dtype=torch.float64)
    for row in range(6):
        changed = torch.randn_like(x)
        changed[row] = x[row]
        assert torch.equal(layer(changed)[row], layer(x)[row])
    torch.testing.assert_close(layer(x.view(3, 2, K)).view(6, M), layer(x), rtol=0, atol=1e-14)


def test_rows_of_a_tile_do_mix_so_that_the_guards_are_needed():
    layer = STLLinear(K, M, config=MIXING["sequence"], dtype=torch.float64)
    x = torch.randn(1, 8, K, dtype=torch.float64)
    changed = x.clone()
    changed[0, 3] += 1
    moved = (layer(changed) != layer(x)).any(dim=-1)[0]
    assert moved.tolist() == [True] * 4 + [False] * 4
