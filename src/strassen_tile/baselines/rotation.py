"""A control for optimisers that look at each number by itself: the dense layer, trained in another orthogonal basis.

Adam is not invariant to rotation, SGD is. An STL layer trains a weight in a basis of its own; what a dense layer gains by being
trained in a random rotation is no merit of the operator.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strassen_tile import cost


class RotatedLinear(nn.Module):
    """y = x Wᵀ + bias with W = Q_out V Q_in: `weight` is V (M, K), trained; `rotation_out` (M, M) and `rotation_in` (K, K) are
    random orthogonal matrices that stay as they are.

    For training only: W is made anew in every call, at 2MK(K + M) FLOPs, which `cost` leaves out, since what is asked of this
    layer is how it learns, and what has been learned is a dense weight.

    Args:
        linear: where it starts: W is its weight, but for rounding. The rotations are drawn from torch's global generator.
    """

    rotation_in: Tensor
    rotation_out: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        with torch.no_grad():
            rotation_in, rotation_out = (_orthogonal(side, linear.weight) for side in linear.weight.shape[::-1])
            start = (rotation_out.mT @ linear.weight.double() @ rotation_in.mT).to(linear.weight.dtype)
        self.weight, self.bias = nn.Parameter(start), linear.bias
        self.register_buffer("rotation_in", rotation_in.to(linear.weight.dtype))
        self.register_buffer("rotation_out", rotation_out.to(linear.weight.dtype))
        self.train(linear.training)

    def dense_weight(self) -> Tensor:
        """W (M, K), at the precision of the parameters: under autocast too, where dense rounds W only once."""
        device = self.weight.device.type  # autocast knows no "meta" device
        with contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            return self.rotation_out @ self.weight @ self.rotation_in

    def forward(self, input: Tensor) -> Tensor:
        """(…, K) → (…, M)."""
        return F.linear(input, self.dense_weight(), self.bias)

    def factor_fan_ins(self) -> dict[str, int]:
        """K of the weight: it takes the rate that the dense one would."""
        return {"weight": self.in_features}

    def cost(self, rows: int, batch: int = 1) -> cost.Cost:
        """That of the dense layer, which this is once it is trained."""
        return cost.dense(rows * batch, self.in_features, self.out_features, itemsize=self.weight.element_size())

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.in_features}, {self.out_features}"


def _orthogonal(side: int, like: Tensor) -> Tensor:
    """A random orthogonal matrix (side, side) in float64, on the device of `like`."""
    made = torch.empty(side, side, dtype=torch.float64, device=like.device)
    return nn.init.orthogonal_(made) if side else made
