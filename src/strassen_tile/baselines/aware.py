"""Low rank for the rows that a weight is fed: of all A B of a rank the one of least ‖X w − X A B‖."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-10  # of the largest direction of rows: smaller ones are taken as that large


def second_moment(rows: Tensor | None, k: int) -> Tensor:
    """Σ xᵀx over rows (…, K), in proportion; the identity without them."""
    if rows is None:
        return torch.eye(k, dtype=torch.float64)
    flat = rows.detach().double().reshape(-1, k).cpu()
    return flat.mT @ flat / max(1, len(flat))


def aware_svd(w: Tensor, moment: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """A (K, d) and B (d, M) for w (K, M) and the second moment of its rows.

    ‖X(w − A B)‖ is that of root (w − A B), root² the second moment: the truncated SVD of root·w, taken back.
    """
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(_LEAST * max([1e-290, *values[-1:].tolist()]))
    root = (vectors * values.sqrt()) @ vectors.mT
    back = (vectors * values.rsqrt()) @ vectors.mT
    u, sigma, vt = torch.linalg.svd(root @ w.cpu(), full_matrices=False)
    return back @ u[:, :d], sigma[:d, None] * vt[:d]
