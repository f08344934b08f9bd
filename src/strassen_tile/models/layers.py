"""The backbone's layers: attention, MLP, pre-norm block, sinusoid position table.

Every learned product is an `nn.Linear` called as a module on (B, N, features), so that a converted layer can stand in
for it. Attention is two explicit matrix products, not `F.scaled_dot_product_attention`: on CPU that call becomes one
flash-attention operator which `torch.utils.flop_counter` counts as 0 FLOPs, and a FLOP table would be wrong by it.

Requires torch only; any device and floating dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sinusoid_table(tokens: int, dim: int) -> Tensor:
    """The fixed position table (1, tokens, dim): sin(a) in even, cos(a) in odd features.

    a = position / 10000^(2⌊j/2⌋/dim) for feature j; Vaswani et al. 2017, section 3.5. Worked out in float64 and rounded
    once, to the default dtype.
    """
    position = torch.arange(tokens, dtype=torch.float64)[:, None]
    feature = torch.arange(dim)
    angle = position / 10000.0 ** (2 * (feature // 2) / dim).double()
    table = torch.where(feature % 2 == 0, angle.sin(), angle.cos())
    return table.to(torch.get_default_dtype()).unsqueeze(0)


class Attention(nn.Module):
    """Multi-head self-attention (B, N, in_dim) -> (B, N, dim): proj(softmax(scale · q kᵀ) v).

    Args:
        in_dim: features of the input.
        dim: features of the output and of q, k and v together; a multiple of `heads`.
        heads: number of heads.
        scale: factor of q·kᵀ.
        qkv_bias: whether qkv has a bias.
        value_skip: add v to the output: a token module changes the width, so its input cannot be added.
    """

    def __init__(
        self, in_dim: int, dim: int, heads: int, *, scale: float, qkv_bias: bool = False, value_skip: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.scale = scale
        self.value_skip = value_skip
        self.qkv = nn.Linear(in_dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in_dim) -> (B, N, dim)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, dim/heads)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        y: Tensor = self.proj(_merge_heads(weights @ v))
        return _merge_heads(v) + y if self.value_skip else y


def _merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads · d)."""
    return x.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), (B, N, dim) -> (B, N, dim) through `hidden` features."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, drop a whole sample's branch with probability `rate`.

    What is kept is divided by 1 − rate, so that the expectation is the evaluation's output.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) -> (B, …), each sample on its own."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        """The constructor's argument."""
        return f"rate={self.rate:g}"


class Block(nn.Module):
    """Pre-norm transformer block: x + attn(norm1(x)), then x + mlp(norm2(x)), both under stochastic depth."""

    def __init__(
        self, dim: int, heads: int, hidden: int, *, scale: float, qkv_bias: bool = False, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, dim, heads, scale=scale, qkv_bias=qkv_bias)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        y: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return y
