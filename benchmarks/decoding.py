"""Tokens a second of causal language models, reading a prompt and decoding with a cache: dense and STL, interleaved.

    python benchmarks/decoding.py --models llama-10m llama-30m --out benchmarks/results/decoding.json

Weights are random: speed does not depend on them. In each round every contender does the same once, in an order drawn anew; the
ratio to dense is the median of the rounds'.
"""

import argparse
import random
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

from strassen_tile.experiments import language
from strassen_tile.experiments.text_recipe import text_recipe_of
from strassen_tile.records import environment, write_rows

METHODS = ("dense", "dense[mix=causal]", "stl[rank=6,mixing=none]", "stl[rank=6,mixing=none,mix=causal]")
SIZES = ((1, 512), (16, 128))  # samples, and tokens of the prompt
DECODED = 32


@torch.no_grad()
def seconds(model, prompt, dtype):
    """To read the prompt, and to decode after it."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        started = time.perf_counter()
        out = model(input_ids=prompt, use_cache=True)
        read = time.perf_counter() - started
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        started = time.perf_counter()
        for _ in range(DECODED):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return read, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-10m", "llama-30m"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file of rows")
    options = parser.parse_args()
    rows, where = [], {**environment(), "command": shlex.join(["python", "benchmarks/decoding.py", *sys.argv[1:]])}
    for name in options.models:
        changes = [f"model={name}", "context=640", "lr_grid=none", f"methods={','.join(METHODS)}"]
        recipe = text_recipe_of(None, changes)
        models = [language.build(recipe, 256, one, 0)[0].eval() for one in recipe.roster()]
        for samples, length in SIZES:
            prompt = torch.randint(256, (samples, length), generator=torch.Generator().manual_seed(0))
            taken = {index: [] for index in range(len(models))}
            for turn in range(options.rounds + 1):
                order = list(taken)
                random.shuffle(order)
                for index in order:
                    found = seconds(models[index], prompt, torch.float32)
                    if turn:  # the first round warms up
                        taken[index].append(found)
            for index, entry in enumerate(METHODS):
                row = {"model": name, "entry": entry, "samples": samples, "prompt": length, "decoded": DECODED}
                for part, tokens, at in (("prefill", length, 0), ("decode", DECODED, 1)):
                    times = [pair[at] for pair in taken[index]]
                    ratios = [dense[at] / pair[at] for dense, pair in zip(taken[0], taken[index], strict=True)]
                    row |= {
                        f"{part}_tokens_per_s": samples * tokens / statistics.median(times),
                        f"{part}_speedup": statistics.median(ratios),
                    }
                rows.append({**row, "rounds": options.rounds, **where})
                print(
                    {key: value if isinstance(value, str | int) else round(value, 2) for key, value in row.items()},
                    flush=True,
                )
                write_rows(options.out, rows)


if __name__ == "__main__":
    main()
