"""Seconds of a training step of language models: STL and others as multiples of dense, interleaved.

    python benchmarks/step.py --models llama-3m llama-10m llama-30m --threads 2 --out benchmarks/results/step.json

A step is forward, backward and AdamW on one batch. In each round every contender does the same once, in an order of its own.
The ratio is the median over rounds of its seconds by those of dense, which has the same mix of rows ahead of its layers.
"""

import argparse
import random
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

from strassen_tile import baselines
from strassen_tile.experiments import language
from strassen_tile.experiments.text_recipe import text_recipe_of
from strassen_tile.nn import param_groups
from strassen_tile.records import environment, write_rows

METHODS = ("dense[mix=causal]", "dense", "stl[rank=6,mixing=none]", "stl[rank=6,mixing=none,mix=causal]")


def stepper(model, tokens):
    """A function that trains one step and gives its seconds."""
    optimizer = torch.optim.AdamW(param_groups(model, 1e-4, 0.1))

    def step():
        started = time.perf_counter()
        logits = model(input_ids=tokens, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-3m", "llama-10m", "llama-30m"])
    parser.add_argument("--batch-size", type=int, default=24, help="sequences")
    parser.add_argument("--context", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True, help="a JSON file of rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, where = [], {**environment(), "command": shlex.join(["python", "benchmarks/step.py", *sys.argv[1:]])}
    for name in options.models:
        changes = [f"model={name}", f"context={options.context}", "lr_grid=none", f"methods={','.join(METHODS)}"]
        recipe = text_recipe_of(None, changes)
        tokens = torch.randint(256, (options.batch_size, options.context), generator=torch.Generator().manual_seed(0))
        built = [language.build(recipe, 256, one, 0) for one in recipe.roster()]
        costs = [baselines.model_cost(*pair, {"input_ids": tokens}).flops for pair in built]
        steps = [stepper(model.train(), tokens) for model, _ in built]
        taken = {index: [] for index in range(len(steps))}
        for turn in range(options.rounds + 1):
            order = list(taken)
            random.shuffle(order)
            for index in order:
                seconds = steps[index]()
                if turn:  # the first round warms up
                    taken[index].append(seconds)
        for index, entry in enumerate(METHODS):
            ratios = [own / dense for own, dense in zip(taken[index], taken[0], strict=True)]
            row = {
                "model": name,
                "width": built[0][0].config.hidden_size,
                "entry": entry,
                "tokens": tokens.numel(),
                "seconds": statistics.median(taken[index]),
                "seconds_of_dense": statistics.median(ratios),
                "flops_of_dense": costs[index] / costs[0],
                "rounds": options.rounds,
            }
            rows.append({**row, **where})
            shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
            print(shown, flush=True)
            write_rows(options.out, rows)


if __name__ == "__main__":
    main()
