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


def fair(method, val_top1, *, rank=None, variant="", seed=0, flops=100, test=None, **fields):
    """Rows of one run with a validation split: test top-1 in the last alone, or nowhere if `test` is None."""
    rows = []
    for epoch, value in enumerate(val_top1, 1):
        row = {
            "method": method,
            "rank": rank,
            "variant": variant,
            "seed": seed,
            "epoch": epoch,
            "val_top1": value,
            "val_loss": 1 / epoch,
            "train_loss": 2 / epoch,
            "params": 1000,
            "flops_per_image": flops,
            "share_converted": 0.8,
            "flop_ratio_products": 0.5,
            "flop_ratio_all_in": 0.75,
            "flop_ratio": 0.8,
            "train_images": 10,
            "val_images": 10_000,
            "test_images": 10_000,
            "lr": 1e-3,
            "optimizer": "adamw",
            "weight_decay": 0.05,
            "train_seconds": 2.0 * epoch,
            **fields,
        }
        if test is not None and epoch == len(val_top1):
            row |= {"top1": test, "loss": 0.25}
        rows.append(row)
    return rows


def matrix(mixes=("", "mix tile", "mix grid"), seeds=2, epochs=6):
    """Rows of ten methods with each of three mixes."""
    methods = [(name, None, "") for name in ("dense", "narrow", "2:4", "low-rank", "monarch")]
    methods += [("stl", rank, f"r={rank}") for rank in (16, 24, 32)]
    methods += [("stl", 6, "r=6, mixing none"), ("naive", 64, "r=64")]
    rows = []
    for place, (name, rank, variant) in enumerate(methods):
        for step, mix in enumerate(mixes):
            said = ", ".join(part for part in (variant, mix) if part)
            for seed in range(seeds):
                course = [90 + place + step / 4 + seed / 8 - 40 / epoch**2 for epoch in range(1, epochs + 1)]
                made = {"rank": rank, "variant": said, "flops": 100 + place + step, "test": course[-1], "seed": seed}
                rows += fair(name, course, **made)
    return rows
