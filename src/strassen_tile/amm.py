"""Approximate matrix multiplication as a black box: the best basis that a FLOP budget pays for, and the error to expect."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from strassen_tile import bases, cost
from strassen_tile.basis import Basis
from strassen_tile.errors import BasisError, ConfigError, ShapeError, shape_text
from strassen_tile.ops import stl_linear, stl_matmul
from strassen_tile.ops.gradients import encode
from strassen_tile.tiling import as_integer, tile_count


class Approximation(NamedTuple):
    """What `amm` returns.

    Attributes:
        value: (…, N, M).
        error: the expected ‖value − x w‖²/‖x w‖² where entries of x and w are independent, of mean 0 and of one variance; 0 if
            it is exact, but for rounding in 32 bits or more.
        basis: what was used; None: the dense product, or that of a part of the inner indices (then error is above 0).
        flop_ratio: FLOPs of all of it, both operands encoded, as a fraction of the dense product's.
    """

    value: Tensor
    error: float
    basis: Basis | None
    flop_ratio: float


def amm(
    x: Tensor, w: Tensor, flop_ratio: float = 0.5, *, unbiased: bool = False, basis: Basis | None = None, seed: int = 0
) -> Approximation:
    """Multiply x by w, approximately, for that fraction of the FLOPs.

    The error to expect is that of entries of one variance, on whole tiles: where columns differ in size or sides are shorter
    than a tile, it may be more or less. In 16 bits rounding adds about kappa u² (u the unit roundoff), which is counted.

    Of the shipped bases in every order of their sides, and Strassen's algorithm, the one of least error is taken that the
    budget pays for at these sizes, encoding both operands and decoding included. Where leaving out inner indices, drawn with
    `seed`, errs less, it is done: a part f of them leaves 1 − f and has nothing to encode, which few bases beat on small
    matrices.

    Args:
        x: (…, N, K); each sample is multiplied on its own.
        w: (K, M), of x's dtype and device.
        flop_ratio: the budget, as a fraction of 2NKM.
        unbiased: draw signs and orders of rows, inner indices and columns within a tile with `seed`, fresh ones for each column
            tile and output tile, and rescale, so that the expected value over seeds is x @ w whatever they are; the error then
            is err/(1 − err) in place of err. (To draw takes no FLOPs, but a copy of w.)
        basis: this one instead of the best; `flop_ratio` is then not looked at.
        seed: of what is drawn.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit together.
        ConfigError: a budget that does not pay for one inner index, or that is no number.
        BasisError: a basis that keeps nothing of a product on average, so that it cannot be rescaled.
    """
    _check(x, w)
    if not isinstance(flop_ratio, int | float) or not flop_ratio > 0:
        raise ConfigError(f"flop_ratio must be a positive number; got {flop_ratio!r}")
    if as_integer(seed) is None or abs(seed) >= 2**63:
        raise ConfigError(f"seed must be an integer below 2^63; got {seed!r}")
    if basis is not None and not isinstance(basis, Basis):
        raise ConfigError(f"basis must be a Basis, such as bases.named(…) gives; got {type(basis)}")
    sizes = _sizes(x, w)
    if not x.numel() or not w.numel():
        return Approximation(x @ w, 0.0, None, 1.0)
    generator = torch.Generator("cpu").manual_seed(int(seed))
    chosen = _best(sizes, flop_ratio, unbiased, x.dtype) if basis is None else basis
    if chosen is None:
        return _dropped(x, w, min(1.0, flop_ratio), unbiased, generator)
    error, ratio = expected_error(chosen, unbiased, x.dtype), total_ratio(chosen, sizes)
    if not unbiased or chosen.is_exact:
        return Approximation(stl_matmul(x, w, chosen), error, chosen, ratio)
    return Approximation(_randomised(x, w, chosen, generator), error, chosen, ratio)


def kept(basis: Basis) -> float:
    """⟨T, Σ_k E_k⊗F_k⊗D_k⟩/pqs: how much of a product is left on average; 1 − error with the decoder of least error."""
    p, q, s = basis.tile
    inner = torch.einsum("kij,kjm,kim->", basis.encoder, basis.weight_encoder, basis.decoder)
    return float(inner) / (p * q * s)


def expected_error(basis: Basis, unbiased: bool, dtype: torch.dtype = torch.float64) -> float:
    """The relative squared error on independent entries, as it is or rescaled to be right on average, with rounding in 16 bits.

    Raises:
        BasisError: it is to be rescaled, and nothing of a product is left.
    """
    rounding = basis.kappa * (torch.finfo(dtype).eps / 2) ** 2 if dtype.itemsize < 4 else 0.0
    if not unbiased or basis.is_exact:
        return rounding + (0.0 if basis.is_exact else basis.error)
    part = kept(basis)
    if not part > 0:
        raise BasisError(f"{basis} keeps {part:.3g} of a product on average, and cannot be rescaled to be unbiased")
    # ‖T̂/part − T‖² = ‖T̂‖²/part² − pqs, and ‖T̂‖² = error·pqs + (2·part − 1)·pqs
    return (basis.error + 2 * part - 1 + rounding) / part**2 - 1


def total_ratio(basis: Basis, sizes: tuple[int, int, int, int]) -> float:
    """FLOPs of encoding x and w, r products and decoding at (batch, N, K, M), as a fraction of dense's."""
    batch, n, k, m = sizes
    counted = cost.linear(n, k, m, basis.tile, basis.rank, batch=batch)
    _, q, s = basis.tile
    weight = 2 * basis.rank * tile_count(k, q) * q * tile_count(m, s) * s
    return (counted.flops + weight) / counted.dense_flops if counted.dense_flops else 1.0


def _best(sizes: tuple[int, int, int, int], budget: float, unbiased: bool, dtype: torch.dtype) -> Basis | None:
    """The affordable basis of least error, of equals the cheaper one; None: leaving out inner indices, or none, errs less."""
    if budget >= 1:
        exact = min((b for b in bases.known() if b.is_exact), key=lambda b: total_ratio(b, sizes))
        return exact if total_ratio(exact, sizes) < 1 else None
    part = int(budget * sizes[2]) / sizes[2]
    priced = [(total_ratio(basis, sizes), basis) for basis in bases.known()]
    affordable = [(expected_error(basis, unbiased, dtype), ratio, basis) for ratio, basis in priced if ratio <= budget]
    best = min(affordable, key=lambda one: one[:2], default=None)
    if part > 0 and (best is None or (1 / part - 1 if unbiased else 1 - part) <= best[0]):
        return None
    if best is None:
        raise ConfigError(f"{budget:g} of the FLOPs does not pay for one of {sizes[2]} inner indices; raise flop_ratio")
    return best[2]


def _dropped(x: Tensor, w: Tensor, part: float, unbiased: bool, generator: torch.Generator) -> Approximation:
    """The product over that part of the inner indices, drawn at random; rescaled if it is to be right on average."""
    k = len(w)
    if (count := int(part * k)) == k:
        return Approximation(x @ w, 0.0, None, 1.0)
    drawn = torch.randperm(k, generator=generator, device="cpu")[:count].sort().values.to(x.device)
    value, part = x[..., drawn] @ w[drawn], count / k
    return Approximation(value / part if unbiased else value, 1 / part - 1 if unbiased else 1 - part, None, part)


def _randomised(x: Tensor, w: Tensor, basis: Basis, generator: torch.Generator) -> Tensor:
    """The product under signed permutations within tiles, right on average: of rows one P, of each column tile and output tile
    its own Q_J and S_L.

    P X_IJ Q_Jᵀ and Q_J W_JL S_Lᵀ are multiplied, and the result is turned back. All of it but Q_J W_JL, a copy of w, is in the
    factors: ⟨E_k, P X Q_Jᵀ⟩ is ⟨Pᵀ E_k Q_J, X⟩, ⟨F_k, W S_Lᵀ⟩ is ⟨F_k S_L, W⟩, and Pᵀ Y' S_L has Pᵀ D_k S_L for D_k.
    """
    (p, q, s), (k, m) = basis.tile, w.shape
    columns, outputs = tile_count(k, q), tile_count(m, s)
    (rows,), inner, across = (_drawn(*size, generator) for size in ((1, p), (columns, q), (outputs, s)))
    encoder = torch.einsum("ap,kab,jbq->jkpq", rows, basis.encoder, inner).to(x)
    weight_encoder = torch.einsum("kbc,lcs->lkbs", basis.weight_encoder, across).to(x)
    decoder = (torch.einsum("ap,kac,lcs->lkps", rows, basis.decoder, across) / kept(basis)).to(x)
    order = (inner.abs().argmax(dim=2) + torch.arange(0, columns * q, q)[:, None]).flatten()
    turned = F.pad(w, (0, 0, 0, columns * q - k))[order.to(w.device)] * inner.sum(dim=2).view(-1, 1).to(w)
    return stl_linear(x, encode(turned.unsqueeze(0), weight_encoder), encoder, decoder, out_features=m)


def _drawn(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Signed permutation matrices (count, side, side), float64 on the CPU, as bases are."""
    order = torch.rand(count, side, generator=generator).argsort(dim=1)
    signs = torch.randint(2, (count, side), generator=generator) * 2 - 1
    return torch.eye(side, dtype=torch.float64)[order] * signs[:, :, None]


def _sizes(x: Tensor, w: Tensor) -> tuple[int, int, int, int]:
    return x.shape[:-2].numel(), x.shape[-2], x.shape[-1], w.shape[1]


def _check(x: Tensor, w: Tensor) -> None:
    for name, value in (("x", x), ("w", w)):
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype.itemsize < 2:
            kind = getattr(value, "dtype", type(value))
            raise ShapeError(f"{name} must be a tensor of real floating-point numbers of 16 bits or more; got {kind}")
    if x.ndim < 2 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise ShapeError(f"x must be (…, N, K) and w (K, M); got {shape_text(x.shape)} and {shape_text(w.shape)}")
    if x.dtype != w.dtype or x.device != w.device:
        raise ShapeError(
            f"x is {x.dtype} on {x.device}, w {w.dtype} on {w.device}: both must be of one dtype and device"
        )
