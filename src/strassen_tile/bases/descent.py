"""Descent to factors of least error: alternating least squares for many starts at once, a damped Newton method for one.

Both minimise ‖T − Σ_k E_k⊗F_k⊗D_k‖² + ridge·(‖E‖² + ‖F‖² + ‖D‖²), T the matrix-multiplication tensor, which is never formed:
its contraction with two factors is a product of small matrices. Factors are (…, r, p, q), (…, r, q, s), (…, r, p, s), float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from strassen_tile.algebra import Factors

_DAMPING = 1e-2  # of a first step
_MOST_DAMPING = 1e8
_MOST_UNKNOWNS = 6000  # of Newton steps, whose matrix has so many rows
_SWEEPS = 10  # in the place of a step, where there are more
_LITTLE = 1e-12  # a step that lowers the objective by less, in proportion, is the last


def contract(factors: Factors, field: int) -> Tensor:
    """⟨T, ·⟩ with the two factors other than that of number `field`, which has its shape."""
    e, f, d = factors
    return (d @ f.mT, e.mT @ d, e @ f)[field]


def gram(factors: Factors, field: int) -> Tensor:
    """The Gram matrix (…, r, r) of the terms of the two other factors."""
    one, other = (factor.flatten(-2) for number, factor in enumerate(factors) if number != field)
    return (one @ one.mT) * (other @ other.mT)


def error(factors: Factors) -> Tensor:
    """‖T − Σ_k E_k⊗F_k⊗D_k‖²/pqs of each batch element, from Gram matrices: to about 1e-13."""
    p, q, s = _tile(factors)
    d = factors[2].flatten(-2)
    norm = (gram(factors, 2) * (d @ d.mT)).sum(dim=(-2, -1))
    inner = (contract(factors, 2) * factors[2]).sum(dim=(-3, -2, -1))
    return 1.0 + (norm - 2.0 * inner) / (p * q * s)


def objective(factors: Factors, ridge: float) -> Tensor:
    """pqs·error + ridge·(‖E‖² + ‖F‖² + ‖D‖²)."""
    sizes = sum(factor.square().sum(dim=(-3, -2, -1)) for factor in factors)
    return math.prod(_tile(factors)) * error(factors) + ridge * sizes


def alternate(factors: Factors, ridge: float, sweeps: int) -> Factors:
    """`sweeps` times the best E for F and D, the best F for E and D, the best D for E and F."""
    parts = list(factors)
    for _ in range(sweeps):
        for field in range(3):
            now = (parts[0], parts[1], parts[2])
            matrix = gram(now, field)
            matrix.diagonal(dim1=-2, dim2=-1).add_(ridge)
            target = contract(now, field)
            solved = torch.cholesky_solve(target.flatten(-2), torch.linalg.cholesky_ex(matrix)[0])
            parts[field] = solved.view(target.shape)
    return parts[0], parts[1], parts[2]


def level(factors: Factors) -> Factors:
    """The same terms with three factors of one norm each: the least ‖E‖² + ‖F‖² + ‖D‖² by scaling."""
    norms = torch.stack([factor.flatten(-2).norm(dim=-1) for factor in factors])
    mean = norms.log().mean(dim=0).exp()
    scales = torch.where((norms > 0).all(dim=0), mean / norms, torch.ones_like(norms))
    e, f, d = (factor * scale[..., None, None] for factor, scale in zip(factors, scales, strict=True))
    return e, f, d


def polish(factors: Factors, ridge: float, steps: int) -> Factors:
    """Newton steps from `factors` (no batch), damped as Levenberg and Marquardt do, until one lowers the objective by little.

    (With JᵀJ instead of the Hessian, as for least squares that fit, it would crawl: what is left of the tensor is not small.)
    Where the Hessian is too large for that, alternating sweeps go on.
    """
    if sum(factor.numel() for factor in factors) > _MOST_UNKNOWNS:
        return alternate(factors, ridge, steps * _SWEEPS)
    damping, now = _DAMPING, float(objective(factors, ridge))
    for _ in range(steps):
        half, gradient = _second_order(factors, ridge)
        while damping < _MOST_DAMPING:
            matrix = half.clone()
            matrix.diagonal().add_(ridge + damping)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if not failed:
                step = torch.cholesky_solve(gradient[:, None], factor).squeeze(1)
                tried = _moved(factors, step)
                reached = float(objective(tried, ridge))
                if reached < now:
                    break
            damping *= 4
        else:
            return factors
        gained, factors, now, damping = now - reached, tried, reached, damping / 3
        if gained <= _LITTLE * max(now, 1e-12):
            break
    return factors


def _second_order(factors: Factors, ridge: float) -> tuple[Tensor, Tensor]:
    """½ of the objective's Hessian without the ridge (entries of E, F and D in a row), and −½ of its gradient."""
    flat = [factor.flatten(1) for factor in factors]
    r, sizes = len(flat[0]), [part.shape[1] for part in flat]
    grams = [part @ part.mT for part in flat]
    every = torch.arange(r, device="cpu")
    blocks: list[list[Tensor]] = [[flat[0]] * 3 for _ in range(3)]
    for one in range(3):
        own = torch.einsum("kl,ab->kalb", gram(factors, one), torch.eye(sizes[one], dtype=torch.float64, device="cpu"))
        blocks[one][one] = own.reshape(r * sizes[one], r * sizes[one])
        for other in range(one + 1, 3):
            third = 3 - one - other
            # ∂/∂A_k[a] · ∂/∂B_l[b] = ⟨C_k, C_l⟩ A_l[a] B_k[b], and for k = l the residual contracted with C_k.
            across = torch.einsum("kl,la,kb->kalb", grams[third], flat[one], flat[other])
            residual = torch.einsum("kl,la,lb->kab", grams[third], flat[one], flat[other])
            across[every, :, every] += residual - _of_target(factors, third).reshape(residual.shape)
            across = across.reshape(r * sizes[one], r * sizes[other])
            blocks[one][other], blocks[other][one] = across, across.mT
    half = torch.cat([torch.cat(row, dim=1) for row in blocks])
    gradient = [
        contract(factors, field).flatten(1) - gram(factors, field) @ flat[field] - ridge * flat[field]
        for field in range(3)
    ]
    return half, torch.cat([part.flatten() for part in gradient])


def _of_target(factors: Factors, field: int) -> Tensor:
    """T contracted with each term of one factor: entries of the first of the two others by those of the second."""
    p, q, s = _tile(factors)
    equal = [torch.eye(side, dtype=torch.float64, device="cpu") for side in (q, p, s)]
    if field == 2:  # E's i, j by F's j′, m
        return torch.einsum("kim,jn->kijnm", factors[2], equal[0])
    if field == 1:  # E's i, j by D's i′, m
        return torch.einsum("kjm,in->kijnm", factors[1], equal[1])
    return torch.einsum("kij,mn->kjmin", factors[0], equal[2])  # F's j, m by D's i, m′


def _moved(factors: Factors, step: Tensor) -> Factors:
    parts = step.split([factor.numel() for factor in factors])
    e, f, d = (factor + part.view(factor.shape) for factor, part in zip(factors, parts, strict=True))
    return e, f, d


def _tile(factors: Factors) -> tuple[int, int, int]:
    return factors[0].shape[-2], factors[0].shape[-1], factors[1].shape[-1]
