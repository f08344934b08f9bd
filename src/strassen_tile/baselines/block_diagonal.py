"""Monarch: two block-diagonal factors with a permutation between (Dao et al. 2022, arXiv 2204.00595), for any K and M."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strassen_tile import cost
from strassen_tile.errors import ConfigError
from strassen_tile.tiling import tile_count


def monarch_width(flop_ratio: float, k: int, m: int, blocks: int = 4) -> int:
    """The inner width, a multiple of `blocks`, at which a Monarch product takes about `flop_ratio` of the FLOPs of x @ w.

    Raises:
        ConfigError: flop_ratio is not positive and finite, or blocks < 1.
    """
    if not 0 < flop_ratio < math.inf:
        raise ConfigError(f"flop_ratio must be positive and finite; got {flop_ratio}")
    if blocks < 1:
        raise ConfigError(f"blocks must be >= 1; got {blocks}")
    sides = blocks * (tile_count(k, blocks) + tile_count(m, blocks))
    return blocks * max(1, int(flop_ratio * k * m / max(1, sides)))


class MonarchLinear(nn.Module):
    """y = B₂ P B₁ x + bias, B₁ and B₂ block-diagonal: `first` (b, R/b, K/b), `second` (b, M/b, R/b), and P the stride
    permutation, which lists the first number of every block, then the second of every block, and so on.

    So every block of B₂ sees every block of B₁ where R/b ≥ b. K and M that `blocks` does not divide are filled up with
    zeros, which are counted.

    Args:
        in_features: K.
        out_features: M.
        bias: whether there is one, (M,).
        blocks: b, of either factor.
        width: R, between the factors; a multiple of `blocks`.
        device, dtype: of the parameters, which start as those of `nn.Linear` do, by the fan-in of a block.

    Raises:
        ConfigError: blocks < 1, or a width that is no positive multiple of it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        width: int,
        blocks: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if blocks < 1:
            raise ConfigError(f"blocks must be >= 1; got {blocks}")
        if width < 1 or width % blocks:
            raise ConfigError(f"width must be a positive multiple of blocks={blocks}; got {width}")
        self.in_features, self.out_features, self.width, self.blocks = in_features, out_features, width, blocks
        inner = width // blocks
        self.first = nn.Parameter(
            torch.empty(blocks, inner, tile_count(in_features, blocks), device=device, dtype=dtype)
        )
        self.second = nn.Parameter(
            torch.empty(blocks, tile_count(out_features, blocks), inner, device=device, dtype=dtype)
        )
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        for parameter, fan_in in ((self.first, self.first.shape[-1]), (self.second, inner), (self.bias, inner)):
            if parameter is not None:
                nn.init.uniform_(parameter, -1 / math.sqrt(max(1, fan_in)), 1 / math.sqrt(max(1, fan_in)))

    @classmethod
    def from_linear(cls, linear: nn.Linear, flop_ratio: float, blocks: int = 4) -> MonarchLinear:
        """A random start, with about `flop_ratio` of the FLOPs of `linear` and its output variance.

        Both factors are normal, from torch's global generator, and scaled alike so that B₂ P B₁ has the Frobenius norm of
        the weight. The bias is that of `linear`. `fit` gives what is closest to the weight instead.

        Raises:
            ConfigError: flop_ratio is not positive and finite, or blocks < 1.
        """
        k, m, weight = linear.in_features, linear.out_features, linear.weight
        width = monarch_width(flop_ratio, k, m, blocks)
        has_bias = linear.bias is not None
        layer = cls(k, m, has_bias, width=width, blocks=blocks, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            nn.init.normal_(layer.first, std=max(1, layer.first.shape[-1]) ** -0.5)
            nn.init.normal_(layer.second, std=layer.second.shape[-1] ** -0.5)
            wanted, norm = weight.double().norm(), layer.product(torch.float64).norm()
            scale = torch.where(norm > 0, (wanted / norm).sqrt(), 1.0).to(weight.dtype)
            layer.first.mul_(scale)
            layer.second.mul_(scale)
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer.train(linear.training)

    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        """Take the factors whose product is closest to a weight (M, K), as `nn.Linear` stores it, in the Frobenius norm.

        Block (c, j) of the product is the part of B₂'s block c that sees B₁'s block j, times that part of B₁'s: no entry of a
        factor serves two blocks, so the truncated SVD of each, split evenly, is best, as Dao et al. project.
        """
        b, inner = self.blocks, self.width // self.blocks
        (_, rows, _), columns = self.second.shape, self.first.shape[-1]
        whole = F.pad(weight.double(), (0, b * columns - self.in_features, 0, b * rows - self.out_features))
        cut = whole.view(b, rows, b, columns).transpose(1, 2)  # [c, j]
        at = torch.arange(self.width)
        for j in range(b):
            for c in range(b):
                numbers = at[(at % b == j) & (at // inner == c)]  # what the two share, in the order B₂ sees it
                if not len(numbers):
                    continue
                u, sigma, vt = torch.linalg.svd(cut[c, j], full_matrices=False)
                root = sigma[: len(numbers)].sqrt()
                first, second = self.first.new_zeros(len(numbers), columns), self.second.new_zeros(rows, len(numbers))
                first[: len(root)] = root[:, None] * vt[: len(root)]
                second[:, : len(root)] = u[:, : len(root)] * root
                self.first[j, numbers // b] = first
                self.second[c, :, numbers % inner] = second

    def product(self, dtype: torch.dtype | None = None) -> Tensor:
        """B₂ P B₁ (M, K), in the factors' dtype or another."""
        first, second = (self.first, self.second) if dtype is None else (self.first.to(dtype), self.second.to(dtype))
        eye = torch.eye(self.in_features, dtype=first.dtype, device=first.device)
        return block_products(eye, first, second, self.out_features).mT

    def forward(self, input: Tensor) -> Tensor:
        """(…, K) → (…, M)."""
        y = block_products(input, self.first, self.second, self.out_features)
        return y if self.bias is None else y + self.bias

    def factor_fan_ins(self) -> dict[str, int]:
        """Numbers that go into one of each factor's outputs: K/b and R/b."""
        return {"first": self.first.shape[-1], "second": self.second.shape[-1]}

    def cost(self, rows: int, batch: int = 1) -> cost.Cost:
        """2N(K·R + R·M)/b FLOPs, K and M as filled up."""
        n, size, b = rows * batch, self.first.element_size(), self.blocks
        sides = b * (self.first.shape[-1] + self.second.shape[1])
        flops, params = 2 * n * self.width * sides // b, self.width * sides // b
        dense = cost.dense(n, self.in_features, self.out_features, itemsize=size)
        traffic = size * (n * (self.in_features + self.out_features + 2 * self.width) + params)
        return replace(dense, flops=flops, product_flops=flops, bytes=traffic, params=params)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.in_features}, {self.out_features}, width={self.width}, blocks={self.blocks}"


def block_products(x: Tensor, first: Tensor, second: Tensor, out_features: int) -> Tensor:
    """(…, K) → (…, M): x by the blocks `first` (b, R/b, K/b), permuted, by the blocks `second` (b, M/b, R/b)."""
    b, inner, columns = first.shape
    blocked = F.pad(x, (0, b * columns - x.shape[-1])).unflatten(-1, (b, columns))
    hidden = torch.einsum("...jk,jik->...ij", blocked, first)  # number i of block j: the permutation is this order
    y = torch.einsum("...ci,cmi->...cm", hidden.flatten(-2).unflatten(-1, (b, inner)), second)
    return y.flatten(-2)[..., :out_features]
