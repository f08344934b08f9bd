"""If these fail, an exported program computes something else than the layer."""

import pytest
import torch

from strassen_tile.ops import eager, standard


@pytest.mark.parametrize("tile", [(4, 4, 4), (1, 4, 2), (3, 2, 5)])
@pytest.mark.parametrize("per_tile", [False, True])
@pytest.mark.parametrize(("batch", "n", "k", "m"), [(2, 9, 10, 7), (1, 1, 1, 1), (3, 12, 20, 40)])
def test_as_the_eager_kernels(tile, per_tile, batch, n, k, m):
    (p, q, s), r = tile, 6
    columns, outputs = -(-k // q), -(-m // s)
    x = torch.randn(batch, n, k, dtype=torch.float64)
    encoder = torch.randn(*((columns,) if per_tile else ()), r, p, q, dtype=torch.float64)
    decoder = torch.randn(*((outputs,) if per_tile else ()), r, p, s, dtype=torch.float64)
    weight, bias = torch.randn(r, columns, outputs, dtype=torch.float64), torch.randn(m, dtype=torch.float64)
    encoded = standard.encode(x, encoder)
    torch.testing.assert_close(encoded, eager.encode(x, encoder))
    products = encoded @ weight
    expected = eager.decode(products, decoder, batch, n, m)
    torch.testing.assert_close(standard.decode(products, decoder, batch, n, m), expected)
    for convolutions in (False, True):
        made = standard.linear(x, weight, encoder, decoder, bias, m, "relu", convolutions=convolutions)
        torch.testing.assert_close(made, (expected + bias).relu())
