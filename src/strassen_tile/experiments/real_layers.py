"""Products of real layers: what a trained model feeds its linear layers when it reads real text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from strassen_tile.data.prose import standard_library
from strassen_tile.errors import ConfigError
from strassen_tile.experiments.approximation import Problem

LAYERS = ("0.attention.self.query", "0.intermediate.dense", "3.intermediate.dense", "5.output.dense")
_TOKENS, _LETTERS = 64, 320  # of a piece of text: the letters give about as many tokens
_TOGETHER = 64  # pieces read at a time


def minilm(layers: Sequence[str] = LAYERS, rows: int = 2048, pieces: int = 256) -> list[Problem]:
    """The products of all-MiniLM-L6-v2's layers of these names (after "encoder.layer."), fed the prose of Python's library.

    Args:
        layers: ends of module names.
        rows: how many rows to measure on, at most, and as many others to fit to.
        pieces: of text to read, of up to 64 tokens, half of them to fit to; those of one document stand together.

    Raises:
        ConfigError: its weights are not installed, or it has no such layer.
    """
    from strassen_tile.integrations.pretrained import pretrained  # late: transformers takes seconds

    found = pretrained("minilm")
    model, tokenizer = found.model, found.tokenizer
    every = [
        text[at : at + _LETTERS]
        for _, text in sorted(standard_library().items())
        for at in range(0, len(text) - _LETTERS, _LETTERS)
    ]
    texts = every[:: max(1, len(every) // pieces)][:pieces]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=_TOKENS, return_tensors="pt")
    wanted = {name: module for name, module in model.named_modules() if name.endswith(tuple(layers))}
    if len(wanted) < len(layers):
        raise ConfigError(f"MiniLM has no layers {', '.join(layers)}; it has {', '.join(wanted) or 'none of them'}")
    return _captured(model, wanted, dict(batch), rows)


@torch.no_grad()
def _captured(model: nn.Module, wanted: dict[str, nn.Module], batch: dict[str, Any], rows: int) -> list[Problem]:
    fed: dict[str, list[Tensor]] = {name: [] for name in wanted}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: fed[name].append(args[0]))
        for name, module in wanted.items()
    ]
    try:
        for begin in range(0, len(batch["attention_mask"]), _TOGETHER):
            model(**{key: part[begin : begin + _TOGETHER] for key, part in batch.items()})
    finally:
        for hook in hooks:
            hook.remove()
    real = batch["attention_mask"].bool()
    problems = []
    for name, module in wanted.items():
        first, second = (part[mask] for part, mask in zip(torch.cat(fed[name]).chunk(2), real.chunk(2), strict=True))
        weight: Any = module.weight
        label = f"MiniLM {name.removeprefix('encoder.layer.')} {weight.shape[1]}→{weight.shape[0]}"
        problems.append(Problem(label, second[:rows].clone(), weight.detach().mT.contiguous(), first[:rows].clone()))
    return problems
