"""A short convolution over tokens, ahead of a layer's product: each feature takes in itself of the rows around.

Depthwise, four taps, added to the row itself: as in Primer (arXiv 2109.08668) and in Canon layers, but before any layer and
with any product. Causal, a row sees the three before it; symmetric, two before it and the one after. It starts at zero, so
that a layer starts as it would without.
"""

from __future__ import annotations

import uuid
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strassen_tile.errors import ConfigError, ShapeError, shape_text
from strassen_tile.nn.padding import PaddingMask

TokenMixKind = Literal["none", "causal", "symmetric"]
KINDS: tuple[str, ...] = get_args(TokenMixKind)[1:]
TAPS = 4
BEFORE = {
    "none": 0,
    "causal": TAPS - 1,
    "symmetric": TAPS // 2,
}  # of the rows that a row sees; the others come after it


def token_mix(
    x: Tensor, weight: Tensor, before: int, *, past: Tensor | None = None, documents: Tensor | None = None
) -> Tensor:
    """Mix neighbouring rows of x (…, N, K): x[n, k] + Σ_t weight[k, t] x[n + t − before, k].

    Args:
        x: rows of one sample in dimension −2.
        weight: (K, T), T taps.
        before: how many of the taps look back, from 0 to T − 1.
        past: (…, n, K), n ≤ before: rows ahead of x that a cache has kept. Zeros stand for what lies outside.
        documents: (…, N) numbers: rows of different ones do not see each other. Rows of `past` are of the first row's.

    Raises:
        ShapeError: x is 2-D: its rows are a batch.
    """
    if x.ndim < 3:
        raise ShapeError(f"a 2-D input {shape_text(x.shape)} is a batch of rows, which a token mix would mix")
    if not x.numel():
        return x
    taps, ahead = weight.shape[-1], 0 if past is None else past.shape[-2]
    padded = F.pad(x if past is None else torch.cat([past, x], dim=-2), (0, 0, before - ahead, taps - 1 - before))
    if documents is not None:
        return x + _within_documents(x, padded, weight, before, documents)
    # Two dimensions, features last in memory: for these CPUs have the fastest code.
    grid = padded.flatten(0, -3).unsqueeze(1).movedim(-1, 1)
    mixed = F.conv2d(grid, weight.unsqueeze(1).unsqueeze(1), groups=weight.shape[0])
    return x + mixed.movedim(1, -1).reshape(x.shape)


def _within_documents(x: Tensor, padded: Tensor, weight: Tensor, before: int, documents: Tensor) -> Tensor:
    n, taps = x.shape[-2], weight.shape[-1]
    ends = F.pad(documents.unsqueeze(1).float(), (before, taps - 1 - before), mode="replicate").squeeze(1)
    total = torch.zeros_like(x)
    for tap in range(taps):
        same = (ends[..., tap : tap + n] == documents).unsqueeze(-1)
        total = total + torch.where(same, padded[..., tap : tap + n, :] * weight[:, tap], 0)
    return total


class TokenMix(nn.Module):
    """A short convolution over the rows of each sample: `token_mix`, its weights (K, 4) learned.

    Padding rows count as zeros, documents that are packed into one row of the batch stay apart, and a causal one goes on where
    a cache of transformers stands (`padding`, the layer's, says all of it).

    Args:
        features: K.
        kind: "causal" (three rows before each) or "symmetric" (two before and one after).
        device, dtype: of the weights.

    Raises:
        ConfigError: another kind.
    """

    def __init__(
        self,
        features: int,
        kind: TokenMixKind = "causal",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ConfigError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
        self.features, self.kind = features, kind
        self._key = uuid.uuid4().hex  # what a cache knows it by
        self.weight = nn.Parameter(torch.zeros(features, TAPS, device=device, dtype=dtype))

    def forward(self, x: Tensor, padding: PaddingMask | None = None) -> Tensor:
        """(…, N, K) → (…, N, K). Raises ShapeError for a 2-D input, or a cache that it cannot go on from."""
        before, past, documents = BEFORE[self.kind], None, None
        if padding is not None and x.ndim == 3:
            x = padding.zero(x)
            documents = padding.documents(x)
            if self.kind == "causal":
                past = padding.past_rows(self._key, x, before, keep=not self.training)
            else:
                padding.check_no_past()
        return token_mix(x, self.weight.to(x.dtype), before, past=past, documents=documents)

    def reset_parameters(self) -> None:
        """To zero: the mix is then none."""
        with torch.no_grad():
            self.weight.zero_()

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"features={self.features}, kind={self.kind!r}"
