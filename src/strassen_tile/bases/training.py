"""Bases trained on data, as the paper does it: E, F and D by stochastic gradients on products of matrices.

Gaussian matrices have nothing that a fixed basis could adapt to, and alternating least squares (`bases.search`) comes lower
there; real ones may.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from strassen_tile.basis import Basis
from strassen_tile.errors import BasisError, ShapeError, shape_text
from strassen_tile.tiling import as_integer, from_tiles, to_tiles

Optimizer = Literal["adam", "sgd"]
Batches = Iterable[tuple[Tensor, Tensor]]
_TILES = 8  # of a side of Gaussian matrices
_MOMENTUM = 0.9


class Trained(NamedTuple):
    """The basis of the last step, and (step, mean loss since the one before) along the way."""

    basis: Basis
    history: tuple[tuple[int, float], ...]


def gaussian(basis: Basis, seed: int = 0) -> Batches:
    """Independent normal matrices of 8 × 8 tiles, for ever."""
    p, q, s = basis.tile
    generator = torch.Generator("cpu").manual_seed(seed)
    while True:
        yield (
            torch.randn(_TILES * p, _TILES * q, generator=generator, device="cpu", dtype=torch.float32),
            torch.randn(_TILES * q, _TILES * s, generator=generator, device="cpu", dtype=torch.float32),
        )


def drawn(basis: Basis, x: Tensor, w: Tensor, *, tiles: int = 64, seed: int = 0) -> Batches:
    """Parts of a product x w, for ever: `tiles` tiles of neighbouring rows of x, and as many of columns of w, at random.

    Raises:
        ShapeError: not (N, K) and (K, M) with a whole tile of rows and of columns.
        BasisError: tiles or seed that make no sense.
    """
    p, _, s = basis.tile
    if (as_integer(tiles) or 0) < 1 or as_integer(seed) is None or abs(seed) >= 2**63:
        raise BasisError(f"tiles must be a positive integer and seed one below 2^63; got {tiles!r} and {seed!r}")
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0] or len(x) < p or w.shape[1] < s:
        raise ShapeError(
            f"x must be (N, K) and w (K, M), of at least {p} rows and {s} columns; got {shape_text(x.shape)} and "
            f"{shape_text(w.shape)}"
        )
    return _parts(x, w, p, s, tiles, torch.Generator("cpu").manual_seed(seed))


def _parts(x: Tensor, w: Tensor, p: int, s: int, tiles: int, generator: torch.Generator) -> Batches:
    while True:
        rows, columns = (
            torch.randint(size // side, (tiles, 1), generator=generator, device="cpu") * side
            + torch.arange(side, device="cpu")
            for size, side in ((len(x), p), (w.shape[1], s))
        )
        yield x[rows.flatten().to(x.device)], w[:, columns.flatten().to(w.device)]


def train(
    start: Basis,
    batches: Batches | None = None,
    *,
    steps: int = 2000,
    lr: float = 3e-3,
    optimizer: Optimizer = "adam",
    every: int = 100,
    seed: int = 0,
    progress: Callable[[int, float], object] | None = None,
) -> Trained:
    """Train E, F and D from `start` to lower ‖STL(x, w) − x w‖²/‖x w‖² over batches, the rate falling as a cosine.

    Args:
        start: where they begin: random, Strassen's truncated, a searched one, a group's.
        batches: pairs of matrices, as many as steps, taken as float32; None: `gaussian` of `seed`.
        steps: one batch each.
        lr: the first rate.
        optimizer: "adam", or "sgd" with momentum 0.9.
        every: steps between entries of the history.
        seed: of Gaussian batches.
        progress: called with each entry.

    Raises:
        BasisError: steps, every, lr or seed that make no sense, another optimizer, too few batches, or training that diverged.
        ShapeError: a batch that is no product, or has nothing in it.
    """
    if min(as_integer(steps) or 0, as_integer(every) or 0) < 1 or not isinstance(lr, int | float) or not 0 < lr < 1e6:
        raise BasisError(f"steps, every and lr must be positive; got {steps!r}, {every!r}, {lr!r}")
    if optimizer not in get_args(Optimizer):
        raise BasisError(f"optimizer must be one of {', '.join(get_args(Optimizer))}; got {optimizer!r}")
    if as_integer(seed) is None or abs(seed) >= 2**63:
        raise BasisError(f"seed must be an integer below 2^63; got {seed!r}")
    pairs = iter(gaussian(start, seed) if batches is None else batches)
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller's modes
        return _trained(start, pairs, steps, lr, optimizer, every, progress)


def _trained(
    start: Basis,
    pairs: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    lr: float,
    optimizer: Optimizer,
    every: int,
    progress: Callable[[int, float], object] | None,
) -> Trained:
    even = start.balance()
    factors = [getattr(even, field).float().requires_grad_() for field in ("encoder", "weight_encoder", "decoder")]
    chosen = (
        torch.optim.Adam(factors, lr=lr) if optimizer == "adam" else torch.optim.SGD(factors, lr=lr, momentum=_MOMENTUM)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(chosen, steps)
    since = 0.0
    history: list[tuple[int, float]] = []
    for step in range(1, steps + 1):
        try:
            x, w = (matrix.detach().float() for matrix in next(pairs))
        except StopIteration:
            raise BasisError(f"batches end after {step - 1}, before all {steps} steps") from None
        if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0] or not x.numel() or not w.numel():
            raise ShapeError(
                f"batch {step}: x must be (N, K) and w (K, M), none of them empty; got {shape_text(x.shape)} and "
                f"{shape_text(w.shape)}"
            )
        loss = _loss(factors, x, w)
        chosen.zero_grad()
        loss.backward()
        chosen.step()
        schedule.step()
        since += float(loss.detach())
        if not math.isfinite(since):
            raise BasisError(f"training diverged at step {step}, at a rate of {lr:g}; take a lower one")
        if step % every == 0 or step == steps:
            history.append((step, since / (step - (history[-1][0] if history else 0))))
            since = 0.0
            if progress is not None:
                progress(*history[-1])
    e, f, d = (factor.detach() for factor in factors)
    return Trained(replace(Basis(e, f, d), name=f"{start.name}_trained"), tuple(history))


def _loss(factors: list[Tensor], x: Tensor, w: Tensor) -> Tensor:
    encoder, weight_encoder, decoder = factors
    (_, p, q), s, exact = encoder.shape, decoder.shape[2], x @ w
    encoded = torch.einsum("ijab,kab->kij", to_tiles(x, p, q), encoder)
    encoded_weight = torch.einsum("jlab,kab->kjl", to_tiles(w, q, s), weight_encoder)
    tiles = torch.einsum("kil,kab->ilab", torch.bmm(encoded, encoded_weight), decoder)
    return (from_tiles(tiles, *exact.shape) - exact).square().sum() / exact.square().sum().clamp_min(1e-30)
