"""Layers made of dense products: low rank, and a dense layer with a cheap mix of neighbouring rows.

The second is a control. Part of what a row-mixing STL layer gains comes from the mixing, not from the encoding; a dense
layer that may mix the p rows of a tile for a few FLOPs more shows how much.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strassen_tile import cost
from strassen_tile.errors import ConfigError, ShapeError, shape_text
from strassen_tile.tiling import tile_count


def inner_rank(flop_ratio: float, k: int, m: int) -> int:
    """The rank at which x (N, K) times (K, rank) times (rank, M) takes about `flop_ratio` of the FLOPs of x @ w.

    Raises:
        ConfigError: flop_ratio is not positive and finite.
    """
    if not 0 < flop_ratio < math.inf:
        raise ConfigError(f"flop_ratio must be positive and finite; got {flop_ratio}")
    return max(1, min(int(flop_ratio * k * m / max(1, k + m)), k, m))


class LowRankLinear(nn.Module):
    """y = (x A) B + bias with A (K, rank) and B (rank, M).

    Raises:
        ConfigError: rank < 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ConfigError(f"rank must be >= 1; got {rank}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.second = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, flop_ratio: float) -> LowRankLinear:
        """The best approximation of `linear` (truncated SVD, split evenly) with about `flop_ratio` of its FLOPs.

        Raises:
            ConfigError: flop_ratio is not positive and finite.
        """
        k, m, weight = linear.in_features, linear.out_features, linear.weight
        rank = inner_rank(flop_ratio, k, m)
        layer = cls(k, m, linear.bias is not None, rank=rank, device=weight.device, dtype=weight.dtype)
        layer.fit(weight)
        if linear.bias is not None:
            with torch.no_grad():
                layer.second.bias.copy_(linear.bias)
        return layer.train(linear.training)

    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        """Take the truncated SVD of a weight (M, K) as `nn.Linear` stores it: no product of this rank is closer."""
        u, sigma, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        root = sigma[: self.rank].sqrt()
        self.first.weight.zero_()[: len(root)] = root[:, None] * vt[: self.rank]
        self.second.weight.zero_()[:, : len(root)] = u[:, : self.rank] * root

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, M)."""
        return self.second(self.first(x))  # type: ignore[no-any-return]

    def cost(self, rows: int, batch: int = 1) -> cost.Cost:
        """2N·rank·(K + M) FLOPs."""
        n, k, m, size = rows * batch, self.in_features, self.out_features, self.first.weight.element_size()
        flops, params = 2 * n * self.rank * (k + m), self.rank * (k + m)
        traffic = size * (n * (k + m + 2 * self.rank) + params)
        dense = cost.dense(n, k, m, itemsize=size)
        return replace(dense, flops=flops, product_flops=flops, bytes=traffic, params=params)


def mix_rows(x: Tensor, mix: Tensor) -> Tensor:
    """Mix the rows of x (…, N, K) in tiles of p: x[I, a, k] + Σ_b mix[k, a, b] x[I, b, k] for mix (K, p, p)."""
    n, p = x.shape[-2], mix.shape[-1]
    tiles = F.pad(x, (0, 0, 0, -n % p)).unflatten(-2, (-1, p))
    return x + torch.einsum("...ibk,kab->...iak", tiles, mix).flatten(-3, -2)[..., :n, :]


class TokenMixLinear(nn.Module):
    """A dense layer after a learned p×p mix of the rows of each tile, its own for every input feature.

    `mix` (K, p, p) of `mix_rows` starts at zero, so the layer starts dense, and weight decay pulls it there.
    """

    def __init__(self, linear: nn.Linear, rows_mixed: int = 4) -> None:
        super().__init__()
        if rows_mixed < 1:
            raise ConfigError(f"rows_mixed must be >= 1; got {rows_mixed}")
        self.linear, self.in_features, self.out_features = linear, linear.in_features, linear.out_features
        self.mix = nn.Parameter(linear.weight.new_zeros(linear.in_features, rows_mixed, rows_mixed))
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(…, N, K) → (…, N, M). Raises ShapeError for a 2-D input: its rows are a batch."""
        if x.ndim < 3:
            raise ShapeError(f"a 2-D input {shape_text(x.shape)} is a batch of rows, which this layer would mix")
        return self.linear(mix_rows(x, self.mix))  # type: ignore[no-any-return]

    def cost(self, rows: int, batch: int = 1) -> cost.Cost:
        """The dense FLOPs and 2NKp for the mix."""
        k, m, p, size = self.in_features, self.out_features, self.mix.shape[-1], self.mix.element_size()
        mix = 2 * batch * tile_count(rows, p) * p * k * p
        dense = cost.dense(rows * batch, k, m, itemsize=size)
        traffic = dense.bytes + size * (2 * rows * batch * k + k * p * p)
        return replace(dense, flops=dense.flops + mix, bytes=traffic, params=dense.params + k * p * p)
