"""Products through fewer inner dimensions that are fitted to rows: x w ≈ (x A) B, and sketches of x and w together.

`rows` are calibration inputs (…, K); where there are none, every direction counts alike, as of Gaussian rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from strassen_tile import cost
from strassen_tile.baselines.aware import aware_svd, second_moment
from strassen_tile.baselines.layers import inner_rank
from strassen_tile.baselines.products import FINISHED, Prepared, Product
from strassen_tile.cost import Cost
from strassen_tile.errors import ConfigError

_KEPT = 0.25  # of the entries of a sparse principal component


def low_dimensional(kind: str, flop_ratio: float) -> Product:
    """The product x A B with this fraction of dense's FLOPs, A (K, d) and B (d, M) fitted to the weight and to rows.

    Args:
        kind: "aware-svd" (of all A B the one of least ‖X w − X A B‖), "pca" (A spans the directions of rows that vary most,
            B is Aᵀ w), or "sparse-pca" (A with a quarter of that's entries, largest first, for as many more directions).
        flop_ratio: of both products, as a fraction of x @ w.

    Raises:
        ConfigError: another kind, or a ratio that is not positive and finite.
    """
    if kind not in _FITS:
        raise ConfigError(f"kind must be one of {', '.join(_FITS)}; got {kind!r}")
    inner_rank(flop_ratio, 1, 1)
    density = _KEPT if kind == "sparse-pca" else 1.0

    def prepare(w: Tensor, rows: Tensor | None = None) -> Prepared:
        k, m = w.shape
        a, b = _FITS[kind](w.detach().double(), second_moment(rows, k), _inner(flop_ratio, k, m, density))
        first, second = a.to(w), b.to(w)
        left: Tensor = first.mT.to_sparse() if density < 1 and not w.is_cuda else first

        def call(x: Tensor) -> Tensor:
            return ((left @ x.mT).mT if left is not first else x @ first) @ second

        return Prepared(call, (), lambda x: x @ first.double() @ second.double())

    def counted(n: int, k: int, m: int) -> Cost:
        d = _inner(flop_ratio, k, m, density)
        flops, params = 2 * n * d * (density * k + m), d * (density * k + m)
        traffic = 4 * int(n * (k + m + 2 * d) + params)
        dense = cost.dense(n, k, m)
        return replace(dense, flops=int(flops), product_flops=int(flops), bytes=traffic, params=int(params))

    return Product(kind, "approximate", flop_ratio, counted, prepare, forward_only=FINISHED)


def _inner(flop_ratio: float, k: int, m: int, density: float) -> int:
    return max(1, min(int(flop_ratio * k * m / max(1.0, density * k + m)), k))


def _principal(w: Tensor, moment: Tensor, d: int) -> tuple[Tensor, Tensor]:
    a = torch.linalg.eigh(moment)[1].flip(1)[:, :d]
    return a, a.mT @ w.cpu()


def _sparse_principal(w: Tensor, moment: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Principal components with their largest entries alone, B then the best for them: least ‖X w − X A B‖."""
    a = torch.linalg.eigh(moment)[1].flip(1)[:, :d]
    kept = a.abs().topk(max(1, math.floor(_KEPT * len(a))), dim=0).indices
    a = torch.zeros_like(a).scatter_(0, kept, a.gather(0, kept))
    return a, torch.linalg.lstsq(a.mT @ moment @ a, a.mT @ moment @ w.cpu(), driver="gelsd").solution


_FITS: dict[str, Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]] = {
    "aware-svd": aware_svd,
    "pca": _principal,
    "sparse-pca": _sparse_principal,
}


def directions(kind: str, flop_ratio: float) -> Product:
    """A sketch of x and w together, made anew at every call: to d inner dimensions, which take this fraction of x @ w's FLOPs.

    (The sketch itself takes more than it saves, which the cost says: it is for inner indices that come as a stream.)

    Args:
        kind: "frequent" (Frequent Directions of the rows of [xᵀ w]; Ye, Luo and Zhang 2016) or "co-occurring" (Co-Occurring
            Directions; Mroueh, Marcheret and Goel 2017).
        flop_ratio: of the product of the sketches, as a fraction of x @ w.
    """
    if kind not in ("frequent", "co-occurring"):
        raise ConfigError(f"kind must be frequent or co-occurring; got {kind!r}")
    shrink = _frequent if kind == "frequent" else _co_occurring

    def size(k: int) -> int:
        return max(2, min(int(flop_ratio * k), k) // 2 * 2)

    def product(x: Tensor, w: Tensor) -> Tensor:
        (n, k), d, dtype = x.shape, size(len(w)), x.dtype
        # Decompositions in 32 bits leave ten roundings and more, by processor and library.
        x, w = x.double(), w.double()
        left, right = x.new_zeros(d, n), x.new_zeros(d, w.shape[1])
        used = 0
        for at in range(k):
            if used == d:
                left, right = shrink(left, right)
                used = d // 2
            left[used], right[used] = x[:, at], w[at]
            used += 1
        return (left.mT @ right).to(dtype)

    def prepare(w: Tensor, rows: Tensor | None = None) -> Prepared:
        weight = w.detach()
        return Prepared(lambda x: product(x, weight), (), lambda x: product(x, weight.double()))

    def counted(n: int, k: int, m: int) -> Cost:
        d = size(k)
        # For every d/2 inner indices an SVD of a×d, or two QRs, at about 6 a d min(a, d) FLOPs; and the product.
        shrinks, sides = max(0, math.ceil(2 * (k - d) / d)), (n + m,) if kind == "frequent" else (n, m)
        flops = shrinks * 6 * d * sum(side * min(side, d) for side in sides) + 2 * n * d * m
        return replace(cost.dense(n, k, m), flops=flops, product_flops=2 * n * d * m)

    return Product(
        f"{kind}-directions", "approximate", flop_ratio, counted, prepare, whole=True, forward_only=FINISHED,
        kappa=4.0,  # beside its sums, the sketch is rounded by three decompositions every time it shrinks
    )  # fmt: skip


def _frequent(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Of [left right] as one matrix the singular values lowered, in squares, by the middle one: half of its rows are then 0."""
    together = torch.cat([left, right], dim=1)
    _, sigma, vt = torch.linalg.svd(together, full_matrices=False)
    lowered = (sigma.square() - _middle(sigma, len(together)).square()).clamp_min(0).sqrt()
    shrunk = torch.zeros_like(together)
    shrunk[: len(sigma)] = lowered[:, None] * vt
    return shrunk[:, : left.shape[1]], shrunk[:, left.shape[1] :]


def _co_occurring(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Of leftᵀ right the singular values lowered by the middle one, both sketches made of the rest."""
    q_left, r_left = torch.linalg.qr(left.mT)
    q_right, r_right = torch.linalg.qr(right.mT)
    u, sigma, vt = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    root = (sigma - _middle(sigma, len(left))).clamp_min(0).sqrt()
    one, other = torch.zeros_like(left), torch.zeros_like(right)
    one[: len(root)] = (q_left @ (u * root)).mT
    other[: len(root)] = (q_right @ (vt.mT * root)).mT
    return one, other


def _middle(sigma: Tensor, size: int) -> Tensor:
    """By how much singular values are lowered so that half of the sketch is free again: not at all where it is already."""
    half = size // 2
    return sigma[half] if len(sigma) > half else sigma.new_zeros(())
