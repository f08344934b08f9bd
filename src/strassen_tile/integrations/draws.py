"""Random draws of a data set that depend on seed, epoch and batch alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset


class SeededDraws(Dataset[Any]):
    """A data set whose random draws (augmentation) are a batch's own: they depend on seed, epoch and the batch's indices.

    Else they would come from the state of the process that happens to load the batch, and depend on how many there are.

    Args:
        data: draws from torch's global generator and from nothing else.
        seed: of the run.
    """

    def __init__(self, data: Dataset[Any], seed: int) -> None:
        self.data, self.seed, self.epoch = data, seed, 0

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Called as an epoch begins, before the loader's workers start."""
        self.epoch = epoch
        if (told := getattr(self.data, "set_epoch", None)) is not None:
            told(epoch)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """The samples of a batch."""
        generator = torch.default_generator  # the CPU's alone: on GPUs, dropout goes on drawing where it was
        before = generator.get_state()
        try:
            # Batches of an epoch share no index, so that the first one stands for all.
            batch = f"{self.seed} {self.epoch} {int(indices[0])}".encode()
            generator.manual_seed(int.from_bytes(hashlib.sha256(batch).digest()[:4]))
            fetch = getattr(self.data, "__getitems__", None)
            return fetch(indices) if fetch is not None else [self.data[index] for index in indices]
        finally:
            generator.set_state(before)
