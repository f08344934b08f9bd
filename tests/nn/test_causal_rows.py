"""If these fail, a token sees later ones. Each guarantee is also broken on purpose, and seen to break."""

import pytest
import torch

from strassen_tile import STLConfig, STLLinear
from strassen_tile.errors import ConfigError
from strassen_tile.nn import init

K, M, P = 6, 5, 4
CAUSAL = {
    "causal": STLConfig(tile=(P, 2, 3), rank=7, mixing="causal"),
    "causal per tile": STLConfig(tile=(P, 2, 3), rank=7, mixing="causal", encoder_scope="tile"),
    "causal, fewer terms than rows": STLConfig(tile=(P, 2, 3), rank=3, mixing="causal"),
    "rows apart": STLConfig(tile=P, rank=7, mixing="none"),
}
SEQUENCE = STLConfig(tile=(P, 2, 3), rank=7)
every_causal = pytest.mark.parametrize("config", CAUSAL.values(), ids=CAUSAL)


def make(config):
    return STLLinear(K, M, config=config, dtype=torch.float64)


def leaks(layer, n=7):
    """Rows i whose noise changes a single bit of an earlier row."""
    x = torch.randn(2, n, K, dtype=torch.float64)
    y, leaking = layer(x), []
    for row in range(n):
        noisy = x.clone()
        noisy[:, row] += 100 * torch.randn(2, K, dtype=torch.float64)
        after = layer(noisy)
        assert not torch.equal(after[:, row], y[:, row])  # the noise arrives
        if not torch.equal(after[:, :row], y[:, :row]):
            leaking.append(row)
    return leaking


def train(layer, steps=5):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        x = torch.randn(8, 7, K, dtype=torch.float64)
        optimizer.zero_grad()
        following = x.roll(-1, dims=1)[..., :M]  # to predict the next row, it would pay to look
        (layer(x) - following).square().mean().backward()
        optimizer.step()
    return layer


def without_masks(p, rank, device=None):
    everything = torch.ones(rank, p, 1, dtype=torch.bool, device=device)
    return everything, everything


@every_causal
@pytest.mark.parametrize("n", [1, 3, 4, 7, 9])
def test_no_row_reaches_an_earlier_one(config, n):
    if config.rank >= P:
        assert leaks(make(config), n) == []
    else:  # one row has no term of its own, so noise there may not arrive; nothing leaks all the same
        x, layer = torch.randn(1, n, K, dtype=torch.float64), make(config)
        assert all(torch.equal(layer(x)[:, :i], layer(torch.cat([x[:, :i], -x[:, i:]], 1))[:, :i]) for i in range(n))


def test_row_mixing_leaks_so_that_the_refusal_in_convert_is_needed():
    assert leaks(make(SEQUENCE)) == [1, 2, 3, 5, 6]  # all but the first of each tile


@pytest.mark.parametrize("name", ["causal", "causal per tile", "rows apart"])
def test_training_brings_no_leak(name, monkeypatch):
    layer = make(CAUSAL[name])
    start = [p.detach().clone() for p in layer.parameters()]
    assert leaks(train(layer)) == []
    assert not any(torch.equal(a, b) for a, b in zip(start, layer.parameters(), strict=True))
    if name != "rows apart":
        monkeypatch.setattr(init, "causal_masks", without_masks)
        assert leaks(train(make(CAUSAL[name]))) != []


def test_weights_from_elsewhere_bring_no_leak(monkeypatch):
    layer = make(CAUSAL["causal"])
    full = {name: torch.randn_like(p) for name, p in layer.state_dict().items()}
    layer.load_state_dict(full)  # encoders with every entry alive
    assert leaks(layer) == []
    monkeypatch.setattr(STLLinear, "factors", lambda self: (self.encoder, self.decoder))
    assert leaks(layer) == [1, 2, 3, 5, 6]


@pytest.mark.parametrize("name", ["causal", "causal per tile"])
def test_jacobian_is_block_lower_triangular_and_not_only_diagonal(name):
    layer, n = make(CAUSAL[name]), 7
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x[None])[0], torch.randn(n, K).double())
    support = jacobian.abs().amax(dim=(1, 3)) > 0  # (output row, input row)
    same_tile = torch.arange(n)[:, None] // P == torch.arange(n)[None, :] // P
    assert torch.equal(support, same_tile.tril())  # every earlier row of its tile is seen, no later one


@every_causal
def test_a_prefix_alone_gives_the_rows_it_has_in_the_whole(config):
    layer, x = make(config), torch.randn(2, 11, K, dtype=torch.float64)
    whole = layer(x)
    for n in range(1, 12):
        torch.testing.assert_close(layer(x[:, :n]), whole[:, :n], rtol=1e-12, atol=1e-12)


@every_causal
def test_chunks_that_end_with_tiles_give_the_whole(config):
    layer, x = make(config), torch.randn(2, 11, K, dtype=torch.float64)
    chunks = torch.cat([layer(x[:, :P]), layer(x[:, P : 2 * P]), layer(x[:, 2 * P :])], dim=1)
    torch.testing.assert_close(chunks, layer(x), rtol=1e-12, atol=1e-12)


def test_a_prefix_alone_differs_where_rows_mix_both_ways():
    layer, x = make(SEQUENCE), torch.randn(2, 11, K, dtype=torch.float64)
    assert not torch.allclose(layer(x[:, :6]), layer(x)[:, :6], rtol=1e-3)
    torch.testing.assert_close(layer(x[:, :8]), layer(x)[:, :8], rtol=1e-12, atol=1e-12)  # only whole tiles are safe


@pytest.mark.parametrize(("p", "rank"), [(4, 7), (4, 4), (3, 2), (1, 5), (8, 24)])
def test_masks_split_the_terms_evenly(p, rank):
    read, written = init.causal_masks(p, rank)
    assert read.shape == written.shape == (rank, p, 1)
    assert bool((read | written).all())
    assert bool(((read & written).sum(dim=1) == 1).all())  # each term reads up to and writes from its own split
    splits = (read & written).flatten(1).int().argmax(dim=1).bincount(minlength=p)
    assert splits.max() - splits.min() <= 1


def test_given_basis_must_be_causal_itself():
    with pytest.raises(ConfigError, match="lets rows see later ones"):
        STLLinear(8, 8, config=STLConfig(tile=2, rank=7, basis="strassen", mixing="causal"))
    layer = STLLinear(8, 8, config=STLConfig(tile=2, rank=8, basis="naive", mixing="causal"), dtype=torch.float64)
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    assert torch.equal(layer(x)[:, :1], layer(torch.cat([x[:, :1], -x[:, 1:]], dim=1))[:, :1])
