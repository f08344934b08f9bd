"""What can be said of three factors E (r, p, q), F (r, q, s), D (r, p, s) as tensors: their error, and their symmetries.

(AXB⁻¹)(BWC⁻¹) = A(XW)C⁻¹: with invertible A (p×p), B (q×q) and C (s×s) the factors E′ = AᵀEB⁻ᵀ, F′ = BᵀFC⁻ᵀ, D′ = A⁻¹DC have
the same rank and are exact if E, F, D are; how they round differs. (The error of an approximation does not stay the same.)
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, Tensor]
EXPLICIT_UP_TO = 2**24  # entries of the tensor; the residual of a larger one comes from Gram matrices
_STEPS = 300
_NOISE = 0.3  # of a start other than the factors themselves, which may be a saddle


def squared_error(factors: Factors) -> float:
    """‖T − Σ_k E_k⊗F_k⊗D_k‖²/pqs, T the ⟨p,q,s⟩ matrix-multiplication tensor, in float64."""
    encoder, weight_encoder, decoder = factors
    (r, p, q), s = encoder.shape, decoder.shape[2]
    if (p * q * s) ** 2 > EXPLICIT_UP_TO:
        grams = [factor.flatten(1) @ factor.flatten(1).mT for factor in factors]
        inner = torch.einsum("kab,kbc,kac->", encoder, weight_encoder, decoder)
        error = float(1.0 + ((grams[0] * grams[1] * grams[2]).sum() - 2.0 * inner) / (p * q * s))
        error = max(error, 1.0 - r / max(p * q, q * s, p * s))  # no fewer products can do better
        if not error < 1e-9:  # below, the terms cancel to rounding noise: only the residual itself tells
            return error
    total, column = 0.0, torch.arange(s, device="cpu")
    for i, j in product(range(p), range(q)):
        terms = encoder[:, i, j, None] * weight_encoder.flatten(1)
        residual = (terms.mT @ decoder.flatten(1)).view(q, s, p, s)
        residual[j, column, i, column] -= 1.0
        total += float(residual.square().sum())
    return total / (p * q * s)


def moved(factors: Factors, a: Tensor, b: Tensor, c: Tensor) -> Factors:
    """The factors E (r, p, q), F (r, q, s), D (r, p, s) under A, B and C."""
    e, f, d = factors
    return a.mT @ e @ torch.linalg.inv(b).mT, b.mT @ f @ torch.linalg.inv(c).mT, torch.linalg.inv(a) @ d @ c


def least_kappa(factors: Factors, *, starts: int = 4, seed: int = 0) -> Factors:
    """The equivalent factors of the least Σ_k ‖E_k‖²‖F_k‖²‖D_k‖² found, by L-BFGS over A, B and C.

    Args:
        factors: in float64.
        starts: that many, the first at the factors themselves.
        seed: of the others.
    """
    generator = torch.Generator().manual_seed(seed)
    best, least = factors, float(_size(factors))
    for start in range(starts):
        sides = []
        for side in (factors[0].shape[1], factors[0].shape[2], factors[2].shape[2]):
            noise = torch.randn(side, side, generator=generator, dtype=torch.float64, device="cpu")
            # A little of it at the first start, too: a symmetric algorithm may be a saddle.
            sides.append(torch.eye(side, dtype=torch.float64, device="cpu") + (_NOISE if start else 1e-3) * noise)
        found = _descend(factors, sides)
        if (size := float(_size(found))) < least:
            best, least = found, size
    return best


def _size(factors: Factors) -> Tensor:
    e, f, d = (factor.square().sum(dim=(1, 2)) for factor in factors)
    return (e * f * d).sum()


def _descend(factors: Factors, sides: list[Tensor]) -> Factors:
    with torch.inference_mode(False), torch.enable_grad():
        e, f, d = (factor.clone() for factor in factors)  # tensors of inference mode learn nothing
        factors = e, f, d
        sides = [side.clone().requires_grad_() for side in sides]
        optimizer = torch.optim.LBFGS(
            sides,
            max_iter=_STEPS,
            history_size=20,
            tolerance_grad=1e-10,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = _size(moved(factors, *sides)).log()
            loss.backward()
            return loss

        try:
            optimizer.step(closure)
        except RuntimeError:  # a step to where a matrix has no inverse: this start is given up
            return factors
    e, f, d = moved(factors, *(side.detach() for side in sides))
    return e, f, d
