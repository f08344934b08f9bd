"""Tiles hold what they should, once, and nothing but zeros over the edge."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strassen_tile.errors import ShapeError, STLError
from strassen_tile.tiling import as_integer, as_tile, from_tiles, tile_count, to_tiles

SIZES, SIDES = st.integers(0, 9), st.integers(1, 5)
DTYPES = (torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64)


def matrix(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Entries that are all different and none of them zero, as far as the dtype can tell."""
    return (torch.arange(math.prod(shape)) + 1).reshape(shape).to(dtype)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=2), SIZES, SIZES, SIDES, SIDES, st.sampled_from(DTYPES))
def test_round_trip(lead: list[int], n: int, k: int, p: int, q: int, dtype: torch.dtype) -> None:
    """A lost, moved or converted entry anywhere, empty and ragged sizes included."""
    x = matrix((*lead, n, k), dtype)
    tiles = to_tiles(x, p, q)
    assert tiles.shape == (*lead, math.ceil(n / p), math.ceil(k / q), p, q)
    assert tiles.dtype == dtype
    back = from_tiles(tiles, n, k)
    assert back.shape == x.shape
    assert torch.equal(back, x)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), SIDES, SIDES)
def test_every_entry_is_where_the_definition_puts_it(n: int, k: int, p: int, q: int) -> None:
    """Tiles transposed, swapped or padded with something else than zero: a round trip alone would not notice."""
    x = matrix((n, k))
    tiles = to_tiles(x, p, q)
    for row in range(tiles.shape[0] * p):
        for column in range(tiles.shape[1] * q):
            wanted = x[row, column].item() if row < n and column < k else 0.0
            assert tiles[row // p, column // q, row % p, column % q].item() == wanted


@pytest.mark.parametrize("n", [4, 5])
def test_tiles_never_hold_rows_of_two_samples(n: int) -> None:
    """Samples mixing: rows are padded sample by sample, not after joining them."""
    x = matrix((3, n, 6))
    assert torch.equal(to_tiles(x, 2, 4), torch.stack([to_tiles(sample, 2, 4) for sample in x]))


def test_non_contiguous_input() -> None:
    """Strides taken for granted: a transposed, a strided, and an expanded matrix give the tiles of their copies."""
    base = matrix((8, 10))
    for x in (base.mT, base[::2, 1::3], base[:1].expand(5, 10)):
        assert torch.equal(to_tiles(x, 3, 4), to_tiles(x.clone(memory_format=torch.contiguous_format), 3, 4))
        assert torch.equal(from_tiles(to_tiles(x, 3, 4), *x.shape), x)


def test_input_is_left_alone_and_gradients_come_back_whole() -> None:
    """A padded copy that detaches, or counts an edge entry twice."""
    x = matrix((5, 7)).requires_grad_()
    before = x.detach().clone()
    weight = torch.arange(9 * 8, dtype=torch.float64).reshape(3, 2, 3, 4)[:2] + 1
    (to_tiles(x, 3, 4) * weight).sum().backward()
    assert torch.equal(x.detach(), before)
    assert torch.equal(x.grad, from_tiles(weight, 5, 7))


@given(st.integers(0, 10**30), st.integers(1, 10**12))
def test_tile_count_is_a_ceiling_at_any_size(size: int, side: int) -> None:
    """Floats in the division: they lose whole tiles above 2^53."""
    count = tile_count(size, side)
    assert count * side >= size > (count - 1) * side


def test_as_tile_forms() -> None:
    assert as_tile(4) == (4, 4, 4)
    assert as_tile([1, 4, 2]) == as_tile((1, 4, 2)) == as_tile(torch.Size([1, 4, 2])) == (1, 4, 2)
    assert isinstance(as_tile([1, 4, 2]), tuple)


BAD_TILES = [0, -1, True, 4.0, float("nan"), None, "4", "444", "", b"\x04\x04\x04"[:2], (), (4,), (4, 4), (4, 4, 4, 4)]
BAD_TILES += [(4, 4, 0), (4, -4, 4), (4, True, 4), (4.0, 4, 4), (4, 4, None), ("4", "4", "4"), [[4, 4, 4]]]
BAD_TILES += [{4, 2, 1}, {4: 1, 2: 1, 1: 1}, torch.tensor(4), torch.tensor([4, 4, 4]), object()]


@pytest.mark.parametrize("bad", BAD_TILES, ids=lambda bad: type(bad).__name__)
def test_as_tile_refuses(bad: object) -> None:
    """Nonsense accepted (a set has no order, True is not 1), or refused with an error that is not ours."""
    with pytest.raises(ShapeError, match="tile must be") as raised:
        as_tile(bad)  # type: ignore[arg-type]
    assert repr(bad)[:20] in str(raised.value)
    assert isinstance(raised.value, STLError) and isinstance(raised.value, ValueError)


def test_as_integer_takes_integers_only() -> None:
    """A float or a bool slipping through as a rank; numpy's sizes overflowing because they stayed numpy's."""
    numpy = pytest.importorskip("numpy")
    converted = as_integer(numpy.int32(7))
    assert converted == 7 and type(converted) is int
    assert as_integer(10**30) == 10**30
    assert all(as_integer(value) is None for value in (True, 4.0, numpy.float32(4), "4", None, float("nan")))
