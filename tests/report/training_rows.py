"""Rows of a comparison that was never run, for the tests of its report."""

import math
import random

METHODS = [
    ("dense", None, 1.13e9, 88.0),
    ("dense+token-mix", None, 1.15e9, 88.2),
    ("2:4", None, 0.62e9, 87.4),
    ("stl", 16, 0.45e9, 86.8),
    ("stl", 32, 0.64e9, 87.8),
    ("low-rank", 8, 0.6e9, 85.5),
]


def sample(methods=METHODS, seeds=2, epochs=12):
    rng = random.Random(0)
    return [
        {
            "method": method,
            "rank": rank,
            "seed": seed,
            "epoch": epoch,
            "top1": top - 50 * math.exp(-epoch / 2) + rng.gauss(0, 0.1),
            "loss": 0.5 + math.exp(-epoch / 3),
            "train_loss": 0.2 + 0.01 * (88 - top) + math.exp(-epoch / 3),
            "params": 4_300_000,
            "flops_per_image": flops,
            "flop_ratio_products": 0.375,
            "flop_ratio_all_in": 1 / 2.05,
            "flop_ratio": flops / 1.13e9,
            "share_converted": 0.83,
            "train_seconds": 20.0 * epoch + seed,
            "machine": "a machine",
            "date": f"2026-01-01T00:00:{epoch:02d}Z",
        }
        for method, rank, flops, top in methods
        for seed in range(seeds)
        for epoch in range(1, epochs + 1)
    ]
