"""What fitting a layer by least squares is told of inputs and outputs, and the factors it fits.

All that inputs and outputs say is in their second moments, so the rows are summed up once. In maths, with flat tiles of A = p·q
and B = p·s numbers: X̂_tkJ = ⟨E_Jk, X_tJ⟩, Y_tL ≈ Σ_k D_Lk Σ_J X̂_tkJ Ŵ_kJL. All in float64.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Moments(NamedTuple):
    """Σ_t X_tJ ⊗ X_tJ' (J, A, J, A), Σ_t X_tJ ⊗ Y_tL (J, A, L, B), and Σ ‖Y‖²."""

    inputs: Tensor
    across: Tensor
    energy: float

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Moments:
        """Those of tiles x (T, J, p, q) and y (T, L, p, s), which is zero beyond the edge."""
        of_x, of_y = ((part.shape[1], part.shape[2] * part.shape[3]) for part in (x, y))
        x, y = x.flatten(1), y.flatten(1)
        return cls((x.mT @ x).view(*of_x, *of_x), (x.mT @ y).view(*of_x, *of_y), float(y.square().sum()))


class Factors(NamedTuple):
    """E of each tile, Ŵ, D of each tile, and what of an output tile lies inside the edge: 1 or 0.

    Where encoders are shared those of all tiles are the same, and so are decoders, but for what is cut off them.
    """

    e: Tensor  # (J, r, A)
    w: Tensor  # (r, J, L)
    d: Tensor  # (L, r, B), zero beyond the edge
    inside: Tensor  # (L, B)
    shared: bool
