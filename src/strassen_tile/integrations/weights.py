"""The weights of a finished run, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from strassen_tile.files import write_bytes

WEIGHTS = "weights.safetensors"  # in the folder of a run that is still at work


def save_weights(path: str | Path, state: Mapping[str, Tensor], about: Mapping[str, object] | None = None) -> None:
    """Write a state dict to `path` atomically, to be read by `models.load_checkpoint` or safetensors.

    Args:
        path: of the file.
        state: name to tensor, on any device; tensors that share memory are written once each.
        about: what the file's metadata say, each value as JSON: method, variant, seed, recipe.

    Raises:
        OSError: the file cannot be written; what was there before is as it was.
    """
    from safetensors.torch import save  # late: the commands that train nothing do without it

    # Copies: safetensors refuses tensors that share memory, and on a CPU those of the model are the model's own.
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
    said = {key: json.dumps(value, sort_keys=True) for key, value in (about or {}).items()}
    write_bytes(path, save(tensors, metadata=said))
