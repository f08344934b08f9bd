"""What is changed to see what depends on it: places of the inputs, parameters, rows of a tile; switches made smooth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from strassen_tile.convert.places import Place, with_leaves
from strassen_tile.convert.running import leaves

STRENGTHS = (1.0, 0.1, 0.0)  # of the noise on parameters: tried in turn until no number overflows
_NOISE = (1.0, 5.0, 0.3)  # on inputs: what a maximum or a gate hides from one, it shows to another
_SWITCHES = {
    F.relu, torch.relu, Tensor.relu, F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid, F.threshold, torch.threshold,
}  # fmt: skip
_SWITCHES_IN_PLACE = {torch.relu_, Tensor.relu_, F.relu_, F.hardtanh_}


class Mixing(NamedTuple):
    """How the rows of a layer would mix: all those of a tile, or (causal) only earlier ones into later ones; and, before they
    are cut into tiles, so many neighbours on either side into each.
    """

    rows: int
    causal: bool
    before: int = 0
    after: int = 0

    @property
    def offsets(self) -> range:
        """How far from a row the neighbours are that mix into it, itself included."""
        return range(-self.before, self.after + 1)


def change(example_inputs: object, place: Place, seed: int) -> object:
    """The inputs with that place altered: floats by noise of the tensor's own scale, integers to others that occur."""
    tensors = [t for _, t in leaves(example_inputs)]
    before = tensors[place.leaf]
    after = before.detach().clone()
    after[place.selection] = _other(before, seed)[place.selection]
    tensors[place.leaf] = after
    return with_leaves(example_inputs, tensors)


def _other(tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    if tensor.dtype == torch.bool:
        return ~tensor
    if tensor.is_complex():
        return torch.view_as_complex(_other(torch.view_as_real(tensor.resolve_conj()), seed).contiguous())
    if tensor.is_floating_point():
        finite = tensor[tensor.isfinite()].double()
        scale = float(finite.std()) if finite.numel() > 1 else 0.0
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
        return (tensor + (noise * (scale or 1.0) * _NOISE[seed % 3]).to(tensor)).to(tensor.dtype)
    values = tensor.unique()
    if len(values) == 1:  # one less is as valid as any, and zero has only its successor
        return tensor - 1 if values[0] > 0 else tensor + 1
    by = 1 + seed % (len(values) - 1)
    others: Tensor = values[(torch.searchsorted(values, tensor.contiguous()) + by) % len(values)]
    return others


@torch.no_grad()
def perturb_parameters(model: nn.Module, originals: Mapping[str, Tensor], strength: float, seed: int) -> None:
    """Set every parameter to its original plus noise of its own scale, or of a usual start's where that is larger."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for name, parameter in model.named_parameters():
        before = originals[name]
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        usual = before.shape[-1] ** -0.5 if before.ndim > 1 else 1.0
        scale = strength * max(0.5 * float(before.square().mean().sqrt()), 0.3 * usual)
        noise = torch.empty(before.shape, dtype=torch.float32, device="cpu").uniform_(-1.73, 1.73, generator=generator)
        parameter.copy_(noise.to(before).mul_(scale).add_(before))


def mix_rows(x: Tensor, mixing: Mixing) -> Tensor:
    """X (…, N, K) with neighbours, and the rows of each tile, mixed by fixed generic numbers, which show which rows meet."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    if len(mixing.offsets) > 1:
        weights = (torch.rand(len(mixing.offsets), generator=generator, dtype=torch.float64, device="cpu") + 0.5).to(x)
        x = torch.stack([w * shifted(x, by) for w, by in zip(weights, mixing.offsets, strict=True)]).sum(dim=0)
    sides = mixing.rows, mixing.rows
    matrix = torch.rand(sides, generator=generator, dtype=torch.float64, device="cpu") + 0.5
    matrix = (matrix.tril() if mixing.causal else matrix).to(x)
    parts = [matrix[: tile.shape[-2], : tile.shape[-2]] @ tile for tile in x.split(mixing.rows, dim=-2)]
    return torch.cat(parts, dim=-2) if parts else x


def shifted(x: Tensor, by: int) -> Tensor:
    """X (…, N, K) with row n + `by` in the place of row n, and zeros where there is none."""
    n = x.shape[-2]
    return F.pad(x, (0, 0, max(-by, 0), max(by, 0)))[..., max(by, 0) : max(by, 0) + n, :]


class SmoothSwitches(TorchFunctionMode):
    """ReLU and its kin replaced by SiLU: what they let through of some inputs, it lets through of all."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SWITCHES:
            return F.silu(args[0] if args else kwargs["input"])
        if func in _SWITCHES_IN_PLACE:
            return args[0].copy_(F.silu(args[0]))
        return func(*args, **kwargs)
