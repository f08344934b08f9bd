"""Random bases: where training starts when no algorithm is wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index

import torch

from strassen_tile.basis import Basis
from strassen_tile.errors import BasisError
from strassen_tile.tiling import as_integer, as_tile


def random(tile: int | Sequence[int], rank: int, seed: int = 0) -> Basis:
    """Independent Gaussian factors that keep variances: the output of a product has the variance X @ W would have.

    E ~ N(0, 1/pq) keeps the variance of X in X̂; F ~ N(0, 1/s) gives Ŵ variance q·Var(W), so that a sum over K/q
    tile columns weighs as much as one over K features; D ~ N(0, 1/r) averages r channels. It approximates nothing.

    Raises:
        BasisError: rank is not a positive integer, or seed not one of 64 bits.
    """
    p, q, s = as_tile(tile)
    if (as_integer(rank) or 0) < 1:
        raise BasisError(f"random takes an integer rank >= 1; got {rank!r}")
    try:
        generator = torch.Generator().manual_seed(index(seed))
    except (TypeError, ValueError, RuntimeError) as error:  # which, depends on the release of torch
        raise BasisError(f"random takes an integer seed of 64 bits; got {seed!r}") from error

    def gaussian(rows: int, columns: int, variance: float) -> torch.Tensor:
        noise = torch.randn(rank, rows, columns, generator=generator, dtype=torch.float64, device="cpu")
        return noise * math.sqrt(variance)

    return Basis(gaussian(p, q, 1 / (p * q)), gaussian(q, s, 1 / s), gaussian(p, s, 1 / rank), name=f"random{seed}")
