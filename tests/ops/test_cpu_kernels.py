"""The compiled kernels against plain PyTorch in float64: every tile they take, every edge, every dtype."""

import pytest
import torch

import strassen_tile as stl
from strassen_tile.errors import ShapeError
from strassen_tile.ops import eager, schemas
from strassen_tile.ops.cpu import tiles

pytestmark = pytest.mark.skipif(not tiles.compiled(), reason="built without a C compiler")

# p, q, rank: every specialised tile, every q with general code, an odd rank each, ranks 1 and 2.
TILES = [
    (4, 4, 24),
    (4, 4, 49),
    (2, 2, 7),
    (1, 4, 6),
    (2, 4, 11),
    (8, 8, 33),
    (3, 1, 5),
    (5, 2, 3),
    (3, 4, 1),
    (4, 8, 2),
    (1, 1, 1),
]
SIZES = [(1, 1), (4, 64), (5, 63), (8, 65), (13, 130), (37, 101), (3, 257)]
STORED = {torch.float32: 3e-7, torch.bfloat16: 4e-3}  # one rounding of the result, and for float32 those of its sum


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("scope", ["layer", "tile"])
@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("p,q,r", TILES)
def test_steps_are_the_generic_ones(p: int, q: int, r: int, dtype: torch.dtype, scope: str) -> None:
    """One factor a layer, or one a column tile."""
    for n, k in SIZES:
        lead = (-(-k // q),) if scope == "tile" else ()
        x, factor = torch.randn(2, n, k).to(dtype), torch.randn(*lead, r, p, q).to(dtype)
        assert tiles.supports(x, factor.shape)
        encoded = tiles.encode(x, factor)
        expected = eager.encode(x.double(), factor.double())
        assert relative(encoded, expected) < STORED[dtype], (n, k)
        z = torch.randn(encoded.shape).to(dtype)
        y = tiles.decode(z, factor, 2, n, k)
        assert relative(y, eager.decode(z.double(), factor.double(), 2, n, k)) < STORED[dtype] * 2, (n, k)
        c = tiles.correlate(x, z, (p, q), scope == "tile")
        expected = eager.correlate(x.double(), z.double(), (p, q), scope == "tile")
        assert c.shape == expected.shape
        assert relative(c, expected) < STORED[dtype] * 8, (n, k)


def test_every_element_is_written() -> None:
    """Outputs start as whatever memory held; were one left out, it would show as the poison it came from."""
    x, weight = torch.randn(3, 1000, 260), torch.randn(5, 65, 131)
    e, d = torch.randn(5, 4, 4), torch.randn(5, 4, 4)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        outputs = [schemas.linear(x, weight, e, d, None, 523, "silu"), schemas.encode(x, e)]
        outputs.append(schemas.decode(outputs[1], d, 3, 1000, 259))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(bool(torch.isfinite(y).all()) for y in outputs)


def test_strided_inputs() -> None:
    e = torch.randn(5, 4, 4)
    base = torch.randn(4, 30, 200)
    for x in (base[::2, 3:, 5:131], base.transpose(0, 1)[:8], base.mT, base[:, :, ::2], base[:1].expand(3, -1, -1)):
        torch.testing.assert_close(tiles.encode(x, e), eager.encode(x.contiguous(), e), rtol=1e-5, atol=1e-5)
        z = torch.randn(tiles.encode(x, e).shape)
        torch.testing.assert_close(
            tiles.correlate(x, z.mT.contiguous().mT, (4, 4), False),
            eager.correlate(x, z, (4, 4), False),
            rtol=1e-4,
            atol=1e-4,
        )


def test_special_values_pass_through_bfloat16() -> None:
    """NaN must not be rounded to infinity, nor infinity to NaN; ties go to even."""
    one = torch.ones(1, 1, 1, dtype=torch.bfloat16)
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3e38, 1e-39, 1.00390625, 1.01171875])
    x = values.bfloat16().view(1, 1, -1)
    torch.testing.assert_close(tiles.encode(x, one), x, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(tiles.encode(x, one).signbit()[..., 1:], x.signbit()[..., 1:])
    halfway = torch.tensor([[[1.0, 2.0**-8]]], dtype=torch.bfloat16)  # 1 + 2^-8 lies between 1 and 1 + 2^-7
    both = torch.ones(1, 1, 2, dtype=torch.bfloat16)
    assert tiles.encode(halfway, both).item() == 1.0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_show(threads: int) -> None:
    before = torch.get_num_threads()
    x, e = torch.randn(2, 700, 512), torch.randn(9, 4, 4)
    expected = eager.encode(x, e)
    try:
        torch.set_num_threads(threads)
        torch.testing.assert_close(tiles.encode(x, e), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            tiles.correlate(x, expected, (4, 4), False),
            eager.correlate(x, expected, (4, 4), False),
            rtol=1e-4,
            atol=1e-2,
        )
    finally:
        torch.set_num_threads(before)


def test_what_the_kernels_cannot_do_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64, float16, a tile of q = 3, and a build without a compiler."""
    x = torch.randn(2, 9, 14)
    for dtype in (torch.float64, torch.float16):
        e = torch.randn(3, 4, 4).to(dtype)
        assert torch.equal(tiles.encode(x.to(dtype), e), eager.encode(x.to(dtype), e))
    assert torch.equal(tiles.encode(x, torch.ones(3, 2, 3)), eager.encode(x, torch.ones(3, 2, 3)))
    monkeypatch.setattr(tiles, "_kernels", None)
    assert not tiles.compiled()
    w = torch.randn(14, 6)
    torch.testing.assert_close(stl.stl_matmul(x, w, stl.bases.strassen(2)), x @ w, rtol=1e-4, atol=1e-4)


def test_kernels_are_given_nothing_they_would_misread() -> None:
    """They take addresses: another dtype, size or device is memory beyond the tensor's."""
    x, e = torch.randn(2, 8, 12), torch.randn(5, 4, 4)
    z = schemas.encode(x, e)
    with pytest.raises(ShapeError, match="one dtype"):
        schemas.correlate(x, z.bfloat16(), [4, 4], False)
    with pytest.raises(ShapeError, match="a factor for each"):
        tiles.encode(torch.randn(2, 8, 100), torch.randn(3, 5, 4, 4))
    with pytest.raises(ShapeError, match="takes an encoded tensor"):
        schemas.correlate(x, z[:, :3].contiguous(), [4, 4], False)
    with pytest.raises(ShapeError, match="takes an encoded tensor"):
        schemas.decode(z, e, 2, 8, 16)
    w = torch.randn(5, 3, 3)
    kept = schemas.linear_forward(x, w, e, e, None, 12)[1]
    with pytest.raises(ShapeError, match="one dtype"):
        schemas.linear_backward(x, x, w, e, e, kept.bfloat16(), [True] * 5)
