"""How fast on this machine: dense, Strassen-Tile and its baselines, in pairs with the dense product in the same run.

A machine's speed drifts, so no time stands alone: runs alternate dense, product, dense, product, and the speed-up is the
median of the ratios of neighbours. Nothing is timed before it has been compared with float64 (`experiments.verification`).
What is timed is in `baselines.roster`.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from strassen_tile.baselines.products import Prepared, Product, dense
from strassen_tile.baselines.roster import at_ranks
from strassen_tile.cost import machine
from strassen_tile.errors import ConfigError
from strassen_tile.experiments.pairs import Pairs, Run, interleave
from strassen_tile.experiments.verification import VerificationError, verify
from strassen_tile.files import amount
from strassen_tile.nn import STLConfig
from strassen_tile.ops.cpu.tiles import compiled
from strassen_tile.records import Row, environment

__all__ = ["DTYPES", "NAMED", "VerificationError", "bench", "left_out", "row_count", "shapes_of"]

Shape = tuple[int, int, int]
NAMED: dict[str, tuple[Shape, ...]] = {
    "squares": ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (4096, 4096, 4096)),
    "vit-b": ((6304, 768, 2304), (6304, 768, 768), (6304, 768, 3072), (6304, 3072, 768)),  # 32 images of 197 tokens
    "llama-7b": ((2048, 4096, 4096), (2048, 4096, 11008), (2048, 11008, 4096)),
    "small": ((256, 256, 256), (512, 128, 384), (4096, 64, 64), (32, 1024, 1024), (32, 4096, 4096)),
    "mlp": ((4096, 1024, 4096), (4096, 4096, 1024)),
}
SMALLEST = 16
_COPIES = 3  # of the operands, in float32: as drawn, in their dtype, and in float64 to compare with
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def shapes_of(text: str) -> list[Shape]:
    """`4096x4096x4096,vit-b` → N×K×M triples. Raises ConfigError for anything else."""
    found: list[Shape] = []
    for part in text.split(","):
        if part in NAMED:
            found += NAMED[part]
            continue
        sizes = part.split("x")
        if len(sizes) != 3 or not all(re.fullmatch(r"0*[1-9][0-9]{0,8}", size) for size in sizes):
            raise ConfigError(f"a shape is NxKxM or one of {', '.join(NAMED)}; got {part!r}")
        n, k, m = map(int, sizes)
        found.append((n, k, m))
    return found


def bench(
    shapes: Sequence[Shape],
    ranks: Sequence[int],
    *,
    device: str = "cpu",
    dtype: str = "float32",
    passes: Sequence[str] = ("forward",),
    methods: Sequence[str] = ("stl", "low-rank"),
    tile: int | Sequence[int] = 4,
    seconds: float = 4.0,
) -> Iterator[Row]:
    """A row for each product and one for dense, for every shape and pass.

    The dense row comes last: its times are those measured in the pairs of all the others. Products without a training step
    have rows of the forward pass alone: see `left_out`.

    Args:
        shapes: (N, K, M) each.
        ranks: of STL; what has no rank of its own gets the FLOPs of each one's products.
        device: "cpu" or "cuda".
        dtype: of everything.
        passes: "forward" (no gradient) or "step" (forward and backward, gradients of the input and all parameters).
        methods: names of `baselines.roster.ROSTER`, besides dense.
        tile: of STL.
        seconds: to spend on each pair, at least five pairs.

    Raises:
        ConfigError: an argument that cannot be; before the first row is asked for.
        VerificationError: an implementation is wrong.
    """
    if dtype not in DTYPES or not passes or any(name not in ("forward", "step") for name in passes):
        raise ConfigError(f"dtype is one of {', '.join(DTYPES)}, a pass forward or step; got {dtype!r}, {list(passes)}")
    if not ranks or min(ranks) < 1 or not 0 <= seconds < math.inf:
        raise ConfigError(f"ranks must be positive, seconds not negative and finite; got {list(ranks)} and {seconds}")
    timed = {(shape, name): _timed(name, methods, ranks, tile, shape) for shape in shapes for name in passes}
    if not any(timed.values()):
        why = " ".join(["nothing to time beside dense.", *left_out(shapes, ranks, passes, methods, tile)])
        raise ConfigError(f"{why} Got methods {list(methods)}, passes {list(passes)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but torch sees none")
    for product in itertools.chain(*timed.values()):
        if product.cuda_only and device != "cuda":
            raise ConfigError(f"{product.name} products: {product.cuda_only}; leave them out with --methods")
    for n, k, m in shapes:
        if min(n, k, m) < SMALLEST:
            raise ConfigError(
                f"{n}x{k}x{m} is too small: sums of few terms may cancel, and no bound on their error holds. Every side must "
                f"be at least {SMALLEST}"
            )
        if (needed := _COPIES * 4 * (n * k + k * m + n * m)) > (memory := _memory(device)):
            raise ConfigError(
                f"{n}x{k}x{m} is too large: it takes {amount(needed)} of memory, and there is {amount(memory)}"
            )
    return _rows(shapes, timed, device, dtype, tile, seconds)


def _timed(
    name: str, methods: Sequence[str], ranks: Sequence[int], tile: int | Sequence[int], shape: Shape
) -> list[Product]:
    """What is timed in pairs with dense in the pass `name`."""
    found = at_ranks(methods, [STLConfig(tile=tile, rank=rank) for rank in ranks], shape)
    return [each for each in found if each.name != "dense" and not (name == "step" and each.forward_only)]


def row_count(
    shapes: Sequence[Shape], ranks: Sequence[int], passes: Sequence[str], methods: Sequence[str],
    tile: int | Sequence[int] = 4,
) -> int:  # fmt: skip
    """How many rows there will be, dense included where something is compared with it."""
    of = itertools.product(dict.fromkeys(shapes), dict.fromkeys(passes))
    pairs = [len(_timed(name, methods, ranks, tile, shape)) for shape, name in of]
    return sum(pairs) + sum(map(bool, pairs))


def left_out(
    shapes: Sequence[Shape], ranks: Sequence[int], passes: Sequence[str], methods: Sequence[str],
    tile: int | Sequence[int] = 4,
) -> list[str]:  # fmt: skip
    """What was asked for and is not timed, and why."""
    reasons: dict[str, dict[str, None]] = {}
    for shape, rank in itertools.product(shapes, ranks):
        found = {each.name: each for each in at_ranks(methods, [STLConfig(tile=tile, rank=rank)], shape)}
        for name in methods:
            if name not in found:
                size = "x".join(map(str, shape))
                why = f"not timed at {size}, r = {rank}: the FLOPs pay for nothing, or the sides do not fit"
                reasons.setdefault(why, {})[name] = None
            elif "step" in passes and found[name].forward_only:
                reasons.setdefault(f"not timed in a step: {found[name].forward_only}", {})[name] = None
    return [f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} {why}." for why, names in reasons.items()]


def _memory(device: str) -> int:
    """Bytes of memory that the device has; more than any shape takes where the system does not say."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62


def _rows(
    shapes: Sequence[Shape], timed: Mapping[tuple[Shape, str], Sequence[Product]], device: str, dtype: str,
    tile: int | Sequence[int], seconds: float,
) -> Iterator[Row]:  # fmt: skip
    # Without the compiled kernels a time means something else.
    fixed: Row = {"device": device, "dtype": dtype, **environment(), "compiled": compiled(), "tile": str(tile)}
    rates = machine(device, DTYPES[dtype])
    for n, k, m in dict.fromkeys(shapes):
        x = torch.randn(n, k, device=device).to(DTYPES[dtype])
        w = (torch.randn(m, k, device=device) / k**0.5).to(DTYPES[dtype]).mT  # stored as nn.Linear stores it
        grad = torch.randn(n, m, device=device).to(DTYPES[dtype])
        for name, others in ((name, others) for (shape, name), others in timed.items() if shape == (n, k, m)):
            fixed |= {"n": n, "k": k, "m": m, "pass": name}
            run_dense = _run(dense().prepare(w), x, grad, name)
            dense_times: list[float] = []
            for product in others:
                prepared = product.prepare(w)
                error = verify(product, prepared, x, w, gradients=name == "step")
                pairs = interleave(run_dense, _run(prepared, x, grad, name), seconds, device)
                dense_times += [first for first, _ in pairs]
                rank = product.rank if product.name == "stl" else None
                predicted = (None, None) if rank is None else rates.linear(n, k, m, tile, rank, name)
                yield {**fixed, **_row(product, pairs, error, predicted)}
            if others:
                error = verify(dense(), dense().prepare(w), x, w, gradients=name == "step")
                yield {**fixed, **_row(dense(), [(once, once) for once in dense_times], error, (None, None))}


def _run(prepared: Prepared, x: Tensor, grad: Tensor, name: str) -> Run:
    leaves = (x, *prepared.parameters)

    def forward() -> None:
        with torch.no_grad():
            prepared.call(x)

    def step() -> None:
        for leaf in leaves:
            leaf.requires_grad_(True).grad = None
        prepared.call(x).backward(grad)

    return step if name == "step" else forward


def _row(product: Product, pairs: Pairs, error: float, predicted: tuple[float | None, float | None]) -> Row:
    times, ratios = [second for _, second in pairs], [first / second for first, second in pairs]
    (q20, *_, q80), (low, *_, high) = (statistics.quantiles(of, n=5, method="inclusive") for of in (times, ratios))
    return {
        "method": product.name,
        "rank": product.rank,
        "median_s": statistics.median(times),
        "q20_s": q20,
        "q80_s": q80,
        "dense_s": statistics.median(first for first, _ in pairs),
        "pairs": len(pairs),
        "speedup": statistics.median(ratios),
        "speedup_q20": low,
        "speedup_q80": high,
        "limit": 1 / product.flop_ratio,
        "error": error,
        "predicted_s": predicted[1],
        "predicted_dense_s": predicted[0],
    }
