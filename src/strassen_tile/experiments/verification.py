"""Nothing is timed before it has been compared with its definition in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from strassen_tile.baselines.products import Prepared, Product
from strassen_tile.errors import STLError

FULLY_VERIFIED = 4096**3  # N·K·M
_ROWS = 64  # compared at a time
# Root mean square rounding error of the storage, relative.
_ROUNDING = {torch.float32: 2.6e-8, torch.bfloat16: 1.66e-3, torch.float16: 2.1e-4}


class VerificationError(STLError):
    """An implementation disagrees with the float64 reference; it is not timed."""


def verify(product: Product, prepared: Prepared, x: Tensor, w: Tensor, *, gradients: bool = False) -> float:
    """The relative error on the first, middle and last rows: of an exact product against x @ w, else by its definition.

    Of a product whose rows depend on each other, on all. With `gradients` those in x and all parameters are compared too: of
    a random weighting of all rows, or beyond 4096³, where the reference would take minutes, of the first and the last.
    Raises VerificationError for more than rounding.
    """
    (n, k), p, q = x.shape, *(product.tile or (1, 1, 1))[:2]
    # Four times what three roundings (of X̂, Ŷ and Y) make, and in float32 the sums, which 16 bits do not limit.
    roundings = 3 + (k / q if x.dtype == torch.float32 else 0)
    allowed = 4 * _ROUNDING[x.dtype] * math.sqrt(max(1.0, product.kappa or 1.0) * roundings)

    def check(what: str, found: Tensor, expected: Tensor, allowed: float) -> float:
        error = float((found.double() - expected).norm() / expected.norm())
        if not error < allowed:
            raise VerificationError(
                f"{product.label}: {what} differs from the float64 reference by {error:.3g}, more than {allowed:.3g}: it is "
                "not timed"
            )
        return error

    height = n if product.whole else max(p, _ROWS // p * p)  # whole tiles
    last = max(0, n - height) // p * p
    with torch.no_grad():
        y, errors = prepared.call(x), []
        middle = last // 2 // p * p
        for first, end in dict.fromkeys(((0, height), (middle, middle + height), (last, n))):
            rows = slice(first, end)
            part = x[rows].double()
            expected = part @ w.double() if product.exactness == "exact" else prepared.reference(part)
            errors.append(check("the result", y[rows], expected, allowed))
    if gradients:
        leaves = [leaf.requires_grad_(True) for leaf in (x, *prepared.parameters)]
        y = prepared.call(x)
        weights, parts = torch.randn_like(y), [slice(0, n)]
        if n * k * y.shape[1] > FULLY_VERIFIED and last > height:
            parts = [slice(0, height), slice(last, n)]
            weights[height:last] = 0
        exact = torch.stack([(prepared.reference(x[rows].double()) * weights[rows].double()).sum() for rows in parts])
        wanted = torch.autograd.grad(exact.sum(), leaves)
        for index, found in enumerate(torch.autograd.grad(y, leaves, weights)):
            check(f"gradient {index}", found, wanted[index].double(), 8 * allowed)
    return max(errors)
