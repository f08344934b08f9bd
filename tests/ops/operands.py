"""Operands for the operator's tests, each named once and crossed with dtypes, scopes and sizes."""

from dataclasses import dataclass

import torch
from torch import Tensor

# (batch shape, N, K, M, tile, rank): ragged on every side, one row, one column, sizes below a tile, none at all.
SHAPES = {
    "ragged": ((2,), 5, 7, 6, (3, 2, 4), 5),
    "whole": ((3,), 8, 8, 8, (4, 4, 4), 24),
    "below a tile": ((2,), 1, 3, 2, (4, 4, 4), 7),
    "rows apart": ((2,), 5, 9, 6, (1, 4, 4), 6),
    "wide tile": ((1,), 9, 17, 5, (2, 8, 3), 11),
    "two leading": ((2, 3), 6, 5, 9, (4, 2, 2), 3),
    "no leading": ((), 6, 5, 9, (2, 2, 2), 7),
    "no rows": ((2,), 0, 5, 9, (2, 2, 2), 7),
    "no samples": ((0,), 4, 5, 9, (2, 2, 2), 7),
    "no features": ((2,), 4, 0, 9, (2, 2, 2), 7),
    "no outputs": ((2,), 4, 5, 0, (2, 2, 2), 7),
}


@dataclass
class Operands:
    x: Tensor
    encoded_weight: Tensor
    encoder: Tensor
    decoder: Tensor
    bias: Tensor
    out_features: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.x, self.encoded_weight, self.encoder, self.decoder, self.bias


def operands(shape: str, dtype: torch.dtype = torch.float64, per_tile: bool = False, grad: bool = False) -> Operands:
    lead, n, k, m, (p, q, s), r = SHAPES[shape]
    j, l = -(-k // q), -(-m // s)  # noqa: E741

    def normal(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)

    made = Operands(
        normal(*lead, n, k),
        normal(r, j, l),
        normal(*((j,) if per_tile else ()), r, p, q),
        normal(*((l,) if per_tile else ()), r, p, s),
        normal(m),
        m,
    )
    for tensor in made.tensors:
        tensor.requires_grad_(grad)
    return made
