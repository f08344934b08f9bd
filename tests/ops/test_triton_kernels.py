"""Every Triton kernel, run by Triton's interpreter on the CPU, against the definition in float64.

What this shows: indices, masks, padding and arithmetic. What it cannot: whether the code compiles (test_triton_compiles.py)
and what a GPU does with it. Memory is poisoned, so that an element left out or read too many shows.
"""

import os

import pytest
import torch
from torch import nn

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs under TRITON_INTERPRET=1", allow_module_level=True)

from strassen_tile.ops import eager  # noqa: E402
from strassen_tile.ops.cuda import launch  # noqa: E402
from strassen_tile.ops.fused import Norm  # noqa: E402

# Those of fewer than 16 entries are taken several at a time, unless their ranks are too many; 3×2 is gathered.
TILES = [(4, 4, 24), (4, 4, 49), (2, 2, 7), (2, 4, 11), (1, 4, 6), (8, 8, 33), (3, 2, 5), (4, 4, 1), (1, 1, 3), (1, 8, 9),
         (1, 4, 40)]  # fmt: skip
SIZES = [(1, 1), (4, 16), (5, 63), (9, 130), (13, 260)]
# One rounding of the result; bfloat16 truncates under the interpreter instead of rounding.
STORED = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
ACTIVATE = {
    "none": lambda v: v,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda v: nn.functional.gelu(v, approximate="tanh"),
    "silu": nn.functional.silu,
}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Every empty tensor starts as NaN."""
    original = torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        made = original(self, *size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("sizes", ["usual", pytest.param("other", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("p,q,r", TILES)
def test_encode_decode_correlate(p: int, q: int, r: int, dtype: torch.dtype, sizes: str) -> None:
    for n, k in SIZES[3:] if sizes == "other" else SIZES[:4] if dtype == torch.float32 else SIZES[2:3]:
        x, factor = torch.randn(2, n, k).to(dtype), torch.randn(r, p, q).to(dtype)
        encoded = eager.encode(x.double(), factor.double())
        assert relative(launch.encode(x, factor), encoded) < STORED[dtype], (n, k)
        z = torch.randn(encoded.shape).to(dtype)
        y = eager.decode(z.double(), factor.double(), 2, n, k)
        assert relative(launch.decode(z, factor, 2, n, k), y) < STORED[dtype], (n, k)
        c = eager.correlate(x.double(), z.double(), (p, q), False)
        # Its terms cancel: the sum may be off by a rounding of the sum of absolute values, in whatever order it is made.
        rounding = 2.0**-24 * float(
            eager.correlate(x.double().abs(), z.double().abs(), (p, q), False).norm() / c.norm()
        )
        assert relative(launch.correlate(x, z, (p, q)), c) < STORED[dtype] + rounding, (n, k)


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("p,q,r", TILES)
def test_a_factor_for_every_tile(p: int, q: int, r: int, dtype: torch.dtype) -> None:
    for n, k in SIZES[:4] if dtype == torch.float32 else SIZES[2:3]:
        x, factors = torch.randn(2, n, k).to(dtype), torch.randn(-(-k // q), r, p, q).to(dtype)
        encoded = eager.encode(x.double(), factors.double())
        assert relative(launch.encode(x, factors), encoded) < STORED[dtype], (n, k)
        z, bias = torch.randn(encoded.shape).to(dtype), torch.randn(k).to(dtype)
        y = eager.decode(z.double(), factors.double(), 2, n, k) + bias.double()
        assert relative(launch.decode(z, factors, 2, n, k, bias), y) < STORED[dtype], (n, k)


@pytest.mark.parametrize("activation", ACTIVATE)
@pytest.mark.parametrize("biased", [False, True])
def test_decode_with_bias_and_activation(activation: str, biased: bool) -> None:
    z, d, bias = torch.randn(5, 2 * 3, 6), torch.randn(5, 4, 4), torch.randn(22) if biased else None
    y = eager.decode(z.double(), d.double(), 2, 11, 22)
    expected = ACTIVATE[activation](y + bias.double() if biased else y)
    assert relative(launch.decode(z, d, 2, 11, 22, bias, activation), expected) < 2e-6


@pytest.mark.parametrize("tile,rank,following", [((4, 4), 24, 16), ((2, 2), 7, 7), ((1, 4), 6, 5), ((2, 4), 11, 24)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_recode(tile: tuple[int, int], rank: int, following: int, gated: bool, activation: str) -> None:
    """Ragged rows and columns, gate and up of different ranks; act(bias) in the padding would show if it were encoded."""
    (p, s), rows, columns, e = tile, 7, 22, torch.randn(following, *tile)
    waiting, decoded = [], []
    for r in (rank, rank + 9) if gated else (rank,):
        z, d = torch.randn(r, 2 * -(-rows // p), -(-columns // s)), torch.randn(r, p, s)
        waiting.append(launch.Decoding(z, d, torch.randn(columns) + 3))
        decoded.append(eager.decode(z.double(), d.double(), 2, rows, columns) + waiting[-1].bias.double())
    expected = eager.encode(ACTIVATE[activation](decoded[0]) * (decoded[1] if gated else 1), e.double())
    found = launch.decode_act_encode(waiting[0], waiting[1] if gated else None, e, 2, rows, columns, activation)
    assert relative(found, expected) < 2e-6


def _norms():
    """Every tile at every size with every norm; those of one tile and size, and of one norm, each time."""
    for p, q, r in ((4, 4, 24), (8, 8, 9), (2, 8, 5), (1, 4, 6)):
        for n, k in ((4, 64), (5, 63), (9, 270)):
            for scaled, shifted in ((True, True), (True, False), (False, False), (False, True)):
                usual = (r, k) == (24, 63) or (k != 63 and scaled and shifted)
                marks = [] if usual else [pytest.mark.slow]
                yield pytest.param(p, q, r, n, k, scaled, shifted, marks=marks)


@pytest.mark.parametrize("centre", [True, False], ids=["layer norm", "rms norm"])
@pytest.mark.parametrize("p,q,r,n,k,scaled,shifted", _norms())
def test_norm_encode(p: int, q: int, r: int, n: int, k: int, scaled: bool, shifted: bool, centre: bool) -> None:
    x, scale = torch.randn(2, n, k) * 3 + 2, torch.randn(k) if scaled else None
    shift, e = torch.randn(k) + 2 if shifted else None, torch.randn(r, p, q)
    norm = Norm("layer" if centre else "rms", *(None if t is None else t.double() for t in (scale, shift)), 1e-5)
    normed = norm(x.double())
    found = launch.norm_encode(x, scale, shift, 1e-5, e, centre=centre)
    assert relative(found, eager.encode(normed, e.double())) < 4e-6


def test_vectors_need_not_be_dense() -> None:
    """Every other entry of a longer one, and one number expanded."""
    z, d, x = torch.randn(5, 4, 6), torch.randn(5, 4, 4), torch.randn(2, 7, 24)
    for vector in (torch.randn(48)[::2], torch.randn(1).expand(24)):
        plain = vector.clone()
        assert torch.equal(launch.decode(z, d, 2, 7, 24, vector), launch.decode(z, d, 2, 7, 24, plain))
        waiting = [launch.Decoding(z, d, bias) for bias in (vector, plain)]
        assert torch.equal(*(launch.decode_act_encode(one, one, d, 2, 7, 24) for one in waiting))
        normed = [launch.norm_encode(x, v, v, 1e-5, d, centre=True) for v in (vector, plain)]
        assert torch.equal(*normed)


@pytest.mark.parametrize("activation", ACTIVATE)
def test_what_is_no_number_stays_so(activation: str) -> None:
    """A network that diverged must show it: NaN is NaN after every activation."""
    z, d = torch.randn(5, 4, 6), torch.randn(5, 4, 4)
    z[0, 1, 2] = float("nan")
    expected = ACTIVATE[activation](eager.decode(z, d, 2, 7, 24)).isnan()
    assert expected.any()
    assert torch.equal(launch.decode(z, d, 2, 7, 24, None, activation).isnan(), expected)


def test_strides_and_alignment() -> None:
    """A transposed x, a slice of it, and encoded tensors whose rows are padded to 16 numbers."""
    e, base = torch.randn(5, 4, 4), torch.randn(3, 30, 90)
    for x in (base.mT, base[:2, 3:, 5:71], base.transpose(0, 1), base[:1].expand(3, -1, -1)):
        expected = eager.encode(x.double(), e.double())
        found = launch.encode(x, e, aligned=True)
        assert found.stride(1) % 16 == 0
        assert relative(found, expected) < 1e-6
        y = eager.decode(found.double(), e.double(), *x.shape)
        assert relative(launch.decode(found, e, *x.shape), y) < 1e-6
        c = eager.correlate(x.double(), found.double(), (4, 4), False)
        assert relative(launch.correlate(x, found, (4, 4)), c) < 1e-6


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_nothing_to_do(shape: tuple[int, int, int]) -> None:
    x, e = torch.randn(shape), torch.randn(5, 4, 4)
    encoded = launch.encode(x, e)
    assert encoded.shape == eager.encode(x, e).shape
    assert launch.decode(encoded, e, *shape).shape == x.shape
    assert torch.equal(launch.correlate(x, encoded, (4, 4)), torch.zeros(5, 4, 4))


def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device: with a layer on another one, that of the arguments has to be made current."""
    from contextlib import contextmanager

    from strassen_tile.ops.cuda import kernels, launch, taps

    inside: list[torch.Tensor] = []
    launched = []

    @contextmanager
    def device_of(tensor):
        inside.append(tensor)
        yield
        inside.pop()

    class Watched:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            def run(*arguments, **options):
                assert len(inside) == 1, self.name
                assert any(inside[0] is argument for argument in arguments), "a tensor of its own"
                launched.append(self.name)
                return self.kernel[grid](*arguments, **options)

            return run

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    names = [name for name in vars(kernels) if name.endswith("_kernel")]
    for name in names:
        monkeypatch.setattr(kernels, name, Watched(name, getattr(kernels, name)))
    x, factor = torch.randn(1, 8, 16), torch.randn(5, 4, 4)
    taps.convolve(x, torch.randn(16, 4), 3, True)
    taps.correlate(x, x, 4, 3)
    encoded = launch.encode(x, factor)
    launch.norm_encode(x, None, None, 1e-5, factor, centre=True)
    launch.decode(encoded, factor, 1, 8, 16)
    launch.decode_act_encode(
        launch.Decoding(encoded, factor, None), None, factor, 1, rows=8, columns=16, activation="relu"
    )
    launch.correlate(x, encoded, (4, 4))
    assert sorted(launched) == sorted(names)
