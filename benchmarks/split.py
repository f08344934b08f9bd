"""Where the time of one CPU forward pass goes: encode, products, decode, and the dense product beside them.

    python benchmarks/split.py --shape 4096x4096x4096 --ranks 16,24,32 --file benchmarks/results/cpu-amd-epyc-2-cores-split.json

The passes are wrapped while they run, so the parts are those of the real thing; medians of alternating runs.
"""

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

import strassen_tile as stl
from strassen_tile.experiments.speed import DTYPES, shapes_of
from strassen_tile.ops.cpu import panels
from strassen_tile.records import environment, read_rows, write_rows


def timed(function, name, times):
    def run(*arguments, **options):
        start = time.perf_counter()
        result = function(*arguments, **options)
        times[name] += time.perf_counter() - start
        return result

    return run


def split(shape, rank, dtype, runs=9):
    n, k, m = shape
    x, weight = torch.randn(n, k).to(dtype), torch.randn(m, k).to(dtype)
    encoded = torch.randn(rank, -(-k // 4), -(-m // 4)).to(dtype)
    factors = [torch.randn(rank, 4, 4).to(dtype) for _ in range(2)]
    times = defaultdict(float)
    parts = {(panels, "encode_into"): "encode", (panels, "decode_into"): "decode", (torch, "bmm"): "products"}
    before = {place: getattr(*place) for place in parts}
    for (owner, attribute), name in parts.items():
        setattr(owner, attribute, timed(before[owner, attribute], name, times))
    samples = defaultdict(list)
    try:
        for run in range(runs + 2):
            times.clear()
            with torch.no_grad():
                timed(F.linear, "dense", times)(x, weight)
                timed(stl.stl_linear, "stl", times)(x, encoded, *factors)
            if run >= 2:
                for name, value in times.items():
                    samples[name].append(value)
    finally:
        for (owner, attribute), function in before.items():
            setattr(owner, attribute, function)
    return {f"{name}_s": statistics.median(values) for name, values in samples.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096x4096")
    parser.add_argument("--ranks", default="16,24,32")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--file", type=Path, required=True)
    options = parser.parse_args()
    rows = read_rows(options.file) if options.file.exists() else []
    where = environment(
        f"python benchmarks/split.py --shape {options.shape} --ranks {options.ranks} --dtype {options.dtype}"
    )
    for shape in shapes_of(options.shape):
        for rank in map(int, options.ranks.split(",")):
            found = split(shape, rank, DTYPES[options.dtype])
            sizes = dict(zip("nkm", shape, strict=True))
            rows.append(
                {"device": "cpu", "dtype": options.dtype, **sizes, "tile": "4x4x4", "rank": rank, **found, **where}
            )
            write_rows(options.file, rows)
            print(sizes, rank, {name: f"{1e3 * value:.1f} ms" for name, value in found.items()})


if __name__ == "__main__":
    main()
