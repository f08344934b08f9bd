"""Products in fp8 against their definition in float64 on the rounded operands, and what rounding costs."""

import os

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import strassen_tile as stl
from strassen_tile import reference
from strassen_tile.errors import BackendError, ShapeError
from strassen_tile.ops import schemas
from strassen_tile.ops.cuda import fp8
from strassen_tile.ops.cuda.fp8 import FP8, LARGEST, Rounded

# (B, N, K, M, (p, q, s), r): whole multiples of 16 tiles, ragged on every side, fewer than 16 tiles.
SIZES = {
    "whole": (2, 12, 64, 128, (4, 4, 4), 24),
    "ragged": (2, 13, 75, 45, (4, 4, 4), 5),
    "small": (1, 3, 5, 7, (2, 2, 2), 7),
    "rows apart": (3, 5, 64, 64, (1, 4, 4), 6),
    "one row": (1, 1, 64, 64, (4, 4, 4), 16),
}


def tensors(size: str, dtype: torch.dtype = torch.float32):
    b, n, k, m, (p, q, s), r = SIZES[size]
    shapes = ((b, n, k), (r, -(-k // q), -(-m // s)), (r, p, q), (r, p, s), (m,))
    return [torch.randn(shape).to(dtype) for shape in shapes], m


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


def on_rounded(x, w, e, d, bias, m, encoded=None):
    """The definition in float64, X̂ (another's, if given) and Ŵ taken as fp8 holds them."""
    weight, rows = fp8.rounded(w, e), fp8.scale_of_rows(x, e.shape[1])
    scale = weight.encoder_scale
    encoded = fp8.encode(x, e, scale, rows) if encoded is None else encoded
    _, j, l = w.shape  # noqa: E741 - the tile index L
    values = weight.values.double()[:, :l, :j].mT * (weight.scale * weight.largest).double()[:, None, None]
    products = (encoded.double()[:, :, :j] * scale.double()[:, None, None] * rows.double()[:, None]) @ values
    return fp8.eager.decode(products, d.double(), x.shape[0], x.shape[1], m) + bias.double()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_the_definition(size: str, dtype: torch.dtype) -> None:
    (x, w, e, d, bias), m = tensors(size, dtype)
    with torch.no_grad():
        y = fp8.fp8_linear(x, fp8.rounded(w, e), e, d, bias, m)
    assert y.dtype == dtype
    exact = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]  # Ŷ and y are rounded to it
    assert relative(y, on_rounded(x, w, e, d, bias, m)) < exact
    expected = reference.stl_linear(*(t.double() for t in (x, w, e, d, bias)), out_features=m)
    # Two factors with a rounding of up to 2⁻⁴ each, in root mean square 2⁻⁴/√3·(2/3 or so): about 3.5 per cent in all.
    assert 0.005 < relative(y, expected) < 0.06


@pytest.mark.parametrize("size", SIZES)
def test_nothing_overflows(size: str) -> None:
    """The bound of X̂ holds for the worst x there is: the signs of an encoder's own entries."""
    _, w, e = tensors(size)[0][:3]
    p, q = e.shape[1:]
    worst = 3e4 * (torch.zeros(e.shape[0], p, q) + e.sign())  # a tile each
    encoded = fp8.encode(worst, e, fp8.rounded(w, e).encoder_scale, fp8.scale_of_rows(worst, p)).double()
    assert torch.isfinite(encoded).all()
    own = torch.stack([encoded[k, k, 0] for k in range(len(e))])
    assert (own == LARGEST).all()
    assert not encoded[:, :, 1:].any(), "what pads the tiles is zero"


def test_channels_have_scales_of_their_own() -> None:
    """Channels twenty orders of magnitude apart in Ŵ, and as far the other way in E: every one counts."""
    (x, w, e, d, bias), m = tensors("whole")
    size = torch.logspace(-10, 10, 24)[:, None, None]
    with torch.no_grad():
        plain = fp8.fp8_linear(x, fp8.rounded(w, e), e, d, bias, m)
        spread = fp8.fp8_linear(x, fp8.rounded(w * size, e / size), e / size, d, bias, m)
    torch.testing.assert_close(spread, plain, rtol=1e-3, atol=0.3)
    assert relative(spread, plain.double()) < 0.05


@pytest.mark.parametrize("value", [1e4, float("nan"), float("inf")])
def test_a_tile_row_is_rounded_for_itself(value: float) -> None:
    """Whatever one row holds, the rows of other tiles and other samples are bit for bit what they were."""
    (x, w, e, d, bias), m = tensors("whole")
    with torch.no_grad():
        before = fp8.fp8_linear(x, fp8.rounded(w, e), e, d, bias, m)
        x[0, 5, 3] = value
        after = fp8.fp8_linear(x, fp8.rounded(w, e), e, d, bias, m)
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[0, :4], before[0, :4])
    assert torch.equal(after[0, 8:], before[0, 8:])
    assert not torch.equal(after[0, 4:8], before[0, 4:8])


@pytest.mark.parametrize("of_x,of_weight", [(1e-3, 3e3), (6e2, 1e-6), (1e-3, 1.0)])
def test_half_precision_does_not_overflow_where_the_result_does_not(of_x: float, of_weight: float) -> None:
    """Small x and large Ŵ, and the other way round: Ŷ is of moderate size whatever they are."""
    (x, w, e, d, bias), m = tensors("whole")
    x, w, e, d, bias = (
        (t * size).half() for t, size in zip((x, w, e, d, bias), (of_x, of_weight, 1, 0.1, 0), strict=True)
    )
    expected = reference.stl_linear(*(t.double() for t in (x, w, e, d, bias)), out_features=m)
    with torch.no_grad():
        assert relative(fp8.fp8_linear(x, fp8.rounded(w, e), e, d, bias, m), expected) < 0.06


def test_rows_of_any_size() -> None:
    """Twenty orders of magnitude between samples cost nothing."""
    (x, w, e, d, bias), m = tensors("whole")
    bias.zero_()
    with torch.no_grad():
        plain = fp8.fp8_linear(x, fp8.rounded(w, e), e, d, bias, m)
        scaled = fp8.fp8_linear(x * torch.tensor([2.0**-40, 2.0**20])[:, None, None], fp8.rounded(w, e), e, d, bias, m)
    torch.testing.assert_close(scaled[0] * 2.0**40, plain[0])
    torch.testing.assert_close(scaled[1] * 2.0**-20, plain[1])


@pytest.mark.parametrize("shape", [(0, 4, 64), (2, 0, 64)])
def test_nothing_to_do(shape) -> None:
    (_, w, e, d, bias), m = tensors("whole")
    with torch.no_grad():
        assert fp8.fp8_linear(torch.randn(shape), fp8.rounded(w, e), e, d, bias, m).shape == (*shape[:2], m)
        zero = fp8.fp8_linear(torch.zeros(1, 4, 64), fp8.rounded(torch.zeros_like(w), e), e, d, bias, m)
    assert torch.equal(zero, bias.expand_as(zero))


def test_as_an_operator() -> None:
    (x, w, e, d, bias), m = tensors("ragged")
    weight = fp8.rounded(w, e)
    with torch.no_grad():
        # test_schema multiplies its arguments, which PyTorch cannot do in fp8.
        tests = ("test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
        assert set(opcheck(schemas.fp8_linear, (x, *weight, e, d, bias, m), test_utils=tests).values()) == {"SUCCESS"}
        with FlopCounterMode(display=False) as counter:
            fp8.fp8_linear(x, weight, e, d, bias, m)
    assert counter.get_total_flops() == stl.cost.linear(13, 75, 45, (4, 4, 4), 5, batch=2).flops
    with pytest.raises(BackendError, match=r"not for torch\.func"), torch.no_grad():
        torch.func.vmap(lambda one: fp8.fp8_linear(one[None], weight, e, d, bias, m))(x)
    with pytest.raises(BackendError, match="quantise the layer again"), torch.no_grad():
        fp8.fp8_linear(x, weight._replace(values=weight.values.float()), e, d, bias, m)
    x.requires_grad_()
    for call in (
        lambda: fp8.fp8_linear(x, weight, e, d, bias, m),
        lambda: schemas.fp8_linear(x, *weight, e, d, bias, m),
    ):
        with pytest.raises(BackendError, match="for inference"):
            call()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs under TRITON_INTERPRET=1")
@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_rounds_as_the_definition_does(size: str) -> None:
    pytest.importorskip("triton")
    from strassen_tile.ops.cuda import launch, passes

    (x, w, e, d, bias), m = tensors(size)
    scale, rows = fp8.rounded(w, e).encoder_scale, fp8.scale_of_rows(x, e.shape[1])
    expected = fp8.encode(x, e, scale, rows)
    found = launch.encode(x, e, out=fp8.empty_input(len(e), len(rows), w.shape[1], x), scales=(scale, rows))
    assert found.dtype == FP8
    # Sums differ in their last bit, and so a number in a thousand may fall on the other side of a tie. What rounds up to a
    # power of two the interpreter halves (31.5 becomes 16: it drops the carry into the exponent); GPUs do not.
    got, wanted = found.double(), expected.double()
    differs, carried = got != wanted, got * 2 == wanted
    assert (wanted[carried & differs].abs().log2() % 1 == 0).all()
    assert int((differs & ~carried).sum()) <= 1 + 2e-3 * differs.numel()
    assert float(differs.double().mean()) < 0.05
    y = passes.fp8_linear(x, *fp8.rounded(w, e), e, d, bias, m)
    assert relative(y, on_rounded(x, w, e, d, bias, m, encoded=found)) < 1e-6


def test_rounded_weights_are_where_products_want_them() -> None:
    w = torch.randn(3, 5, 20)
    values, scale, largest, _ = Rounded(*fp8.rounded(w, torch.randn(3, 4, 4)))
    scale = scale * largest
    assert values.shape == (3, 32, 16)
    assert scale.shape == (3,)
    assert float(values.double().abs().amax()) == LARGEST
    assert not values[:, 20:].double().any()
    assert not values[:, :, 5:].double().any()
    back = values[:, :20, :5].double().mT * scale.double()[:, None, None]
    assert relative(back, w.double()) < 0.04


PATHS = ["plain"] + ["kernels"] * (os.environ.get("TRITON_INTERPRET") == "1")


def on(path: str, x, w, e, d, bias, m):
    if path == "plain":
        with torch.no_grad():
            return fp8.fp8_linear(x, fp8.rounded(w, e), e, d, bias, m)
    pytest.importorskip("triton")
    from strassen_tile.ops.cuda import passes

    return passes.fp8_linear(x, *fp8.rounded(w, e), e, d, bias, m)


@pytest.mark.parametrize("path", PATHS)
def test_float16_where_the_encoded_output_is_beyond_it(path: str) -> None:
    """Positive x and W of 4096 features: y is 16, and Ŷ by the scale of its factors half a million."""
    k = 4096
    basis = stl.bases.naive(1, 4, 4)
    x, w = torch.rand(1, 4, k).half(), (torch.rand(k, 8) / 64).half()
    e, f, d = (t.half() for t in (basis.encoder, basis.weight_encoder, basis.decoder))
    y = on(path, x, fp8.eager.encode(w[None], f), e, d, torch.zeros(8).half(), 8)
    assert relative(y, x.double() @ w.double()) < 0.02


USUAL = {("nan", torch.float32), ("nan", torch.bfloat16), ("inf", torch.float16), ("-inf", torch.bfloat16)}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "value,dtype",
    [
        pytest.param(float(value), dtype, marks=[] if (value, dtype) in USUAL else [pytest.mark.slow])
        for value in ("nan", "inf", "-inf")
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ],
    ids=str,
)
def test_what_is_not_finite_stays_in_its_place(value: float, dtype: torch.dtype, path: str) -> None:
    """In Ŵ: the columns of its output tile. In x: the rows of its tile. In the bias: its column."""
    (x, w, e, d, bias), _ = tensors("ragged", dtype)
    clean = on(path, x, w, e, d, bias, 45)
    spoilt = [t.clone() for t in (x, w, bias)]
    spoilt[0][1, 6, 3] = spoilt[1][2, 5, 3] = spoilt[2][7] = value
    for which, rows, columns in (
        (0, slice(4, 8), slice(None)),
        (1, slice(None), slice(12, 16)),
        (2, slice(None), slice(7, 8)),
    ):
        given = [spoilt[i] if i == which else t for i, t in enumerate((x, w, bias))]
        y, inside = on(path, *given[:2], e, d, given[2], 45), torch.zeros(2, 13, 45, dtype=torch.bool)
        inside[1 if which == 0 else slice(None), rows, columns] = True
        assert torch.equal(y[~inside], clean[~inside])
        assert not y[inside].isfinite().any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("of_x,of_weight", [(127, -110), (-100, 100), (-110, 120), (127, -116)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_operands_of_a_moderate_result(of_x: int, of_weight: int, dtype: torch.dtype, path: str) -> None:
    """Neither X̂, nor the product of the scales, may overflow on the way: powers of two change nothing but the exponent."""
    (x, w, e, d, bias), m = tensors("small", dtype)
    x, w, bias = x.clamp(-1, 1), w.clamp(-1, 1), torch.zeros_like(bias)
    plain = on(path, x, w, e, d, bias, m).double()
    y = on(path, x * 2.0**of_x, w * 2.0**of_weight, e, d, bias, m).double()
    torch.testing.assert_close(
        y * 2.0 ** -(of_x + of_weight), plain, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-5
    )
    nothing = on(path, 0 * x, w * 2.0**126, e, d, bias, m)
    assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("path", PATHS)
def test_a_bias_that_brings_a_sum_back_into_float16(path: str) -> None:
    one = torch.ones(1, 1, 1).half()
    y = on(path, 256 * torch.ones(1, 1, 1).half(), 256 * one, one, one, torch.tensor([-1024.0]).half(), 1)
    assert y.item() == 65536 - 1024


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.complex64], ids=str)
def test_dtypes_that_fp8_does_not_serve(dtype: torch.dtype) -> None:
    (x, w, e, d, bias), m = tensors("small")
    with pytest.raises(ShapeError, match="float32, bfloat16 or float16"), torch.no_grad():
        fp8.fp8_linear(x.to(dtype), fp8.rounded(w, e), e, d, bias, m)


@pytest.mark.parametrize("shape,features", [((2, 5, 0), (0, 8)), ((2, 5, 8), (8, 0)), ((0, 5, 0), (0, 0))])
def test_layers_without_features(shape, features) -> None:
    layer = stl.STLLinearFP8(stl.STLLinear(*features))
    with torch.no_grad():
        y = layer(torch.randn(shape))
    assert y.shape == (*shape[:2], features[1])
    assert features[0] or torch.equal(y, layer.bias.expand_as(y))
