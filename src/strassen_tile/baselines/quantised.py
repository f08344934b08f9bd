"""Products of quantised matrices: int8, product quantisation, and a hash tree in the manner of MADDNESS.

Product quantisation cuts the K inner dimensions into subspaces and replaces each piece of a row by the nearest of 16
prototypes, whose products with the weight are in a table: a row is then a sum of table rows (Jégou, Douze and Schmid 2011;
for products Blalock and Guttag 2017). A hash tree (Blalock and Guttag 2021, arXiv 2106.10860) finds a prototype by four
comparisons instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from strassen_tile import cost
from strassen_tile.baselines.products import FINISHED, Prepared, Product
from strassen_tile.cost import Cost
from strassen_tile.errors import ConfigError

_PROTOTYPES, _LEVELS = 16, 4
_STEPS = 20  # of Lloyd's
_TOGETHER = 32  # subspaces at a time: their distances are kept
_RIDGES = (1e-2, 1e-1, 1.0, 10.0)  # of the mean square of a column, for what a hash tree's prototypes add to means
_FITTED = 8192  # rows at most for that: the work is cubic in them
_ROWS = 2048  # Gaussian ones that stand in where there are no rows to learn from


def int8() -> Product:
    """Both matrices rounded to 8 bits, a scale for each row of x and each column of w; sums in 32 bits.

    As many multiplications as dense has, of integers: what they cost beside those of floats is the machine's.
    """

    def prepare(w: Tensor, rows: Tensor | None = None) -> Prepared:
        dtype = w.dtype
        wide = (0, max(0, 2 - len(w)))  # of an inner side of 1 torch 2.13 makes wrong sums
        weight, scale = _rounded(torch.nn.functional.pad(w.detach().mT, wide))
        by_column = weight.mT

        def call(x: Tensor) -> Tensor:
            values, by_row = _rounded(torch.nn.functional.pad(x, wide))
            return (torch._int_mm(values, by_column) * by_row * scale.mT).to(x.dtype)

        def exact(x: Tensor) -> Tensor:
            values, by_row = _rounded(
                torch.nn.functional.pad(x.to(dtype), wide)
            )  # in float64 some would round elsewhere
            return values.double() @ by_column.double() * by_row.double() * scale.double().mT

        return Prepared(call, (), exact)

    return Product("int8", "approximate", 1.0, cost.dense, prepare, forward_only=FINISHED)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x if x.dtype.itemsize > 2 else x.float()  # 16 bits hold neither 127 steps of a row nor sums of products
    scale = (x.abs().amax(dim=-1, keepdim=True) / 127).clamp_min(torch.finfo(x.dtype).tiny)
    return (x / scale).round().to(torch.int8), scale


def quantised(kind: str, flop_ratio: float, *, seed: int = 0) -> Product:
    """Sums of table rows, as many for each row of x as this fraction of dense's FLOPs pays for, prototypes found included; at
    least one.

    Args:
        kind: "pq" (nearest of 16 prototypes in each subspace) or "hash-tree" (four comparisons of single entries, each at a
            threshold that was learned; prototypes then fitted together, over all K).
        flop_ratio: FLOPs, additions and comparisons as a fraction of those of x @ w.
        seed: of the first prototypes, and of Gaussian rows where no others are given.

    Raises:
        ConfigError: another kind, or a ratio that is not positive.
    """
    if kind not in ("pq", "hash-tree"):
        raise ConfigError(f"kind must be pq or hash-tree; got {kind!r}")
    if not flop_ratio > 0:
        raise ConfigError(f"flop_ratio must be positive; got {flop_ratio}")
    learn = _nearest if kind == "pq" else _tree

    def subspaces(k: int, m: int) -> int:
        once = 2 * _PROTOTYPES * k if kind == "pq" else 0
        each = m + (_PROTOTYPES if kind == "pq" else _LEVELS)
        return max(1, min(k, int((flop_ratio * 2 * k * m - once) / each)))

    def prepare(w: Tensor, rows: Tensor | None = None) -> Prepared:
        (k, m), generator = w.shape, torch.Generator().manual_seed(seed)
        if rows is None:
            rows = torch.randn(_ROWS, k, generator=generator, dtype=torch.float64)
        flat = rows.detach().double().reshape(-1, k).cpu()
        parts = [list(piece) for piece in torch.arange(k).tensor_split(subspaces(k, m))]
        encode, prototypes = learn(flat, [torch.stack(part) for part in parts], generator)
        table = (prototypes @ w.detach().double().cpu()).to(w).flatten(0, 1)  # (subspaces · 16, M)
        offsets = torch.arange(len(parts)) * _PROTOTYPES

        def sums(x: Tensor, dtype: torch.dtype) -> Tensor:
            codes = encode(x) + offsets.to(x.device)
            return torch.nn.functional.embedding_bag(codes, table.to(dtype), mode="sum")

        # With the codes of the weight's dtype: in float64 some would be others.
        return Prepared(lambda x: sums(x, x.dtype), (), lambda x: sums(x.to(table.dtype), torch.float64))

    def counted(n: int, k: int, m: int) -> Cost:
        c = subspaces(k, m)
        finding = 2 * _PROTOTYPES * k + _PROTOTYPES * c if kind == "pq" else _LEVELS * c
        flops, params = n * (finding + c * m), c * _PROTOTYPES * m
        return replace(
            cost.dense(n, k, m), flops=flops, product_flops=n * c * m, bytes=4 * (n * (k + m) + params), params=params
        )

    return Product(kind, "approximate", flop_ratio, counted, prepare, forward_only=FINISHED)


Encode = Callable[[Tensor], Tensor]


def _nearest(rows: Tensor, parts: list[Tensor], generator: torch.Generator) -> tuple[Encode, Tensor]:
    """Lloyd's prototypes in each subspace: codes of rows (…, subspaces), and prototypes (subspaces, 16, K), zero elsewhere."""
    found = torch.zeros(len(parts), _PROTOTYPES, rows.shape[1], dtype=torch.float64)
    groups = []  # of subspaces that are worked on together: of one size, and not too many
    for first in range(0, len(parts), _TOGETHER):
        some = range(first, min(first + _TOGETHER, len(parts)))
        for size in sorted({len(parts[at]) for at in some}):
            which = torch.tensor([at for at in some if len(parts[at]) == size])
            entries = torch.stack([parts[at] for at in which.tolist()])  # (C, d)
            centres = _lloyd(rows[:, entries].transpose(0, 1), generator)
            found[which[:, None, None], torch.arange(_PROTOTYPES)[:, None], entries[:, None]] = centres
            groups.append((which, entries, centres))

    def encode(x: Tensor) -> Tensor:
        codes = torch.empty(len(x), len(parts), dtype=torch.int64, device=x.device)
        for which, entries, centres in groups:
            near = centres.to(x)
            pieces = x[:, entries.to(x.device)].transpose(0, 1)  # (C, N, d)
            codes[:, which.to(x.device)] = torch.baddbmm(
                near.square().sum(dim=2)[:, None], pieces, near.mT, alpha=-2
            ).argmin(dim=2).mT  # fmt: skip
        return codes

    return encode, found


def _lloyd(pieces: Tensor, generator: torch.Generator) -> Tensor:
    """Prototypes (C, 16, d) of points (C, R, d), each of the C sets by itself."""
    sets, points, size = pieces.shape
    start = torch.randint(points, (sets, _PROTOTYPES, 1), generator=generator)
    centres = pieces.gather(1, start.expand(-1, -1, size))
    for _ in range(_STEPS):
        code = torch.cdist(pieces, centres).argmin(dim=2, keepdim=True)
        sums = torch.zeros_like(centres).scatter_add_(1, code.expand(-1, -1, size), pieces)
        count = torch.zeros(sets, _PROTOTYPES, 1, dtype=pieces.dtype).scatter_add_(
            1, code, torch.ones_like(pieces[..., :1])
        )
        centres = torch.where(count > 0, sums / count.clamp_min(1), centres)
    return centres


def _tree(rows: Tensor, parts: list[Tensor], generator: torch.Generator) -> tuple[Encode, Tensor]:
    """A tree of four levels a subspace, one entry compared at each, and prototypes fitted together by ridge regression."""
    splits, thresholds, codes = [], [], []
    for part in parts:
        entries, cuts, code = _grown(rows[:, part])
        splits.append(part[entries])
        thresholds.append(cuts)
        codes.append(code)
    chosen = torch.stack(codes, dim=1) + torch.arange(len(parts)) * _PROTOTYPES
    fitted = _together(chosen, rows, parts)
    at, cut = torch.stack(splits), torch.stack(thresholds)  # (subspaces, levels), (subspaces, levels, 8)

    def encode(x: Tensor) -> Tensor:
        code = torch.zeros(len(x), len(parts), dtype=torch.int64, device=x.device)
        for level in range(_LEVELS):
            value = x[:, at[:, level].to(x.device)]
            bar = cut[:, level].to(x).expand(len(x), -1, -1).gather(2, code[..., None]).squeeze(2)
            code = 2 * code + (value > bar)
        return code

    return encode, fitted.view(len(parts), _PROTOTYPES, -1)


def _together(chosen: Tensor, rows: Tensor, parts: list[Tensor]) -> Tensor:
    """Prototypes (subspaces · 16, K): means of buckets in their own subspace, and over all K what ridge regression adds.

    The ridge is the one that a quarter of the rows, fitted without them, is best served by; none of them may be, and then means
    are all: of few rows a joint fit learns their noise.
    """
    means = torch.zeros(len(parts) * _PROTOTYPES, rows.shape[1], dtype=torch.float64)
    count = torch.bincount(chosen.flatten(), minlength=len(means)).clamp_min(1)[:, None]
    for at, part in enumerate(parts):
        own = means.new_zeros(len(means), len(part)).index_add_(0, chosen[:, at], rows[:, part])
        means[:, part] += own / count
    chosen, rows = chosen[:_FITTED], rows[:_FITTED]
    left = rows - torch.nn.functional.embedding_bag(chosen, means, mode="sum")
    ones = torch.zeros(len(rows), len(means)).scatter_(1, chosen, 1.0)
    alike = (ones @ ones.mT).double()  # in how many subspaces two rows have one code
    held = len(rows) // 4
    best, ridge = left[:held].square().sum(), math.inf
    for one in _RIDGES:
        weights = _solved(alike[held:, held:], left[held:], one)
        lost = (left[:held] - alike[:held, held:] @ weights).square().sum()
        best, ridge = (lost, one) if lost < best else (best, ridge)
    if ridge == math.inf:
        return means
    weights = _solved(alike, left, ridge)
    for at in range(len(parts)):
        means.index_add_(0, chosen[:, at], weights)
    return means


def _solved(alike: Tensor, left: Tensor, ridge: float) -> Tensor:
    """How much of every row is to be added to the prototypes of its codes: (O Oᵀ + λ)⁻¹ left."""
    damping = ridge * len(left) / _PROTOTYPES * torch.eye(len(left), dtype=alike.dtype)
    return torch.cholesky_solve(left, torch.linalg.cholesky(alike + damping))


def _grown(piece: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Greedily: at each level the entry whose split, in every bucket where that helps most, leaves the least variance."""
    entries = torch.zeros(_LEVELS, dtype=torch.int64)
    cuts = torch.zeros(_LEVELS, _PROTOTYPES // 2, dtype=torch.float64)
    code = torch.zeros(len(piece), dtype=torch.int64)
    for level in range(_LEVELS):
        buckets = [piece[code == bucket] for bucket in range(2**level)]
        best = None
        for entry in range(piece.shape[1]):
            found = [_split(bucket, entry) for bucket in buckets]
            lost = sum(loss for loss, _ in found)
            if best is None or lost < best[0]:
                best = lost, entry, [cut for _, cut in found]
        assert best is not None
        entries[level], cuts[level, : len(buckets)] = best[1], torch.tensor(best[2], dtype=torch.float64)
        code = 2 * code + (piece[:, best[1]] > cuts[level][code])
    return entries, cuts, code


def _split(bucket: Tensor, entry: int) -> tuple[float, float]:
    """The least sum of squares about the two means, over thresholds for an entry; and that threshold."""
    if len(bucket) < 2:
        return 0.0, 0.0
    ordered = bucket[bucket[:, entry].argsort()]
    count = torch.arange(1, len(ordered), dtype=torch.float64)[:, None]
    sums, whole = ordered.cumsum(0), ordered.sum(0)
    between = (sums[:-1].square() / count + (whole - sums[:-1]).square() / (len(ordered) - count)).sum(dim=1)
    at = int(between.argmax())
    value = ordered[:, entry]
    return float(ordered.square().sum() - between[at]), float((value[at] + value[at + 1]) / 2)
