"""Costs against counts made by hand and by walking through every tile."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strassen_tile import cost
from strassen_tile.errors import ConfigError, ShapeError

SIZE, SIDE = st.integers(0, 9), st.integers(1, 4)


def walked(n: int, k: int, m: int, tile: tuple[int, int, int], rank: int, batch: int) -> tuple[int, int]:
    """All FLOPs and those of the products, adding up tile by tile what encode, multiply and decode do."""
    (p, q, s), encode, products, decode = tile, 0, 0, 0
    for _ in range(batch):
        for _ in range(0, n, p):
            encode += sum(2 * rank * p * q for _ in range(0, k, q))
            decode += sum(2 * rank * p * s for _ in range(0, m, s))
            products += sum(2 * rank for _ in range(0, k, q) for _ in range(0, m, s))
    return encode + products + decode, products


@settings(max_examples=80, deadline=None)
@given(SIZE, SIZE, SIZE, st.tuples(SIDE, SIDE, SIDE), st.integers(1, 9), st.integers(0, 3))
def test_flops_against_a_walk(n: int, k: int, m: int, tile: tuple[int, int, int], rank: int, batch: int) -> None:
    """Ragged edges, where a whole tile is paid for, counted as part of one; or samples padded together."""
    counted = cost.linear(n, k, m, tile, rank, batch=batch)
    assert (counted.flops, counted.product_flops) == walked(n, k, m, tile, rank, batch)
    assert counted.dense_flops == 2 * batch * n * k * m


def test_every_field_by_hand() -> None:
    """(2, 5, 6) → (2, 5, 7) with tile (2, 4, 3) and r = 5: I = 3 tiles of rows a sample, J = 2, L = 3; 2 bytes a number."""
    by_hand = {
        "flops": 2 * 5 * (6 * 2) * (2 * 4) + 2 * 5 * 6 * 2 * 3 + 2 * 5 * (6 * 3) * (2 * 3),
        "product_flops": 2 * 5 * 6 * 2 * 3,
        # X 10×6, Y 10×7, X̂ 5×6×2 and Ŷ 5×6×3 written and read, Ŵ 5×2×3, E 5×2×4, D 5×2×3
        "bytes": 2 * (60 + 70 + 2 * 60 + 2 * 90 + 30 + 40 + 30),
        "params": 30 + 40 + 30,
        "dense_flops": 2 * 10 * 6 * 7,
        "dense_bytes": 2 * (60 + 70 + 42),
        "dense_params": 42,
    }
    counted = cost.linear(5, 6, 7, (2, 4, 3), 5, batch=2, itemsize=2)
    assert dataclasses.asdict(counted) == by_hand
    assert counted.flops == 2400
    assert counted.flop_ratio == 2400 / 840
    assert counted.product_flop_ratio == 360 / 840
    assert counted.param_ratio == 100 / 42


def test_encoders_per_tile_by_hand() -> None:
    """Two encoders and three decoders instead of one each: more parameters and traffic, the same FLOPs."""
    shared = cost.linear(5, 6, 7, (2, 4, 3), 5, batch=2, itemsize=2)
    own = cost.linear(5, 6, 7, (2, 4, 3), 5, batch=2, itemsize=2, encoder_scope="tile")
    more = 40 + 2 * 30
    assert own == dataclasses.replace(shared, params=shared.params + more, bytes=shared.bytes + 2 * more)


@pytest.mark.parametrize(("k", "m", "speed"), [(4096, 4096, 2.59), (256, 768, 2.0), (128, 128, 1.33)])
@pytest.mark.parametrize("n", [64, 4096])
def test_figures_that_the_documentation_quotes(n: int, k: int, m: int, speed: float) -> None:
    """All-in speed-ups of MATH.md §1, tile 4, r = 24; a count that leaves out encoding would say 2.67 everywhere."""
    counted = cost.linear(n, k, m, 4, 24)
    assert 1 / counted.flop_ratio == pytest.approx(speed, abs=0.005)
    assert counted.flop_ratio == pytest.approx(24 / 64 + 24 / k + 24 / m, rel=1e-12)
    assert 1 / counted.product_flop_ratio == pytest.approx(64 / 24, rel=1e-12)
    assert counted.params == 24 * (k // 4) * (m // 4) + 24 * 16 * 2
    assert counted == cost.linear(n, k, m, (4, 4, 4), 24)


@pytest.mark.parametrize(("rank", "products"), [(64, 1.0), (96, 1.5), (256, 4.0)])
def test_from_rank_pqs_on_a_layer_costs_more_than_dense(rank: int, products: float) -> None:
    """A ratio cut off at 1 would hide that nothing is saved."""
    counted = cost.linear(4096, 4096, 4096, 4, rank)
    assert counted.product_flop_ratio == products
    assert counted.flop_ratio == pytest.approx(products + 2 * rank / 4096, rel=1e-12)
    assert counted.param_ratio == pytest.approx(4 * products, rel=1e-3)


def test_dense_is_its_own_counterpart() -> None:
    """The yardstick: 2NKM FLOPs, each operand and the result moved once."""
    counted = cost.dense(3, 5, 7, itemsize=2)
    assert (counted.flops, counted.bytes, counted.params) == (210, 2 * (15 + 35 + 21), 35)
    assert counted.flop_ratio == counted.product_flop_ratio == counted.param_ratio == 1.0
    assert (counted.dense_flops, counted.dense_bytes, counted.dense_params) == (210, 142, 35)
    assert cost.dense(3, 5, 7).bytes == 4 * 71


def test_empty_layers_have_ratios() -> None:
    """A division by zero in a table of layers, one of which is empty."""
    for sizes in ((0, 4, 4), (4, 0, 4), (4, 4, 0), (0, 0, 0)):
        counted = cost.linear(*sizes, 4, 24)
        assert all(map(math.isfinite, (counted.flop_ratio, counted.product_flop_ratio, counted.param_ratio)))
        assert counted.dense_flops == 0 and counted.flop_ratio == 1.0


def test_large_sizes_do_not_overflow() -> None:
    """Sizes read from arrays are numpy's and wrap around at 2^31; FLOPs of real models do not fit there."""
    numpy = pytest.importorskip("numpy")
    small = numpy.int32(2**20)
    assert cost.linear(small, small, small, 4, numpy.int32(24)) == cost.linear(2**20, 2**20, 2**20, 4, 24)
    assert cost.dense(small, small, small).flops == 2**61
    assert cost.linear(2**40, 2**40, 2**40, 1, 1).product_flops == 2**121
    assert type(cost.linear(small, small, small, 4, 24).flops) is int


@pytest.mark.parametrize("bad", [-1, 4.0, float("nan"), "4", None, True, torch.ones(2)], ids=repr)
@pytest.mark.parametrize("name", ["n", "k", "m", "rank", "batch", "itemsize"])
def test_nonsense_sizes_are_refused(name: str, bad: object) -> None:
    """A negative or fractional count in a report."""
    sizes = {"n": 4, "k": 4, "m": 4, "rank": 4, "batch": 1, "itemsize": 4, name: bad}
    with pytest.raises(ShapeError, match=f"{name}="):
        cost.linear(**sizes, tile=4)  # type: ignore[arg-type]
    if name in ("n", "k", "m", "itemsize"):
        with pytest.raises(ShapeError, match=f"{name}="):
            cost.dense(**{key: sizes[key] for key in ("n", "k", "m", "itemsize")})  # type: ignore[arg-type]


def test_other_nonsense_is_refused() -> None:
    """A misspelt scope silently counted as "layer"."""
    with pytest.raises(ShapeError, match="rank must be >= 1"):
        cost.linear(4, 4, 4, 4, 0)
    with pytest.raises(ShapeError, match="tile must be"):
        cost.linear(4, 4, 4, (4, 4), 4)
    with pytest.raises(ConfigError, match="encoder_scope must be 'layer' or 'tile'; got 'tiles'"):
        cost.linear(4, 4, 4, 4, 4, encoder_scope="tiles")
