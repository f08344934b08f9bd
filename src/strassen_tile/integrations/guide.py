"""Training that the dense model guides: a converted layer gives a share of what the dense one would, which falls to nothing.

Self-guided training of Wei et al. 2024 (arXiv 2406.16450): y = α·dense(x) + (1 − α)·layer(x), α on a cosine from 1 to 0.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback


class Guide(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Mixes dense outputs into those of the layers that replaced them, in training mode alone.

    Args:
        model: converted.
        dense: the model it was; its layers are called with what the converted ones are fed, and are not trained.
        fraction: of the steps after which nothing is mixed in any more.
    """

    def __init__(self, model: nn.Module, dense: nn.Module, fraction: float) -> None:
        self.fraction, self.share = fraction, 0.0
        here = dict(model.named_modules())
        self._handles = [
            here[name].register_forward_hook(partial(self._mix, one), with_kwargs=True)
            for name, one in dense.named_modules()
            if isinstance(one, nn.Linear) and name in here and type(here[name]) is not nn.Linear
        ]

    def _mix(
        self, one: nn.Linear, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        if not (module.training and self.share):
            return output
        x = args[0] if args else kwargs["input"]
        weight = one.weight.detach().to(x)
        bias = None if one.bias is None else one.bias.detach().to(x)
        return torch.lerp(output, nn.functional.linear(x, weight, bias).to(output.dtype), self.share)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The share of this step, by its number: a run that goes on has what it would have had."""
        at = state.global_step / max(1.0, self.fraction * state.max_steps)
        self.share = 0.5 * (1 + math.cos(math.pi * at)) if at < 1 else 0.0

    def remove(self) -> None:
        """Leave the layers as they are."""
        for handle in self._handles:
            handle.remove()
