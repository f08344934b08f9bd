"""Nothing is timed before it has been compared with its definition in float64."""

from __future__ import annotations

import torch

from strassen_tile.errors import STLError
from strassen_tile.experiments.candidates import Candidate

FULLY_VERIFIED = 4096**3  # N·K·M


class VerificationError(STLError):
    """An implementation disagrees with the float64 reference; it is not timed."""


def verified(candidate: Candidate, n: int, name: str) -> float:
    """The error of `verify`, after its gradients have been looked at too if they are to be timed."""
    error = verify(candidate, n)
    if name == "step":
        verify_gradients(candidate, n)
    return error


def verify(candidate: Candidate, n: int) -> float:
    """Relative error against the float64 reference, on the first, a middle and the last rows; what is wrong raises."""
    step = candidate.height
    height = max(step, 64 // step * step)
    with torch.no_grad():
        y = candidate.forward()
        errors = []
        for start in {0, max(0, n - height) // 2 // step * step, max(0, n - height) // step * step}:
            rows = slice(start, n if start + height + step > n else start + height)
            expected = candidate.exact(rows)
            errors.append(float((y[rows].double() - expected).norm() / expected.norm()))
    error = max(errors)
    if not error < candidate.allowed:
        raise VerificationError(
            f"{candidate.method} r={candidate.rank} differs from the float64 reference by {error:.3g}, more than "
            f"{candidate.allowed:.3g}: it is not timed"
        )
    return error


def verify_gradients(candidate: Candidate, n: int) -> None:
    """Gradients in every leaf, against those of the definition in float64; what is wrong raises.

    Of all rows, or beyond 4096³, where the reference would take minutes, of a random weighting of the first and the last.
    """
    for leaf in candidate.leaves:
        leaf.requires_grad_(True)
    y = candidate.forward()
    weights = torch.randn_like(y)
    height = max(candidate.height, 64 // candidate.height * candidate.height)
    last = max(0, n - height) // candidate.height * candidate.height
    if n * y.shape[1] * candidate.leaves[0].shape[1] <= FULLY_VERIFIED or last <= height:
        parts = [slice(0, n)]
    else:
        parts = [slice(0, height), slice(last, n)]
        weights[height:last] = 0
    found = torch.autograd.grad(y, candidate.leaves, weights)
    exact = torch.stack([(candidate.exact(rows) * weights[rows].double()).sum() for rows in parts])
    expected = torch.autograd.grad(exact.sum(), candidate.leaves)
    for index, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        error = float((got.double() - wanted.double()).norm() / wanted.double().norm())
        if not error < 8 * candidate.allowed:
            raise VerificationError(
                f"{candidate.method} r={candidate.rank}: gradient {index} differs from the float64 reference by {error:.3g}: "
                "it is not timed"
            )
