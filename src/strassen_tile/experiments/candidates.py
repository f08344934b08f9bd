"""What is timed against the dense product: each with its definition in float64 and the error its dtype allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from strassen_tile import reference
from strassen_tile.baselines import mask_24
from strassen_tile.errors import ConfigError
from strassen_tile.nn import STLConfig
from strassen_tile.nn.init import start_factors
from strassen_tile.ops import stl_linear

WHY_NO_STEP = "PyTorch's 2:4 format is for inference, it has no gradient of the sparse weight to time"
METHODS = ("stl", "low-rank", "2:4")
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


def dense_candidate(x: Tensor, weight: Tensor) -> Candidate:
    """What all are timed against."""

    def exact(rows: slice) -> Tensor:
        return x[rows].double() @ weight.double().mT

    allowed = 8 * ROUNDING[x.dtype] * (1 + x.shape[1] / 4) ** 0.5
    return Candidate("dense", None, lambda: F.linear(x, weight), (x, weight), exact, 1.0, allowed)


def candidates(
    x: Tensor, weight: Tensor, ranks: Sequence[int], methods: Sequence[str], tile: int | Sequence[int], name: str
) -> Iterator[Candidate]:
    """All of `methods` that have the pass `name`, "forward" or "step": 2:4 has no step."""
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
    if "2:4" in methods and name == "forward":
        yield _sparse(x, weight, u)


def row_count(name: str, methods: Sequence[str], ranks: Sequence[int]) -> int:
    """How many rows a shape has for the pass `name`, dense included; 0 if there is nothing to compare it with."""
    pairs = len(ranks) * sum(method in ("stl", "low-rank") for method in methods) + (
        "2:4" in methods and name == "forward"
    )
    return pairs + 1 if pairs else 0


def left_out(passes: Sequence[str], methods: Sequence[str]) -> list[str]:
    """What was asked for and is not timed, and why."""
    return [f"2:4 is not timed in a step: {WHY_NO_STEP}."] if "2:4" in methods and "step" in passes else []


def _sparse(x: Tensor, weight: Tensor, u: float) -> Candidate:
    pruned = weight * mask_24(weight)
    try:
        packed = torch.sparse.to_sparse_semi_structured(pruned)
    except RuntimeError as error:  # its sides must be multiples that depend on the dtype
        raise ConfigError(f"2:4 cannot hold a weight of {tuple(weight.shape)}: {error}") from error

    def exact(rows: slice) -> Tensor:
        return x[rows].double() @ pruned.double().mT

    return Candidate("2:4", None, lambda: F.linear(x, packed), (x,), exact, 2.0, 8 * u)
