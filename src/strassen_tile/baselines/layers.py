"""Layers made of thin dense products, and what any layer of a model costs."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from strassen_tile import cost
from strassen_tile.baselines.aware import aware_svd, second_moment
from strassen_tile.errors import ConfigError


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
    def from_linear(cls, linear: nn.Linear, flop_ratio: float, inputs: Tensor | None = None) -> LowRankLinear:
        """The best approximation of `linear` (truncated SVD, split evenly) with about `flop_ratio` of its FLOPs.

        Args:
            linear: what is approximated.
            flop_ratio: of its FLOPs.
            inputs: calibration rows (…, K): the best for what these become, instead of that of the weight.

        Raises:
            ConfigError: flop_ratio is not positive and finite.
        """
        k, m, weight = linear.in_features, linear.out_features, linear.weight
        rank = inner_rank(flop_ratio, k, m)
        layer = cls(k, m, linear.bias is not None, rank=rank, device=weight.device, dtype=weight.dtype)
        layer.fit(weight, inputs)
        if linear.bias is not None:
            with torch.no_grad():
                layer.second.bias.copy_(linear.bias)
        return layer.train(linear.training)

    @torch.no_grad()
    def fit(self, weight: Tensor, inputs: Tensor | None = None) -> None:
        """Take the product of this rank that is closest to a weight (M, K) as `nn.Linear` stores it, or for these inputs."""
        moment = second_moment(inputs, self.in_features)
        a, b = aware_svd(weight.double().mT.contiguous(), moment, self.rank)
        even = (b.norm(dim=1) / a.norm(dim=0).clamp_min(1e-30)).sqrt().clamp_min(1e-30)  # both layers learn alike, then
        self.first.weight.zero_()[: a.shape[1]] = (a * even).mT
        self.second.weight.zero_()[:, : b.shape[0]] = (b / even[:, None]).mT

    def factor_fan_ins(self) -> dict[str, int]:
        """Of A and B, for `param_groups`."""
        return {"first.weight": self.in_features, "second.weight": self.rank}

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


def layer_cost(layer: nn.Module, rows: int, batch: int = 1) -> cost.Cost:
    """The cost of a layer that says it (`cost(rows, batch)`), or of an `nn.Linear`, fed (batch, rows, K).

    Raises:
        ConfigError: a layer of another class.
    """
    if callable(own := getattr(layer, "cost", None)):
        return own(rows, batch)  # type: ignore[no-any-return]
    if isinstance(layer, nn.Linear):
        return cost.dense(rows * batch, layer.in_features, layer.out_features, itemsize=layer.weight.element_size())
    raise ConfigError(f"{type(layer).__name__} has no cost")
