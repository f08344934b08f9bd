"""Where the time of a pass goes: encode, products, decode, launches; and how far each is from what the device can do."""

import statistics

import torch
import torch.nn.functional as F

from gpu.timing import best_of, graphed, seconds_of
from strassen_tile.experiments.speed import DTYPES
from strassen_tile.ops.cuda import fp8, launch, passes


def copy_rate(device, bytes_):
    """Bytes read and written a second by a copy."""
    x = torch.randn(bytes_ // 4, device=device)
    y = torch.empty_like(x)
    return 2 * bytes_ / seconds_of(lambda: y.copy_(x), device)


def split(shape, rank, dtype, device, copied):
    """One row: seconds of dense, of each part and of the whole, in eager and as a CUDA graph."""
    n, k, m = shape
    kind = DTYPES[dtype]
    x, weight = torch.randn(1, n, k, device=device).to(kind), torch.randn(m, k, device=device).to(kind)
    e, d = (torch.randn(2, rank, 4, 4, device=device) / 4).to(kind)
    w = torch.randn(rank, -(-k // 4), -(-m // 4), device=device).to(kind)
    bias = torch.randn(m, device=device).to(kind)
    encoded = launch.encode(x, e, aligned=True)
    products = torch.bmm(encoded, w)
    by_tile_row = encoded.transpose(0, 1).contiguous().transpose(0, 1)  # (N/p, r, K/q) in memory
    runs = {
        "dense": lambda: F.linear(x, weight),
        "encode": lambda: launch.encode(x, e, aligned=True),
        "products": lambda: torch.bmm(encoded, w),
        "products_of_row_major": lambda: torch.bmm(by_tile_row, w),
        "decode": lambda: launch.decode(products, d, 1, n, m, bias),
        "whole": lambda: passes.forward(x, w, e, d, bias, m, "none"),
    }
    samples = {name: [] for name in runs}
    for _ in range(3):  # in turn, since clocks drift
        for name, run in runs.items():
            samples[name].append(seconds_of(run, device))
    found = {f"{name}_s": statistics.median(times) for name, times in samples.items()}
    if device == "cuda":
        found["whole_graph_s"] = seconds_of(graphed(runs["whole"]), device)
    moved = {"encode": x.nbytes + encoded.nbytes, "decode": products.nbytes + n * m * x.element_size()}
    shares = {f"{name}_of_copy": size / found[f"{name}_s"] / copied for name, size in moved.items()}
    return {
        "part": "split", "device": device, "dtype": dtype, "n": n, "k": k, "m": m, "rank": rank, **found, **shares,
        "products_of_dense_rate": rank / 64 * found["dense_s"] / found["products_s"],
        "launches_s": found["whole_s"] - found["encode_s"] - found["products_s"] - found["decode_s"],
        "copy_bytes_per_s": copied,
    }  # fmt: skip


def eight_bits(shape, rank, device):
    """One row: STL in fp8 against dense in fp8, both rounding x on the way in, and dense in bfloat16."""
    n, k, m = shape
    x, weight = torch.randn(1, n, k, device=device).bfloat16(), torch.randn(m, k, device=device).bfloat16()
    e, d = (torch.randn(2, rank, 4, 4, device=device) / 4).bfloat16()
    w = fp8.rounded(torch.randn(rank, -(-k // 4), -(-m // 4), device=device).bfloat16(), e)
    dense = fp8.rounded(weight.mT[None], e[:1])  # one channel; the encoder plays no part

    def dense_fp8():
        largest = torch.linalg.vector_norm(x, float("inf")).float().clamp_min(1e-30)
        scale = largest / fp8.LARGEST
        values = (x[0] / scale).to(fp8.FP8)
        return torch._scaled_mm(
            values, dense.values[0].mT, scale, dense.largest, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def stl_fp8():
        return passes.fp8_linear(x, *w, e, d, None, m)

    faster, how = best_of(dense_fp8, device)
    runs = {"dense_bf16": lambda: F.linear(x, weight), "dense_fp8": faster, "stl_fp8": stl_fp8}
    samples = {name: [] for name in runs}
    for _ in range(3):
        for name, run in runs.items():
            samples[name].append(seconds_of(run, device))
    found = {f"{name}_s": statistics.median(times) for name, times in samples.items()}
    ratios = {"speedup_of_dense_fp8": found["dense_fp8_s"] / found["stl_fp8_s"]}
    if device == "cuda":  # as eager launches, r products may wait for the host
        for name, run in (("stl_fp8", stl_fp8), ("dense_fp8", dense_fp8)):
            found[f"{name}_graph_s"] = seconds_of(graphed(run), device)
        ratios["speedup_of_dense_fp8_in_graphs"] = found["dense_fp8_graph_s"] / found["stl_fp8_graph_s"]
    return {
        "part": "fp8", "device": device, "n": n, "k": k, "m": m, "rank": rank, "dense_fp8": how, **found, **ratios,
    }  # fmt: skip
