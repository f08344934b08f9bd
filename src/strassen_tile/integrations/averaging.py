"""A running average of the weights, which is tested in their place, and what Trainer is told of it.

The average is kept in buffers beside the network, so that Trainer's checkpoints hold it and give it back to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback


class Average(nn.Module):
    """Buffers that hold an exponential moving average of a network's trainable parameters, by their order.

    Args:
        model: of which they are; the average starts as they are now.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for index, parameter in enumerate(_trainable(model)):
            self.register_buffer(str(index), parameter.detach().clone())


class Averaging(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Updates the average after every step, and has it in the network's place while that is tested and at the end.

    Args:
        model: the network.
        average: of its parameters.
        decay: of the average, a step, from 0 to below 1. Early on, after n steps, it is at most (1 + n)/(10 + n): else the
            random start would be most of the average for long.
    """

    def __init__(self, model: nn.Module, average: Average, decay: float) -> None:
        self.model, self.average, self.decay = model, average, decay
        self.trained: list[Tensor] | None = None  # the weights, while the average is in their place

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the average towards the weights."""
        steps = state.global_step
        update = get_ema_multi_avg_fn(min(self.decay, (1 + steps) / (10 + steps)))
        with torch.no_grad():
            update(list(self.average.buffers()), [_whole(one) for one in _trainable(self.model)], None)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Test the average. Trainer evaluates next, and only then writes its checkpoint."""
        self.trained = [one.detach().clone() for one in _trainable(self.model)]
        self._set(list(self.average.buffers()), **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on with the weights."""
        if self.trained is not None:
            self._set(self.trained, **kwargs)
            self.trained = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the average in the network: it is what was tested."""
        self._set(list(self.average.buffers()), **kwargs)

    def _set(self, values: list[Tensor], model: nn.Module, **kwargs: Any) -> None:
        # After an evaluation FSDP still has the outermost parameters gathered, in tensors that it will throw away.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        with torch.no_grad():
            for parameter, value in zip(_trainable(self.model), values, strict=True):
                parameter.copy_(_laid_out(value, parameter))


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _whole(parameter: Tensor) -> Tensor:
    """All of it, where FSDP has shards of it."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """The part of `value` that this process has of `parameter`."""
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
