"""What rounding to fp8 costs: relative error of products in e4m3 against the same operands in float64, STL and dense.

    python benchmarks/fp8_error.py --file benchmarks/results/fp8-error.json

Gaussian X and W of 512×1024 and 1024×512. Exact bases are given Ŵ = F·W, so that all of their error is rounding; random ones
a random Ŵ, and the reference is the operator itself. The arithmetic of e4m3 is the same on every device.
"""

import argparse
import statistics
from pathlib import Path

import torch

import strassen_tile as stl
from strassen_tile import reference
from strassen_tile.nn.init import start_factors
from strassen_tile.ops.cuda import fp8
from strassen_tile.ops.gradients import encode
from strassen_tile.records import environment, write_rows

N, K, M, SEEDS = 512, 1024, 512, 5


def bases():
    """(name, rank, encoder, decoder, weight encoder or None)."""
    for rank in (16, 24, 32):
        encoder, decoder = start_factors(stl.STLConfig(rank=rank), None, K // 4, M // 4)
        yield "random", rank, encoder, decoder, None
    for name, basis in (("naive", stl.bases.naive(4, 4, 4)), ("strassen", stl.bases.strassen(2))):
        yield name, basis.rank, basis.encoder, basis.decoder, basis.weight_encoder


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def dense(x, w):
    """Both factors rounded, x by row and w by column."""
    parts = [t / t.abs().amax(dim=dim, keepdim=True) * fp8.LARGEST for t, dim in ((x, 1), (w, 0))]
    a, b = (part.to(fp8.FP8).double() / part for part in parts)
    return (x.double() * a) @ (w.double() * b)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True)
    options = parser.parse_args()
    where = environment("python benchmarks/fp8_error.py --file benchmarks/results/fp8-error.json")
    errors = {}
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        x, w = torch.randn(1, N, K), torch.randn(K, M)
        errors.setdefault(("dense", None), []).append(relative(dense(x[0], w), x[0].double() @ w.double()))
        for name, rank, encoder, decoder, weight_encoder in bases():
            e, d = encoder.float(), decoder.float()
            if weight_encoder is None:
                encoded = torch.randn(rank, K // 4, M // 4)
            else:
                encoded = encode(w[None].double(), weight_encoder).float()
            expected = reference.stl_linear(*(t.double() for t in (x, encoded, e, d)), out_features=M)
            with torch.no_grad():
                found = fp8.fp8_linear(x, fp8.rounded(encoded, e), e, d, None, M)
            errors.setdefault((name, rank), []).append(relative(found, expected))
    fixed = {"tile": "4x4x4", "dtype": "float8_e4m3fn", "n": N, "k": K, "m": M, "seeds": SEEDS, **where}
    rows = []
    for (name, rank), found in errors.items():
        spread = {"error": statistics.mean(found), "error_sd": statistics.stdev(found)}
        rows.append({"method": "dense" if rank is None else "stl", "basis": name, "rank": rank, **spread, **fixed})
    write_rows(options.file, rows)
    for row in rows:
        print(f"{row['basis']} {row['rank']}: {100 * row['error']:.2f} ± {100 * row['error_sd']:.2f} %")


if __name__ == "__main__":
    main()
