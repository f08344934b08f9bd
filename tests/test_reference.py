"""The oracle itself, against loops written from the definition (MATH.md §1) and against x @ w."""

import math

import pytest
import torch
from torch import Tensor

from strassen_tile import Basis, bases, reference
from strassen_tile.tiling import tile_count

EXACT = [bases.naive(1, 1, 1), bases.naive(2, 3, 1), bases.naive(1, 4, 2), bases.strassen(), bases.strassen(2)]
EXACT += [bases.strassen().kron(bases.naive(1, 3, 2)), bases.approximate(4, 49)]
SIZES = [
    (1, 1, 1),
    (2, 2, 2),
    (5, 7, 3),
    (4, 8, 12),
    (9, 1, 13),
    (1, 17, 1),
    (0, 5, 4),
    (5, 0, 4),
    (5, 4, 0),
    (0, 0, 0),
]
SIZES += [(16, 16, 16), (31, 33, 35)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def padded(matrix: list[list[float]], row: int, column: int) -> float:
    return matrix[row][column] if row < len(matrix) and column < len(matrix[row]) else 0.0


def looped(x: Tensor, w: Tensor, encoders: list[Tensor], weight_encoder: Tensor, decoders: list[Tensor]) -> Tensor:
    """Y_IL = Σ_k D_k · Σ_J ⟨E_k, X_IJ⟩⟨F_k, W_JL⟩ entry by entry; encoders[J] and decoders[L] may differ."""
    (n, k), m = x.shape, w.shape[1]
    r, p, q = encoders[0].shape
    s = decoders[0].shape[2]
    xs, ws, f = x.tolist(), w.tolist(), weight_encoder.tolist()
    y = [[0.0] * m for _ in range(n)]
    for i in range(tile_count(n, p)):
        for l in range(tile_count(m, s)):  # noqa: E741 - the tile index L
            d = decoders[l].tolist()
            for t in range(r):
                channel = 0.0
                for j in range(tile_count(k, q)):
                    e = encoders[j].tolist()[t]
                    read = sum(e[a][b] * padded(xs, i * p + a, j * q + b) for a in range(p) for b in range(q))
                    weight = sum(f[t][b][c] * padded(ws, j * q + b, l * s + c) for b in range(q) for c in range(s))
                    channel += read * weight
                for a in range(min(p, n - i * p)):
                    for c in range(min(s, m - l * s)):
                        y[i * p + a][l * s + c] += channel * d[t][a][c]
    return torch.tensor(y, dtype=torch.float64).reshape(n, m)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("basis", EXACT, ids=repr)
def test_exact_bases_multiply(basis: Basis, dtype: torch.dtype) -> None:
    """Every other path is tested against this one: if it does not multiply matrices, nothing does."""
    for n, k, m in SIZES:
        x, w = normal(2, n, k, dtype=dtype), normal(k, m, seed=1, dtype=dtype)
        y = reference.stl_matmul(x, w, basis)
        assert y.dtype == dtype
        torch.testing.assert_close(y, x @ w, rtol=1e-12, atol=1e-12 * math.sqrt(max(k, 1)) * basis.kappa)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (5, 7, 3), (1, 1, 1), (7, 2, 6), (3, 0, 4), (0, 3, 4)], ids=str)
@pytest.mark.parametrize("basis", [bases.random((2, 3, 4), 5), bases.random((1, 4, 2), 3), bases.approximate(2, 5)])
def test_any_basis_against_loops(basis: Basis, sizes: tuple[int, int, int]) -> None:
    """Inexact bases tell apart what exact ones cannot: which entry of which factor meets which entry of a tile."""
    n, k, m = sizes
    x, w = normal(n, k), normal(k, m, seed=1)
    wanted = looped(x, w, [basis.encoder] * 9, basis.weight_encoder, [basis.decoder] * 9)
    torch.testing.assert_close(reference.stl_matmul(x, w, basis), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [(4, 6, 8), (5, 7, 3), (2, 3, 4)], ids=str)
def test_encoders_per_tile_against_loops(sizes: tuple[int, int, int]) -> None:
    """Encoder J applied to another column tile, decoder L to another output tile, or one used for all."""
    (n, k, m), (p, q, s), r = sizes, (2, 3, 4), 5
    columns, outputs = tile_count(k, q), tile_count(m, s)
    encoder, decoder = normal(columns, r, p, q), normal(outputs, r, p, s, seed=1)
    weight_encoder, x, w = normal(r, q, s, seed=2), normal(n, k, seed=3), normal(k, m, seed=4)
    encoded_weight = reference.encode(w, weight_encoder)
    assert encoded_weight.shape == (r, columns, outputs)
    y = reference.stl_linear(x, encoded_weight, encoder, decoder, out_features=m)
    wanted = looped(x, w, list(encoder), weight_encoder, list(decoder))
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)


def test_samples_bias_and_output_width() -> None:
    """Rows of two samples in one tile, a bias on padding, or a ragged last tile given its full width."""
    basis, x = bases.random((4, 2, 3), 6), normal(2, 3, 5, 6)
    encoded_weight, bias = normal(6, 3, 4, seed=1), normal(10, seed=2)
    factors = (encoded_weight, basis.encoder, basis.decoder)
    y = reference.stl_linear(x, *factors, bias, out_features=10)
    assert y.shape == (2, 3, 5, 10)
    for i in range(2):
        for j in range(3):
            alone = reference.stl_linear(x[i, j], *factors, out_features=10) + bias
            torch.testing.assert_close(y[i, j], alone, rtol=1e-13, atol=1e-13)
    assert reference.stl_linear(x, *factors).shape == (2, 3, 5, 12)
    torch.testing.assert_close(reference.stl_linear(x, *factors)[..., :10] + bias, y)


def test_it_is_linear_in_the_encoded_weight_and_differentiable() -> None:
    """Gradients of every other path are compared with autograd's through this one."""
    basis = bases.random((2, 3, 2), 4)
    inputs = [normal(2, 3, 5), normal(4, 2, 2, seed=1), basis.encoder.clone(), basis.decoder.clone(), normal(3, seed=2)]
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def run(*arguments: Tensor) -> Tensor:
        return reference.stl_linear(*arguments, out_features=3)

    assert torch.autograd.gradcheck(run, inputs)
    doubled = run(inputs[0], 2 * inputs[1], *inputs[2:]) - inputs[4]
    torch.testing.assert_close(doubled, 2 * (run(*inputs) - inputs[4]))


def test_low_precision_basis_follows_the_input() -> None:
    """A float64 basis lifting half-precision activations: memory doubles and kernels are not what was asked for."""
    x, w = normal(4, 8).bfloat16(), normal(8, 4, seed=1).bfloat16()
    y = reference.stl_matmul(x, w, bases.strassen())
    assert y.dtype == torch.bfloat16
    error = (y.double() - x.double() @ w.double()).norm() / (x.double() @ w.double()).norm()
    assert error < 3 * 1.66e-3 * math.sqrt(3 * bases.strassen().kappa)  # MATH.md §6, three roundings
