"""Tokens in pieces of one length: drawn at random to train on, one after the other to evaluate on."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Windows(Dataset[dict[str, Tensor]]):
    """Pieces of `context` tokens and the tokens that follow each, from places drawn at random for every seed and epoch.

    Drawn all at once: what an index stands for depends on no process that loads it, nor on who loads what.

    Args:
        tokens: (n,).
        context: tokens a piece.
        samples: how many there are in an epoch.
        seed: of the run.
    """

    def __init__(self, tokens: Tensor, context: int, samples: int, seed: int) -> None:
        self.tokens, self.context, self.samples, self.seed = tokens, context, samples, seed
        self.epoch: int | None = None
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the places of an epoch, once: it is told by accelerate and by the trainer, which several processes need."""
        if epoch == self.epoch:
            return
        self.epoch = epoch
        digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4]))
        self.starts = torch.randint(len(self.tokens) - self.context, (self.samples,), generator=generator)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return _piece(self.tokens, int(self.starts[index]), self.context)


class Pieces(Dataset[dict[str, Tensor]]):
    """Pieces of `context` tokens, one after the other, and the tokens that follow each; a rest at the end is left out.

    Where there are more than `most` they are taken from all over the text, evenly: its documents differ.
    """

    def __init__(self, tokens: Tensor, context: int, most: int | None = None) -> None:
        self.tokens, self.context = tokens, context
        self.there = (len(tokens) - 1) // context
        self.count = self.there if most is None else min(self.there, most)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return _piece(self.tokens, index * self.there // self.count * self.context, self.context)


def _piece(tokens: Tensor, start: int, context: int) -> dict[str, Tensor]:
    piece = tokens[start : start + context + 1].long()
    return {"input_ids": piece[:-1], "labels": piece[1:]}
