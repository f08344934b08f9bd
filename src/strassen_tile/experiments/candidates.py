"""What is timed against the dense product: each with its definition in float64 and the error its dtype allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from strassen_tile import reference
from strassen_tile.errors import ConfigError
from strassen_tile.nn import STLConfig
from strassen_tile.nn.init import start_factors
from strassen_tile.ops import stl_linear
from strassen_tile.rivals import mask_24

# Root mean square rounding error of the storage, relative; results further from the reference than this allows fail.
ROUNDING = {torch.float32: 2.6e-8, torch.bfloat16: 1.66e-3, torch.float16: 2.1e-4}


@dataclass(frozen=True)
class Candidate:
    """Something to time against the dense product.

    Attributes:
        method: "stl", "low-rank" or "2:4".
        rank: channels; None where there are none.
        forward: () → y.
        leaves: what a training step differentiates.
        exact: (rows) → y in float64 for those rows, by the definition.
        limit: bound of the speed-up from arithmetic alone (products only).
        allowed: relative error allowed.
        height: rows that depend on each other; `exact` takes whole multiples, or up to the end.
    """

    method: str
    rank: int | None
    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    exact: Callable[[slice], Tensor]
    limit: float
    allowed: float
    height: int = 1


def candidates(
    x: Tensor, weight: Tensor, ranks: Sequence[int], methods: Sequence[str], tile: int | Sequence[int]
) -> Iterator[Candidate]:
    k, m = x.shape[1], weight.shape[0]
    u = ROUNDING[x.dtype]
    for rank in ranks:
        config = STLConfig(tile=tile, rank=rank)
        p, q, s = config.pqs
        ratio = rank / (p * q * s)
        if "stl" in methods:
            columns, outputs = -(-k // q), -(-m // s)
            encoder, decoder = (f.to(x) for f in start_factors(config, None, columns, outputs))
            encoded = torch.randn(rank, columns, outputs, device=x.device).to(x.dtype)

            def forward(encoded: Tensor = encoded, encoder: Tensor = encoder, decoder: Tensor = decoder) -> Tensor:
                return stl_linear(x, encoded, encoder, decoder, out_features=m)

            def exact(rows: slice, parts: tuple[Tensor, ...] = (encoded, encoder, decoder)) -> Tensor:
                return reference.stl_linear(x[rows].double(), *(t.double() for t in parts), out_features=m)

            # Three roundings of a random basis (kappa near 1) and the float32 sums; a wrong result is off by about 1.
            allowed = 4 * u * (3 + k / q) ** 0.5 if x.dtype == torch.float32 else 4 * u * 3**0.5
            yield Candidate("stl", rank, forward, (x, encoded, encoder, decoder), exact, 1 / ratio, allowed, p)
        if "low-rank" in methods:
            inner = max(1, int(ratio * k * m / (k + m)))
            a = (torch.randn(inner, k, device=x.device) / k**0.5).to(x.dtype)
            b = (torch.randn(m, inner, device=x.device) / inner**0.5).to(x.dtype)

            def thin(a: Tensor = a, b: Tensor = b) -> Tensor:
                return F.linear(F.linear(x, a), b)

            def thin_exact(rows: slice, a: Tensor = a, b: Tensor = b) -> Tensor:
                return x[rows].double() @ a.double().mT @ b.double().mT

            yield Candidate("low-rank", rank, thin, (x, a, b), thin_exact, 1 / ratio, 8 * u * (1 + k / 4) ** 0.5)
    if "2:4" in methods:
        yield _sparse(x, weight, u)


def _sparse(x: Tensor, weight: Tensor, u: float) -> Candidate:
    if x.device.type != "cuda":
        raise ConfigError(
            "2:4 products need an NVIDIA GPU of the Ampere generation or later; leave them out with --methods"
        )
    pruned = weight * mask_24(weight)
    packed = torch.sparse.to_sparse_semi_structured(pruned)

    def exact(rows: slice) -> Tensor:
        return x[rows].double() @ pruned.double().mT

    return Candidate("2:4", None, lambda: F.linear(x, packed), (x,), exact, 2.0, 8 * u)
