"""If these fail, bench times something else than it says, or a comparison of approximations states a wrong error or cost."""

import dataclasses
import math
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from strassen_tile import STLConfig, baselines, bases, reference
from strassen_tile.baselines import products, roster
from strassen_tile.basis import Basis
from strassen_tile.errors import ConfigError, ShapeError
from strassen_tile.experiments.verification import VerificationError, verify

N, K, M = 21, 36, 23  # whole groups of four along K, nothing else whole
CONFIG, SIZES = STLConfig(rank=24), (256, 256, 256)
EXACT = [bases.naive(4, 4, 4), bases.naive(1, 3, 2), bases.strassen(2), bases.approximate(4, 49)]
LAYERS = [name for name, way in roster.ROSTER.items() if way.start]
OWN = [products.dense(), *(roster.ROSTER[name].start(CONFIG) for name in LAYERS), products.sparse_24()]
ALL = [
    *OWN,
    products.stl(bases.approximate(4, 24)),
    *(roster.ROSTER[name].nearest(24 / 64, (10**4, 10**4, 10**4)) for name in ("low-rank", "monarch")),
    *map(products.stl, EXACT),
]


def operands(dtype=torch.float32, n=N, k=K, m=M):
    generator = torch.Generator().manual_seed(4)
    x, w = torch.randn(n, k, generator=generator), torch.randn(k, m, generator=generator) / k**0.5
    return x.to(dtype), w.to(dtype)


def pruned(w):
    """Every group of four along K without its two smallest entries, found by sorting."""
    out = w.clone()
    for column in range(w.shape[1]):
        for start in range(0, w.shape[0], 4):
            group = out[start : start + 4, column]
            group[group.abs().argsort()[:2]] = 0
    return out


def truncated(w, rank):
    u, s, vt = torch.linalg.svd(w)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vt[:rank]


def permuted(first, second):
    """The matrix (K, M) of two block-diagonal factors, entry by entry: number h between them is h // b of block h % b."""
    blocks, inner, columns = first.shape
    whole, rows = first.new_zeros(blocks * columns, blocks * second.shape[1]), second.shape[1]
    for h in range(blocks * inner):
        j, c = h % blocks, h // inner
        outer = torch.outer(first[j, h // blocks], second[c, :, h % inner])
        whole[j * columns : (j + 1) * columns, c * rows : (c + 1) * rows] += outer
    return whole[:K, :M]


def meaning(product, prepared, x, w):
    """What y is, in float64, written down once more."""
    if product.exactness == "exact":
        return x @ w
    if product.name == "2:4":
        return x @ pruned(w)
    if product.name == "low-rank" and product.exactness == "approximate":
        return x @ truncated(w, int(product.flop_ratio * K * M / (K + M)))
    if product.name == "stl":
        basis = (bases.approximate if product.exactness == "approximate" else bases.random)(product.tile, product.rank)
        return reference.stl_matmul(x, w, basis)
    parameters = [parameter.double() for parameter in prepared.parameters]
    if product.name == "low-rank":
        first, second = parameters
        assert first.shape == (int(24 / 64 * K * M / (K + M)), K)
        return torch.einsum("nk,ak,ma->nm", x, first, second)
    if product.name == "monarch":
        return x @ permuted(*parameters)
    weight, mix = parameters
    mixed = x.clone()
    for row in range(N):
        for other in range(row // 4 * 4, min(N, row // 4 * 4 + 4)):
            mixed[row] += mix[:, row % 4, other % 4] * x[other]
    return mixed @ weight.T


@pytest.mark.parametrize("product", ALL, ids=lambda p: f"{p.label} {p.exactness}")
def test_a_product_is_what_it_says(product):
    x, w = operands(torch.float64)
    prepared = product.prepare(w)
    expected = meaning(product, prepared, x, w)
    torch.testing.assert_close(prepared.call(x).detach(), expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(prepared.reference(x).detach(), expected.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("product", ALL, ids=lambda p: f"{p.label} {p.exactness}")
def test_the_layout_of_a_weight_does_not_matter(product):
    x, w = operands(torch.float64)
    for stored in (w, w.mT.contiguous().mT, torch.stack([w, w], dim=-1)[..., 0]):
        torch.manual_seed(0)
        prepared = product.prepare(stored)
        torch.manual_seed(0)
        torch.testing.assert_close(prepared.call(x), product.prepare(w.contiguous()).call(x), rtol=1e-12, atol=1e-12)
        assert not any(parameter is stored for parameter in prepared.parameters)
        assert not stored.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("product", ALL, ids=lambda p: f"{p.label} {p.exactness}")
def test_every_product_passes_verification(product, dtype):
    x, w = operands(dtype, 70, 52, 41)
    error = verify(product, product.prepare(w), x, w, gradients=True)
    growth = math.sqrt(
        max(1, product.kappa or 1)
    )  # a bound that knows nothing of the one in verify: u, rounded some times
    assert 0 < error < 4 * growth * torch.finfo(dtype).eps


@pytest.mark.parametrize("product", ALL, ids=lambda p: f"{p.label} {p.exactness}")
def test_a_planted_fault_does_not(product):
    x, w = operands(torch.float32, 70, 52, 41)
    prepared = product.prepare(w)

    def last_row_wrong(x):
        return torch.cat([prepared.call(x)[:-1], 1.5 * prepared.call(x)[-1:]])

    def gradient_wrong(x):
        y = prepared.call(x)
        return 2 * y - y.detach()

    with pytest.raises(VerificationError, match=rf"{re.escape(product.label)}: the result .* not timed"):
        verify(product, dataclasses.replace(prepared, call=last_row_wrong), x, w)
    wrong = dataclasses.replace(prepared, call=gradient_wrong)
    verify(product, wrong, x, w)
    with pytest.raises(VerificationError, match="gradient 0"):
        verify(product, wrong, x, w, gradients=True)


def test_an_exact_product_is_compared_with_the_weight_it_was_given():
    """Its definition in terms of Ŵ agrees with itself whatever Ŵ is."""
    x, w = operands()
    exact, own = products.stl(bases.strassen(2)), products.stl(bases.random(4, 24), own=True)
    verify(own, own.prepare(w.flip(0)), x, w)
    with pytest.raises(VerificationError, match="stl r=49"):
        verify(exact, exact.prepare(w.flip(0)), x, w)


def test_approximations_have_the_error_that_is_known():
    """What `amm` will ask: |y − x w|² over |x w|², beside FLOPs and kappa."""
    x, w = operands(torch.float64, 512, 512, 512)
    ranks, found = (16, 24, 32, 48), {}
    near = [products.stl(bases.approximate(4, rank)) for rank in ranks]
    near += [products.low_rank(rank / 64, rank=rank) for rank in ranks]
    for product in (*near, products.sparse_24(), products.dense()):
        error = (product.prepare(w).call(x).detach() - x @ w).square().sum() / (x @ w).square().sum()
        found[product.label] = (float(error), product.flop_ratio, product.kappa)
    for rank in (16, 24, 32, 48):
        basis, (error, ratio, kappa) = bases.approximate(4, rank), found[f"stl r={rank}"]
        assert error == pytest.approx(basis.error, rel=0.05)
        assert (ratio, kappa) == (rank / 64, basis.kappa)
        energy = torch.linalg.svdvals(w).square()
        lost = energy[int(rank / 64 * 256) :].sum() / energy.sum()
        assert found[f"low-rank r={rank}"] == (pytest.approx(float(lost), rel=0.05), rank / 64, None)
    lost = (w - pruned(w)).square().sum() / w.square().sum()
    assert found["2:4"] == (pytest.approx(float(lost), rel=0.02), 0.5, None)
    assert found["dense"][:2] == (pytest.approx(0, abs=1e-24), 1.0)


def test_exactness_is_that_of_the_basis():
    assert {products.stl(basis).exactness for basis in EXACT} == {"exact"}
    assert products.stl(bases.approximate(4, 48)).exactness == "approximate"
    assert baselines.stl(CONFIG).exactness == "own"
    assert baselines.stl(STLConfig(rank=49, basis="strassen")).exactness == "exact"
    assert products.low_rank(0.4).exactness == "approximate"
    assert products.low_rank(0.4, fitted=False).exactness == products.token_mix().exactness == "own"


@pytest.mark.parametrize("product", ALL, ids=lambda p: f"{p.label} {p.exactness}")
def test_flops_are_those_of_the_call(product):
    x, w = operands()
    prepared = product.prepare(w)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        prepared.call(x)
    counted = product.cost(N, K, M)
    assert counted.flops == counter.get_total_flops() // (2 if product.name == "2:4" else 1)  # masked, not packed
    assert counted.dense_flops == 2 * N * K * M
    whole = product.cost(384, 384, 384)
    assert whole.product_flop_ratio == pytest.approx(product.flop_ratio, rel=0.02)  # a whole number of ranks


METHODS = {
    "dense": baselines.dense(),
    "stl": baselines.stl(CONFIG),
    "stl, an encoder a tile": baselines.stl(STLConfig(rank=24, encoder_scope="tile")),
    "stl, causal": baselines.stl(STLConfig(rank=24, mixing="causal")),
    "stl from the best basis": baselines.stl(STLConfig(rank=24, basis="approximate")),
    "2:4": baselines.sparse_24(),
    "low-rank": baselines.low_rank(24 / 64),
    "monarch": baselines.monarch(24 / 64),
    "rotated": baselines.rotated(),
    "low-rank, convolved": baselines.mixed(baselines.low_rank(24 / 64), "symmetric"),
    "stl, mixed by other tiles": baselines.mixed(baselines.stl(CONFIG), "tile", 3),
    "dense+mix": baselines.token_mix(4),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_costs_what_its_product_costs(method):
    class Meets(nn.Module):
        def forward(self, x):
            return x + x.mean(dim=1, keepdim=True).cumsum(dim=1)

    class Running(nn.Module):
        def forward(self, x):
            return x.cumsum(dim=1)

    meet = Running() if method is METHODS["stl, causal"] else Meets()
    model = nn.Sequential(nn.Linear(K, M, bias=False), meet)
    x = torch.randn(2, N, K)
    done = method.apply(model, x, lambda module, name: True)
    found = baselines.model_cost(model, done, x[:1])
    assert found.converted == method.cost(N, K, M)
    assert found.params == method.cost(N, K, M).params * (2 if method.name == "2:4" else 1)  # those of zeros are kept


@pytest.mark.parametrize("name", ["dense", "2:4", *LAYERS])
def test_method_and_product_of_a_name_are_one(name):
    method, (product,) = METHODS[name], roster.at_ranks([name], [CONFIG], SIZES)
    assert (method.name, method.flop_ratio, method.cost(N, K, M)) == (name, product.flop_ratio, product.cost(N, K, M))
    assert (method.rank, method.label) == ((24, "stl r=24") if name == "stl" else (None, name))


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan, math.inf])
def test_a_ratio_that_cannot_be_is_refused_before_there_is_a_weight(ratio):
    for make in (products.low_rank, baselines.low_rank, products.monarch, baselines.monarch):
        with pytest.raises(ConfigError, match="flop_ratio must be positive and finite"):
            make(ratio)


def test_a_weight_without_whole_groups_is_refused():
    with pytest.raises(ShapeError, match="multiple of 4"):
        products.sparse_24().prepare(torch.randn(6, 8))


@pytest.mark.parametrize("rank", [64, 96, 256])
def test_from_rank_pqs_on_nothing_is_saved(rank):
    """r = pqs is a control; its row must not look like a saving."""
    product = products.stl(bases.random(4, rank), own=True)
    assert product.flop_ratio == rank / 64 >= 1
    assert product.cost(4096, 4096, 4096).flop_ratio > product.flop_ratio
    x, w = operands(torch.float32, 70, 52, 41)
    verify(product, product.prepare(w), x, w, gradients=True)


def test_large_tiles_are_ready_at_once(monkeypatch):
    """The error of thousands of terms takes gigabytes; what times a random start has no use for it."""
    monkeypatch.setattr(Basis, "error", property(lambda basis: pytest.fail("the error was computed")))
    (product,) = roster.at_ranks(("stl",), [STLConfig(tile=16, rank=1536)], SIZES)
    x, w = operands(torch.float32, 32, 1024, 32)
    verify(product, product.prepare(w), x, w)
