"""Normal equations of least squares, with a ridge that keeps what they leave open where it was."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-6  # of the mean diagonal


def step(matrix: Tensor, rest: Tensor) -> Tensor:
    """The z (n, columns) that solves matrix (n, n) · z = rest, small where the matrix does not say."""
    ridge = RIDGE * float(matrix.diagonal().mean())
    matrix = matrix.clone()
    matrix.diagonal().add_(ridge if ridge > 0 else 1.0)
    return torch.cholesky_solve(rest, torch.linalg.cholesky(matrix))


class Products:
    """Normal equations left · z · right = rest, of many tiles: left (J, n, n) and right (J, A, A) symmetric, z (n, A).

    Their matrix is a Kronecker product, whose eigenvectors are those of the two: (n·A)² numbers are never written down.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.of_left, self.left = torch.linalg.eigh(left)
        self.of_right, self.right = torch.linalg.eigh(right)
        ridge = RIDGE * self.of_left.mean(dim=1) * self.of_right.mean(dim=1)
        self.ridge = torch.where(ridge > 0, ridge, 1.0)

    def step(self, at: int, rest: Tensor) -> Tensor:
        """The z (n, A) of tile `at`, small where the matrix does not say: as of `step`."""
        left, right = self.left[at], self.right[at]
        size = self.of_left[at].clamp_min(0)[:, None] * self.of_right[at].clamp_min(0) + self.ridge[at]
        solved: Tensor = left @ ((left.mT @ rest @ right) / size) @ right.mT
        return solved
