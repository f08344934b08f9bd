"""Training that comes to numbers that are not finite ends, in all processes at the same step."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor, nn
from transformers import TrainerCallback

from strassen_tile.errors import DivergedError

_EVERY = 20  # steps between looks: to look is to wait for the GPU, and for the other processes
_NONE = -1


class Divergence(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Notes losses as they come, and looks every few steps, and before an epoch is evaluated, whether all were finite.

    At the end of an epoch the weights are looked at too: a last step can spoil them, and no checkpoint of such weights
    may be written. A process whose losses are finite ends with the one whose are not.

    Args:
        model: that is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.at: Tensor | None = None  # the first step whose loss was not finite, on the device

    def note(self, loss: Tensor, step: int) -> None:
        """Keep in mind, without waiting for the device, whether the loss () of `step` (from 1) is finite."""
        at = torch.full((), _NONE, device=loss.device) if self.at is None else self.at
        self.at = torch.where((at == _NONE) & ~torch.isfinite(loss.detach()), step, at)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing has been noted."""
        self.at = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look, every few steps. Raises DivergedError."""
        if self.at is not None and state.global_step % _EVERY == 0:
            _stop_after(self.at, args, state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the weights as well. Raises DivergedError."""
        if self.at is not None:
            spoilt = (self.at == _NONE) & ~_finite(self.model).to(self.at.device)
            _stop_after(torch.where(spoilt, state.global_step, self.at), args, state)


def _finite(model: nn.Module) -> Tensor:
    """Whether all parameters are finite, of those sharded by FSDP the part that is here; bool ()."""
    # Buffers may hold infinities by intent, as masks of attention do.
    local = (getattr(one, "to_local", lambda one=one: one)() for one in model.parameters())
    return torch.stack([torch.isfinite(one.detach()).all() for one in local]).all()


def _stop_after(at: Tensor, args: Any, state: Any) -> None:
    """Raise where any process has noted a step: the earliest."""
    steps = [step for step in gather(at.reshape(1)).tolist() if step != _NONE]
    if steps:
        step = min(steps)
        epoch = -(-step * round(args.num_train_epochs) // state.max_steps)
        raise DivergedError(
            f"training diverged in epoch {epoch}, at step {step}: its loss or weights are not finite",
            epoch=epoch,
            step=step,
        )
