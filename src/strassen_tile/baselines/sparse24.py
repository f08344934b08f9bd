"""2:4 structured sparsity: of every four consecutive weights of an output row, the two that matter least are zero.

Hardware multiplies such matrices at half the FLOPs. Here the weight is masked in software, so quality is measured;
speed is measured by `strassen-tile bench` where the hardware has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from strassen_tile import cost
from strassen_tile.errors import ShapeError, shape_text

Criterion = Literal["magnitude", "wanda", "refit"]
_ENOUGH = {torch.float32: 1e-5, torch.float64: 1e-11}  # what a fit may leave of what it solves for
SR_STE_DECAY = 2e-4  # λ_w of Zhou et al. 2021 (arXiv 2102.04010), for AdamW and SGD alike


def mask_24(weight: Tensor, inputs: Tensor | None = None) -> Tensor:
    """True for the two of every four consecutive input weights to keep: shape of `weight` (M, K), K a multiple of 4.

    The score is |W_mk|, or |W_mk|·‖X_k‖₂ given calibration `inputs` (…, K): Wanda (Sun et al. 2024, arXiv 2306.11695).

    Raises:
        ShapeError: K is not a multiple of 4, or inputs have other features.
    """
    m, k = weight.shape
    if k % 4:
        raise ShapeError(f"2:4 sparsity needs in_features to be a multiple of 4; got {k}")
    score = weight.detach().abs()
    if inputs is not None:
        if inputs.shape[-1] != k:
            raise ShapeError(f"inputs must be (…, {k}); got {shape_text(inputs.shape)}")
        score = score * inputs.detach().reshape(-1, k).norm(dim=0).to(score.dtype)
    groups = score.view(m, k // 4, 4)
    keep = groups.topk(2, dim=-1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, keep, True).view(m, k)


def refit(weight: Tensor, mask: Tensor, inputs: Tensor, *, damping: float = 0.1) -> Tensor:
    """The weights kept, fitted so that products with `inputs` (…, K) are as near as can be to those of `weight` (M, K).

    Args:
        weight, mask: (M, K); as many weights are kept in each row.
        inputs: calibration rows.
        damping: added to their second moments, as a fraction of the mean of its diagonal.
            It keeps a fit to few rows from learning them by heart.

    Raises:
        ShapeError: inputs hold NaN or infinity.
    """
    k = weight.shape[1]
    rows = inputs.detach().reshape(-1, k).double()
    moment = rows.mT @ rows
    if not bool(moment.isfinite().all()):
        raise ShapeError("inputs hold NaN, infinity, or numbers whose squares overflow float64: no weight fits them")
    moment.diagonal().add_(damping * moment.diagonal().mean())
    energy = moment.diagonal()
    unit = torch.where(energy > 0, energy, 1.0).rsqrt()  # inputs of one size: conditions the equations
    pruned = weight.detach().double() * mask
    wanted = ((weight.detach().double() - pruned) @ moment) * unit * mask
    size = wanted.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(wanted.dtype).tiny)
    single = torch.promote_types(weight.dtype, torch.float32)
    change = _masked_solution((moment * unit * unit[:, None]).to(single), (wanted / size).to(single), mask.to(single))
    return (pruned + change.double() * size * unit).to(weight.dtype)


def _masked_solution(matrix: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """In each row z of (M, K), zero outside the mask, what solves z · matrix = wanted inside it: conjugate gradients for all
    rows at once, since a factorisation for each row takes many times as long.
    """
    found, rest, towards = torch.zeros_like(wanted), wanted, wanted
    left = rest.square().sum(dim=1, keepdim=True)
    enough = _ENOUGH[wanted.dtype] ** 2 * left
    for _ in range(matrix.shape[0]):
        going = left > enough
        if not bool(going.any()):
            break
        across = (towards @ matrix) * mask
        bent = (towards * across).sum(dim=1, keepdim=True)
        step = torch.where(going & (bent > 0), left / bent, 0.0)
        found = found + step * towards
        rest = rest - step * across
        before, left = left, rest.square().sum(dim=1, keepdim=True)
        towards = rest + torch.where(going, left / before, 0.0) * towards
    return found


class _SparseRefined(Function):
    """SR-STE: the masked weight forward; backward the gradient goes straight through to every weight, and the pruned
    ones are pulled to zero by λ·w, so that the mask settles (Zhou et al. 2021, eq. 7).
    """

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        return weight * mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, mask, ctx.decay = inputs
        ctx.save_for_backward(weight, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        return grad + ctx.decay * weight * ~mask, None, None


class Sparse24Linear(nn.Linear):
    """`nn.Linear` whose weight is used through a 2:4 mask.

    mask "dynamic" follows the magnitudes at every step (SR-STE training from scratch); "fixed" was chosen once
    (`from_linear` with a criterion: one-shot pruning), the weights left are trained and the others stay zero.
    """

    fixed_mask: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        decay: float = SR_STE_DECAY,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.decay = decay
        self.register_buffer("fixed_mask", None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, one_shot: Criterion | None = None, inputs: Tensor | None = None
    ) -> Sparse24Linear:
        """Take over the parameters of `linear`; with `one_shot`, prune now and keep the mask.

        Args:
            linear: its parameters become the layer's, but for a weight that is pruned.
            one_shot: "magnitude", "wanda" or "refit": wanda's mask, and the weights left fitted by least squares.
            inputs: calibration rows (…, K), which the last two need.

        Raises:
            ShapeError: K is no multiple of 4, or inputs are missing or have other features.
        """
        if one_shot in ("wanda", "refit") and inputs is None:
            raise ShapeError(f"one_shot={one_shot!r} weighs weights by their inputs; pass calibration inputs (…, K)")
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, linear.bias is not None, dtype=linear.weight.dtype)
        layer.weight, layer.bias = linear.weight, linear.bias
        if one_shot is not None:
            layer.fixed_mask = mask = mask_24(linear.weight, None if one_shot == "magnitude" else inputs)
            # Zeros, not only masked ones: whoever reads the weight, as a saved one, finds what the layer computes with.
            pruned = linear.weight.detach() * mask
            if one_shot == "refit" and inputs is not None:
                pruned = refit(linear.weight, mask, inputs)
            layer.weight = nn.Parameter(pruned, requires_grad=linear.weight.requires_grad)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """A plain layer with the weight as it is used: zeros where the mask has them."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        mask = mask_24(self.weight) if self.fixed_mask is None else self.fixed_mask
        linear.weight = nn.Parameter(self.weight.detach() * mask, self.weight.requires_grad)
        linear.bias = self.bias
        return linear.train(self.training)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        """As of any module; a layer without a mask takes that of a state that has one, and prunes by it from then on."""
        mask = state_dict.get(prefix + "fixed_mask")
        fits = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == self.weight.shape
        if self.fixed_mask is None and fits:
            self.fixed_mask = torch.ones_like(self.weight, dtype=torch.bool)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def forward(self, input: Tensor) -> Tensor:
        """(…, K) → (…, M) with the masked weight."""
        if self.fixed_mask is not None:
            return F.linear(input, self.weight * self.fixed_mask, self.bias)
        weight = _SparseRefined.apply(self.weight, mask_24(self.weight), self.decay)  # type: ignore[no-untyped-call]
        return F.linear(input, weight, self.bias)

    def cost(self, rows: int, batch: int = 1) -> cost.Cost:
        """Half the dense FLOPs and parameters, as the hardware counts them (the positions, 2 bits each, are left out)."""
        full = cost.dense(rows * batch, self.in_features, self.out_features, itemsize=self.weight.element_size())
        saved = full.params // 2
        traffic = full.bytes - saved * self.weight.element_size()
        return replace(
            full, flops=full.flops // 2, product_flops=full.flops // 2, bytes=traffic, params=full.params - saved
        )
