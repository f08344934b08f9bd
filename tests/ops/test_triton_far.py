"""Offsets beyond 2³¹: matrices whose rows, samples or channels lie that far apart, of which only the used ones are touched."""

import mmap
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs under TRITON_INTERPRET=1", allow_module_level=True)

from strassen_tile.ops import eager
from strassen_tile.ops.cuda import kernels, launch

APART = 2**30  # fits 32 bits, twice it does not; so stride times index must be taken in 64
RANK, ROWS, COLUMNS = 3, 5, 20
NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which Python names from 3.13 on


def far(shape: tuple[int, ...], dimension: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """A tensor whose entries along `dimension` lie `APART` numbers from each other. Pages never touched take no memory."""
    strides = list(torch.empty(shape).stride())
    strides[dimension] = APART
    numbers = APART * (shape[dimension] - 1) + 2**16
    try:
        room = mmap.mmap(-1, numbers * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    except OSError as error:
        pytest.skip(f"no address space to be had: {error}")
    return torch.frombuffer(room, dtype=dtype).as_strided(shape, strides)


@pytest.mark.parametrize("dimension", [0, 1], ids=["samples", "rows"])
@pytest.mark.parametrize("tile", [(4, 4), (3, 2)], ids=["whole rows", "gathered"])
def test_a_far_matrix(tile: tuple[int, int], dimension: int) -> None:
    shape = (3, ROWS, COLUMNS) if dimension == 0 else (1, ROWS, COLUMNS)
    e, x = torch.randn(RANK, *tile).half(), far(shape, dimension).copy_(torch.randn(shape))
    encoded = eager.encode(x.double(), e.double())
    torch.testing.assert_close(launch.encode(x, e).double(), encoded, rtol=2e-3, atol=2e-3)
    z = encoded.half()
    sums = eager.correlate(x.double(), z.double(), tile, False)
    torch.testing.assert_close(launch.correlate(x, z, tile).double(), sums, rtol=2e-3, atol=0.05)
    y = far(shape, dimension)
    sizes, grid, strides = arguments(y, z, tile)
    kernels.decode_kernel[grid](
        z,
        e,
        None,
        None,
        y,
        *sizes,
        *z.stride()[:2],
        *y.stride()[:2],
        BIAS=False,
        SCALED=False,
        ACTIVATION="none",
        **strides,
    )
    expected = eager.decode(z.double(), e.double(), *shape)
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-3)


def arguments(matrix: torch.Tensor, encoded: torch.Tensor, tile: tuple[int, int]):
    total, tiles = encoded.shape[1:]
    shape = launch.blocks(launch.compile_time("decode", *tile, RANK, matrix), False)
    return launch._sizes(matrix, tile[0], total, tiles, RANK), launch._grid(total, tiles, shape), shape


@pytest.mark.parametrize("dimension", [0, 1], ids=["channels", "tile rows"])
def test_far_channels(dimension: int) -> None:
    """X̂ and Ŷ whose channels, or tile rows, far apart: read by decode, decode_act_encode and correlate, written by encode."""
    tile, batch, rows = (4, 4), 3, 4  # three tile rows
    e, x = torch.randn(RANK, *tile).half(), torch.randn(batch, rows, COLUMNS).half()
    encoded = eager.encode(x.double(), e.double())
    z = far(tuple(encoded.shape), dimension).copy_(encoded)
    torch.testing.assert_close(
        launch.decode(z, e, batch, rows, COLUMNS).double(),
        eager.decode(z.double(), e.double(), batch, rows, COLUMNS),
        rtol=2e-3,
        atol=2e-3,
    )
    expected = eager.correlate(x.double(), z.double(), tile, False)
    torch.testing.assert_close(launch.correlate(x, z, tile).double(), expected, rtol=2e-3, atol=0.05)
    again = eager.encode(eager.decode(z.double(), e.double(), batch, rows, COLUMNS), e.double())
    found = launch.decode_act_encode(launch.Decoding(z, e, None), None, e, batch, rows, COLUMNS)
    torch.testing.assert_close(found.double(), again, rtol=5e-3, atol=0.05)
    out = far(tuple(encoded.shape), dimension)
    sizes, grid, shape = arguments(x, out, tile)
    kernels.encode_kernel[grid](x, e, None, None, out, *sizes, *x.stride(), *out.stride()[:2], SCALED=False, **shape)
    torch.testing.assert_close(out.double(), encoded, rtol=2e-3, atol=2e-3)
