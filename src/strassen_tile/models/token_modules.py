"""Tokens to tokens: soft splits, and the attention between them, in a performer and in a transformer form.

Source: Yuan et al. 2021 (arXiv 2101.11986), section 3.1; the performer's positive random features are those of
Choromanski et al. 2021 (arXiv 2009.14794), section 2.3. Parameter names are the published checkpoints'.

Requires torch only; any device and floating dtype. The performer's exponentials, and the sums over all tokens that
follow them, are worked out in float32 at least, under autocast too: exp and a sum of 3136 terms overflow float16.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strassen_tile.models.layers import Attention, Mlp
from strassen_tile.models.sizes import T2TConfig

EPS = 1e-8  # keeps the performer's normaliser from 0, as in the published models


def positive_features(u: Tensor, w: Tensor) -> Tensor:
    """φ(u) = exp(u·wᵀ − |u|²/2)/√m, with E[φ(q)·φ(k)] = exp(q·k) for Gaussian rows of w (arXiv 2009.14794, lemma 1).

    Args:
        u: (B, N, d).
        w: (m, d).

    Returns:
        (B, N, m), positive.
    """
    half_square = u.square().sum(dim=-1, keepdim=True) / 2
    return (u @ w.t() - half_square).exp() / math.sqrt(w.shape[0])


def linear_attention(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """φ(q) (φ(k)ᵀ v) / (φ(q)·Σφ(k) + 1e-8), (B, N, d) each -> (B, N, d): cost linear in N, in the tensors' dtype."""
    q_features, k_features = positive_features(q, w), positive_features(k, w)
    normaliser = q_features @ k_features.sum(dim=1).unsqueeze(-1)
    return q_features @ (k_features.transpose(1, 2) @ v) / (normaliser + EPS)


class TokenPerformer(nn.Module):
    """Performer token module (B, N, in_dim) -> (B, N, dim).

    y = v + dropout(proj(linear_attention(q, k, v))) of the normalised input, then y + mlp(norm2(y)). `w` (m, dim) holds
    m = dim/2 orthogonal rows of length √m; it is drawn once, saved, and never trained.

    Args:
        in_dim: features of the input, channels · kernel².
        dim: features of the output.
        dropout: probability of the two dropouts.
    """

    def __init__(self, in_dim: int, dim: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        features = max(1, dim // 2)
        self.w = nn.Parameter(torch.empty(features, dim), requires_grad=False)
        nn.init.orthogonal_(self.w, gain=math.sqrt(features))
        self.kqv = nn.Linear(in_dim, 3 * dim)
        self.dp = nn.Dropout(dropout)
        self.proj = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(in_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.Dropout(dropout))

    def attend(self, x: Tensor) -> Tensor:
        """The attention and its value skip, (B, N, in_dim) -> (B, N, dim)."""
        k, q, v = self.kqv(x).chunk(3, dim=-1)  # k first: the order of the published weights
        dtype = torch.promote_types(v.dtype, torch.float32)
        # Autocast knows no "meta" device; there nothing is computed, so nothing need be switched off.
        exact = contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
        with exact:
            y = linear_attention(q.to(dtype), k.to(dtype), v.to(dtype), self.w.to(dtype)).to(v.dtype)
        out: Tensor = v + self.dp(self.proj(y))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in_dim) -> (B, N, dim)."""
        y = self.attend(self.norm1(x))
        out: Tensor = y + self.mlp(self.norm2(y))
        return out


class TokenTransformer(nn.Module):
    """Transformer token module (B, N, in_dim) -> (B, N, dim): one head, scaled by in_dim**-0.5, plus v; then an MLP.

    The scale is the input's width, not the head's: so the published models were trained.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim)
        self.attn = Attention(in_dim, dim, heads=1, scale=in_dim**-0.5, value_skip=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in_dim) -> (B, N, dim)."""
        y: Tensor = self.attn(self.norm1(x))
        out: Tensor = y + self.mlp(self.norm2(y))
        return out


class TokensToToken(nn.Module):
    """Image (B, C, H, W) -> tokens (B, grid², embed_dim): split, attend, fold back to a map, split …, project.

    `attention1`, `attention2`, … stand between the soft splits, one fewer than there are splits.
    """

    def __init__(self, config: T2TConfig) -> None:
        super().__init__()
        self.splits = config.splits
        self.grid_sizes = config.grid_sizes
        channels = config.in_channels
        for index, split in enumerate(self.splits[:-1], start=1):
            in_dim = channels * split.kernel**2
            module: nn.Module = (
                TokenPerformer(in_dim, config.token_dim, dropout=config.token_dropout)
                if config.token_type == "performer"
                else TokenTransformer(in_dim, config.token_dim)
            )
            self.add_module(f"attention{index}", module)
            channels = config.token_dim
        self.project = nn.Linear(channels * self.splits[-1].kernel ** 2, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, grid², embed_dim)."""
        last = len(self.splits) - 1
        for index, (split, grid) in enumerate(zip(self.splits, self.grid_sizes, strict=True)):
            tokens = F.unfold(x, split.kernel, padding=split.padding, stride=split.stride).transpose(1, 2)
            if index < last:
                tokens = self.get_submodule(f"attention{index + 1}")(tokens)
                x = tokens.transpose(1, 2).unflatten(2, (grid, grid))
        out: Tensor = self.project(tokens)
        return out
