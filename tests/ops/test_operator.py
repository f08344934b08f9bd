"""stl_linear and stl_matmul against the definition and against x @ w; what they refuse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operands import SHAPES, operands
from torch import nn

import strassen_tile as stl
from strassen_tile.errors import BackendError, ConfigError, ShapeError
from strassen_tile.ops import schemas

EXACT = {
    "naive2x3x4": stl.bases.naive(2, 3, 4),
    "naive1x1x1": stl.bases.naive(1, 1, 1),
    "strassen1": stl.bases.strassen(1),
    "strassen2": stl.bases.strassen(2),
    "strassen3": stl.bases.strassen(3),
    "strassen*naive": stl.bases.strassen(1).kron(stl.bases.naive(1, 3, 2)),
    "shipped r49": stl.bases.approximate(4, 49),
}
# Root mean square of a rounding error, relative to the number rounded.
ROUNDING = {torch.bfloat16: 1.66e-3, torch.float16: 1.66e-3 / 2**3, torch.float32: 1.66e-3 / 2**16}


def relative(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.to(reference.dtype) - reference).norm() / reference.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("per_tile", [False, True], ids=["per layer", "per tile"])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_the_definition(shape: str, per_tile: bool, dtype: torch.dtype) -> None:
    o = operands(shape, dtype, per_tile)
    y = stl.stl_linear(*o.tensors, out_features=o.out_features)
    expected = stl.stl_linear(*o.tensors, out_features=o.out_features, backend="reference")
    assert y.shape == (*o.x.shape[:-1], o.out_features)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n,k,m", [(1, 1, 1), (4, 4, 4), (17, 5, 3), (33, 65, 7), (64, 48, 80), (3, 130, 9)])
@pytest.mark.parametrize("basis", EXACT)
def test_exact_bases_multiply(basis: str, n: int, k: int, m: int) -> None:
    x, w = torch.randn(2, n, k, dtype=torch.float64), torch.randn(k, m, dtype=torch.float64)
    assert relative(stl.stl_matmul(x, w, EXACT[basis]), x @ w) < 1e-12


@given(st.integers(0, 20), st.integers(1, 20), st.integers(1, 20), st.sampled_from(sorted(EXACT)))
def test_exact_bases_multiply_at_any_size(n: int, k: int, m: int, basis: str) -> None:
    x, w = torch.randn(n, k, dtype=torch.float64), torch.randn(k, m, dtype=torch.float64)
    torch.testing.assert_close(stl.stl_matmul(x, w, EXACT[basis]), x @ w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("n,k,m", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_empty_matrices(n: int, k: int, m: int) -> None:
    x, w = torch.randn(n, k), torch.randn(k, m)
    assert torch.equal(stl.stl_matmul(x, w, stl.bases.strassen(2)), x @ w)


@pytest.mark.parametrize("k", [101, 256])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_rounding_is_what_kappa_says(levels: int, dtype: torch.dtype, k: int) -> None:
    """Three roundings (X̂, Ŵ, Ŷ) of a term each. In float32 the sums of the four products round as well (in half
    precision they are kept in float32): a sum of m terms adds one in two of its partial sums' roundings, m/2.
    """
    basis = stl.bases.strassen(levels)
    x, w = torch.randn(200, k, dtype=torch.float64).to(dtype), torch.randn(k, 120, dtype=torch.float64).to(dtype)
    error = relative(stl.stl_matmul(x, w, basis), x.double() @ w.double())
    side = basis.tile[1]
    roundings = 3 + ((k / side + 3 * side**2) / 2 if dtype is torch.float32 else 0)
    bound = ROUNDING[dtype] * (basis.kappa * roundings) ** 0.5
    assert error < 1.25 * bound
    assert error > bound / 5  # or the bound says nothing


def test_approximate_bases_have_their_error_on_gaussian_data() -> None:
    basis = stl.bases.approximate(4, 24)
    x, w = torch.randn(256, 256, dtype=torch.float64), torch.randn(256, 256, dtype=torch.float64)
    assert relative(stl.stl_matmul(x, w, basis), x @ w) ** 2 == pytest.approx(basis.error, rel=0.03)


def test_strides_do_not_matter() -> None:
    o = operands("whole")
    strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 1 else t for t in o.tensors]
    assert not strided[0].is_contiguous()
    expanded = o.x[:1].expand(3, -1, -1)
    torch.testing.assert_close(stl.stl_linear(*strided), stl.stl_linear(*o.tensors))
    y = stl.stl_linear(expanded, *o.tensors[1:])
    torch.testing.assert_close(y[2], stl.stl_linear(*o.tensors)[0])


def test_samples_are_padded_apart() -> None:
    """N = 5 rows in tiles of 3: were samples tiled together, one would reach into the next."""
    o = operands("ragged")
    together = stl.stl_linear(*o.tensors, out_features=6)
    for i, sample in enumerate(o.x):
        torch.testing.assert_close(stl.stl_linear(sample, *o.tensors[1:], out_features=6), together[i])


def test_autocast_casts_as_linear_does() -> None:
    o = operands("whole", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = stl.stl_linear(*o.tensors)
        double = stl.stl_linear(*operands("whole").tensors)
    assert y.dtype is torch.bfloat16
    assert double.dtype is torch.float64
    torch.testing.assert_close(y, stl.stl_linear(*(t.bfloat16() for t in o.tensors)))


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda o: {"x": o.x[0, 0]}, "at least two dimensions"),
        (lambda o: {"x": o.x[..., :-3]}, "K = 4"),
        (lambda o: {"x": o.x.float()}, "torch.float32"),
        (lambda o: {"x": o.x.long(), "encoded_weight": o.encoded_weight}, "int64"),
        (lambda o: {"encoded_weight": o.encoded_weight[0]}, "encoded_weight must be"),
        (lambda o: {"encoder": o.encoder[:-1]}, "encoder must be"),
        (lambda o: {"encoder": o.encoder.expand(3, *o.encoder.shape)}, "encoder must be"),
        (lambda o: {"decoder": o.decoder[:, :-1]}, "disagree on p"),
        (lambda o: {"bias": o.bias[:-1]}, r"bias must be \(6,\)"),
        (lambda o: {"out_features": 9}, "needs 3 tiles"),
        (lambda o: {"out_features": 4}, "needs 1 tiles"),
    ],
)
def test_bad_arguments_are_named(change, message: str) -> None:
    o = operands("ragged")
    arguments = {**vars(o), **change(o)}
    with pytest.raises(ShapeError, match=message):
        stl.stl_linear(**arguments)


def test_matmul_refuses_what_matmul_refuses() -> None:
    basis = stl.bases.strassen()
    for x, w in [((3, 4), (5, 6)), ((3, 4), (2, 4, 6)), ((4,), (4, 6))]:
        with pytest.raises(ShapeError, match=r"stl_matmul takes x"):
            stl.stl_matmul(torch.randn(x), torch.randn(w), basis)
    with pytest.raises(ShapeError, match="one dtype"):
        stl.stl_matmul(torch.randn(3, 4), torch.randn(4, 5).double(), basis)
    with pytest.raises(ShapeError, match="floating-point"):
        stl.stl_matmul(torch.ones(3, 4).long(), torch.ones(4, 5).long(), basis)


def test_a_named_backend_runs_or_raises() -> None:
    o = operands("whole")
    torch.testing.assert_close(
        stl.stl_linear(*o.tensors, backend="cpu"), stl.stl_linear(*o.tensors, backend="reference")
    )
    with pytest.raises(BackendError, match="available here: auto, cpu, reference, triton"):
        stl.stl_linear(*o.tensors, backend="nonsense")
    with pytest.raises(BackendError, match="move it to a CUDA device"):
        stl.stl_linear(*o.tensors, backend="triton")
    with pytest.raises(BackendError, match="move it"):
        stl.stl_linear(*(t.to("meta") for t in o.tensors), backend="cpu")


def test_the_oracle_is_not_the_operator() -> None:
    """Were backend='reference' to run the registered operators, the tests above would compare them with themselves."""
    o = operands("whole")
    seen = []
    with _Recorder(seen):
        stl.stl_linear(*o.tensors, backend="reference")
        assert not [name for name in seen if schemas.NAMESPACE in name]
        stl.stl_linear(*o.tensors)
        assert [name for name in seen if schemas.NAMESPACE in name]


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("learns", [False, True])
def test_activation(backend: str, learns: bool) -> None:
    """The same value and gradients as the activation applied afterwards, whether or not a gradient is to come."""
    o = operands("ragged", grad=learns)
    applied = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "none": lambda y: y}
    applied["gelu_tanh"] = lambda y: nn.functional.gelu(y, approximate="tanh")
    for name, function in applied.items():
        y = stl.stl_linear(*o.tensors, out_features=o.out_features, activation=name, backend=backend)
        expected = function(stl.stl_linear(*o.tensors, out_features=o.out_features))
        torch.testing.assert_close(y, expected)
        if learns:
            found = torch.autograd.grad(y.square().sum(), o.tensors)
            for got, wanted in zip(found, torch.autograd.grad(expected.square().sum(), o.tensors), strict=True):
                torch.testing.assert_close(got, wanted)
    with pytest.raises(ConfigError, match="gelu_tanh"):
        stl.stl_linear(*o.tensors, out_features=o.out_features, activation="tanh")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_autocast_makes_no_numbers_of_integers(dtype: torch.dtype) -> None:
    layer = stl.STLLinear(8, 8)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ShapeError, match="floating-point or complex"):
        layer(torch.ones(1, 4, 8).to(dtype))


def test_autocast_casts_what_a_dense_product_would() -> None:
    """Complex numbers and float64 stay what they are; to mix them with others is an error, as it is without autocast."""
    tensors = [torch.randn(s) for s in ((1, 4, 8), (5, 2, 2), (5, 4, 4), (5, 4, 4), (8,))]
    with torch.autocast("cpu", torch.bfloat16):
        for dtype, result in ((torch.complex64,) * 2, (torch.float64,) * 2, (torch.float16, torch.bfloat16)):
            assert stl.stl_linear(*(t.to(dtype) for t in tensors)).dtype == result
            if dtype != result:
                continue
            for i in range(5):
                with pytest.raises(ShapeError, match=r"torch\.bfloat16"):
                    stl.stl_linear(*(t.to(dtype) if k == i else t for k, t in enumerate(tensors)))
