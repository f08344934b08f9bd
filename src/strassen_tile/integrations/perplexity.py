"""Perplexity of a causal language model as papers give it: of one split as one text, in windows of one length and stride.

    python -m strassen_tile.integrations.perplexity --model FOLDER --data hub:Salesforce/wikitext:wikitext-2-raw-v1

Documents of the split are joined by an empty line and cut into tokens once, with the special tokens that the tokenizer adds.
Windows of `context` tokens begin every `stride` tokens; each token is scored once, in the first window that has it, given what
stands before it there, and of the first token of a window nothing is known. With stride = context that is the protocol of
GPTQ's, Wanda's and SparseGPT's tables for WikiText-2 (test, 2048).
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strassen_tile.data.documents import documents
from strassen_tile.errors import ConfigError, DataError, STLError
from strassen_tile.integrations.pretrained import pretrained
from strassen_tile.records import environment, write_rows


@dataclass(frozen=True)
class Perplexity:
    """What a text costs a model.

    Attributes:
        nats: mean loss of a token.
        scored: tokens that are in it.
        windows: that were read.
    """

    nats: float
    scored: int
    windows: int

    @property
    def perplexity(self) -> float:
        """exp(nats)."""
        return math.exp(self.nats)


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, context: int, stride: int, batch_size: int = 1) -> Perplexity:
    """Of one text.

    Args:
        model: causal, of transformers, in eval mode.
        tokens: (n,) of the text; a rest that fills no window is left out.
        context: tokens of a window.
        stride: from the beginning of a window to that of the next; smaller ones give tokens more to go by.
        batch_size: windows at a time.

    Raises:
        ConfigError: a stride longer than the context, or a context longer than the model has positions for.
        DataError: the text is shorter than a window.
    """
    if not (1 <= stride <= context and context > 1 and batch_size > 0):
        raise ConfigError(
            f"context must be 2 or more, stride from 1 to context, batch_size positive; got {context}, {stride}, {batch_size}"
        )
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if most is not None and context > most:
        raise ConfigError(f"context={context}: the model has {most} positions; take at most as many")
    if len(tokens) < context:
        raise DataError(f"the text has {len(tokens)} tokens, and a window {context}: take a shorter context")
    device = next(model.parameters()).device
    windows = tokens.unfold(0, context, stride)  # (windows, context)
    nats = torch.zeros((), dtype=torch.float64)
    scored = 0
    for first in range(0, len(windows), batch_size):
        ids = windows[first : first + batch_size].to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.movedim(-1, 1), ids[:, 1:], reduction="none").double().cpu()
        new = torch.zeros(losses.shape, dtype=torch.bool)
        new[:, -stride:] = True  # what earlier windows had is not scored again
        if first == 0:
            new[0] = True
        nats += losses[new].sum()
        scored += int(new.sum())
    return Perplexity(float(nats) / scored, scored, len(windows))


def text_of(data: str, split: str) -> str:
    """The documents of a split as one text, joined by empty lines; all of them where the source names no splits.

    Raises:
        DataError: there are none.
    """
    found = list(documents(data))
    named = any(part is not None for part, _ in found)
    texts = [text for part, (_, text) in found if part == split or not named]
    if not any(texts):
        raise DataError(f"data={data!r}: has no text of a split {split!r}")
    return "\n\n".join(texts)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="smollm2, the folder of a transformers model (STL layers too), or an id of the hub",
    )
    add("--data", required=True, help="a file or folder of text, or hub:NAME:CONFIG")
    add("--split", default="test", help="train, validation or test")
    add("--context", type=int, default=2048, help="tokens of a window")
    add("--stride", type=int, help="(default: the context)")
    add("--batch-size", type=int, default=1, help="windows at a time")
    add("--out", type=Path, help="a JSON file for the row")
    options = parser.parse_args(arguments)
    stride = options.context if options.stride is None else options.stride
    try:
        text = text_of(options.data, options.split)
        made = pretrained(options.model)
        if not made.decodes:
            raise ConfigError(f"model={options.model}: is an encoder; perplexity is of causal language models")
        tokens = torch.tensor(made.tokenizer(text, verbose=False)["input_ids"])
        found = perplexity(made.model, tokens, options.context, stride, options.batch_size)
        row: dict[str, Any] = {
            "model": options.model, "data": options.data, "split": options.split, "context": options.context,
            "stride": stride, "perplexity": found.perplexity, "nats": found.nats, "tokens": found.scored,
            "windows": found.windows,
        }  # fmt: skip
        print(
            ", ".join(
                f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
        if options.out is not None:
            given = sys.argv[1:] if arguments is None else arguments
            command = shlex.join(["python", "-m", "strassen_tile.integrations.perplexity", *given])
            write_rows(options.out, [{**row, **environment(), "command": command}])
    except (STLError, ImportError, OSError) as error:
        print(f"strassen-tile: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
