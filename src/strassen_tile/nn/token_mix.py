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
from strassen_tile.ops.taps import convolve_rows, shifted_sum

TokenMixKind = Literal["none", "causal", "symmetric"]
KINDS: tuple[str, ...] = get_args(TokenMixKind)[1:]
TAPS = 4
BEFORE = {
    "none": 0,
    "causal": TAPS - 1,
    "symmetric": TAPS // 2,
}  # of the rows that a row sees; the others come after it


def token_mix(x: Tensor, weight: Tensor, before: int, *, documents: Tensor | None = None) -> Tensor:
    """Mix neighbouring rows of x (…, N, K): x[n, k] + Σ_t weight[k, t] x[n + t − before, k]; zeros outside.

    Args:
        x: rows of one sample in dimension −2.
        weight: (K, T), T taps.
        before: how many of the taps look back, from 0 to T − 1.
        documents: (…, N) numbers: rows of different ones do not see each other.

    Raises:
        ShapeError: x is 2-D: its rows are a batch.
    """
    if x.ndim < 3:
        raise ShapeError(f"a 2-D input {shape_text(x.shape)} is a batch of rows, which a token mix would mix")
    if not x.numel():
        return x
    lead, taps = x.shape[:-2], weight.shape[-1]
    rows = x if x.ndim == 3 else x.flatten(0, -3)
    if documents is None:
        y = convolve_rows(rows, weight, before)
    else:
        each = documents.flatten(0, -2)
        ends = F.pad(each.unsqueeze(1).float(), (before, taps - 1 - before), mode="replicate").squeeze(1)
        same = ends.unfold(-1, taps, 1) == each.unsqueeze(-1)
        y = shifted_sum(rows, weight, before, residual=True, same=same)
    return y if x.ndim == 3 else y.unflatten(0, lead)


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
        before, documents, ahead = BEFORE[self.kind], None, 0
        if padding is not None and x.ndim == 3:
            own, documents = padding.apart(x)
            x = own
            if self.kind == "causal":
                x = padding.with_past(self._key, own, before, keep=not self.training)
            else:
                padding.check_no_past()
            ahead = x.shape[1] - own.shape[1]
        if documents is not None and ahead:  # rows of the past are of the first row's
            documents = F.pad(documents.unsqueeze(1).float(), (ahead, 0), mode="replicate").squeeze(1)
        y = token_mix(x, self.weight, before, documents=documents)
        return y[..., ahead:, :] if ahead else y

    def reset_parameters(self) -> None:
        """To zero: the mix is then none."""
        with torch.no_grad():
            self.weight.zero_()

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"features={self.features}, kind={self.kind!r}"
