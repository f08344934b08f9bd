"""Everything that only a GPU can say, in one run that ends in time: are the kernels right, and how fast are they.

    make gpu-check                     needs an NVIDIA GPU, torch ≥ 2.11 and triton ≥ 3.6, nothing else
    make gpu-check ARGUMENTS=--dry-run the same on a CPU: tiny shapes, Triton's interpreter; its times mean nothing

Writes into OUT as it goes: checks.json (a row a check), rows.json (a row a measurement, as `strassen-tile bench`), and where
matplotlib is there report.html and plot.png. Stops before the time is up; what was measured until then is there. The exit
status is 1 if a check failed. Look first at checks.json: a kernel that is wrong is not timed.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

import strassen_tile as stl
from strassen_tile import models
from strassen_tile.experiments import speed
from strassen_tile.ops import cuda, generic
from strassen_tile.ops.chains import Norm, Weights, linear_by_steps, mlp_by_steps
from strassen_tile.report.rows import environment, write_rows

TILES = ((4, 4, 24), (4, 4, 16), (4, 4, 32), (4, 4, 49), (2, 2, 7), (2, 4, 24), (1, 4, 6), (8, 8, 64), (3, 2, 5))
ALLOWED = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# In the order of what is wanted most, should time run out.
SHAPES = ("8192x8192x8192", "16384x4096x16384", "16384x4096x4096", "vit-b", "llama-7b-gpu")
speed.NAMED["llama-7b-gpu"] = tuple(
    (n, k, m) for n in (8192, 65536) for k, m in ((4096, 4096), (4096, 11008), (11008, 4096))
)


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def checks(device, sizes, dtypes):
    """(name, error, allowed) of every kernel and pass against float64, memory poisoned before."""
    for (p, q, r), dtype, (n, k) in itertools.product(TILES, dtypes, sizes):
        label = f"{p}x{q} r={r} {dtype} {n}x{k}".replace("torch.", "")
        x, e = torch.randn(2, n, k, device=device).to(dtype), torch.randn(r, p, q, device=device).to(dtype)
        torch.full_like(x.expand(4, *x.shape).contiguous(), float("nan"))  # what the allocator hands out next
        encoded = generic.encode(x.double(), e.double())
        yield f"encode {label}", relative(cuda.encode(x, e), encoded), ALLOWED[dtype]
        z = torch.randn(encoded.shape, device=device).to(dtype)
        expected = generic.decode(z.double(), e.double(), 2, n, k)
        yield f"decode {label}", relative(cuda.decode(z, e, 2, n, k), expected), ALLOWED[dtype]
        expected = generic.correlate(x.double(), z.double(), (p, q), False)
        yield f"correlate {label}", relative(cuda.correlate(x, z, (p, q), False), expected), ALLOWED[dtype]
    norms = ("none", "layer", "rms")
    for (p, q, r), dtype, gated, kind in itertools.product(TILES[:2] + TILES[4:7], dtypes, (False, True), norms):
        n, k, hidden, m = sizes[-1][0], 36, 48, 20
        scale, shift = (torch.randn(2, k, device=device) + 1).to(dtype)
        norm = {"none": Norm(), "layer": Norm("layer", scale, shift, 1e-5), "rms": Norm("rms", scale, None, 1e-6)}[kind]
        wide_norm = Norm(kind, *(None if t is None else t.double() for t in norm[1:3]), norm.eps)
        layers = []
        for a, b in ((k, hidden), (hidden, m), (k, hidden)):
            shapes = ((r, -(-a // q), -(-b // q)), (r, p, q), (r, p, q), (b,))
            w, e, d, bias = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
            layers.append(Weights(w / 6, e, d, bias))
        x = torch.randn(2, n, k, device=device).to(dtype)
        label, (up, down, gate) = f"{p}x{q} r={r} {dtype} gated={gated} norm={kind}".replace("torch.", ""), layers
        up_wide, down_wide, gate_wide = (Weights(*(t.double() for t in layer)) for layer in layers)
        with torch.no_grad():
            expected = mlp_by_steps(
                x.double(), *wide_norm, up_wide, gate_wide if gated else (), down_wide, hidden, m, "silu"
            )
            found = cuda.mlp(x, *norm, up, gate if gated else (), down, hidden, m, "silu")
            yield f"mlp {label}", relative(found, expected), 6 * ALLOWED[dtype]
            expected = linear_by_steps(x.double(), *wide_norm, *up_wide, hidden, "gelu")
            yield (
                f"linear {label}",
                relative(cuda.norm_linear(x, *norm, *up, hidden, "gelu"), expected),
                4 * ALLOWED[dtype],
            )
        if device == "cuda":
            yield from gradients(x, up, label, dtype)


def gradients(x, layer, label, dtype):
    leaves = [t.detach().requires_grad_() for t in (x, *layer)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    m = layer.bias.shape[0]
    found = torch.autograd.grad(stl.stl_linear(*leaves, out_features=m).square().sum(), leaves)
    reference = stl.stl_linear(*doubles, out_features=m, backend="reference")
    for name, got, wanted in zip(
        ("x", "weight", "encoder", "decoder", "bias"),
        found,
        torch.autograd.grad(reference.square().sum(), doubles),
        strict=True,
    ):
        yield f"gradient of {name} {label}", relative(got, wanted), 8 * ALLOWED[dtype]


def captured():
    """A pass in a CUDA graph gives what it gives outside: no synchronisation hides in it."""
    x = torch.randn(1, 512, 512, device="cuda", dtype=torch.bfloat16)
    w, e = torch.randn(24, 128, 128, device="cuda").bfloat16(), torch.randn(24, 4, 4, device="cuda").bfloat16()
    with torch.no_grad():
        expected = stl.stl_linear(x, w, e, e)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = stl.stl_linear(x, w, e, e)
        graph.replay()
    return [("CUDA graph", relative(y, expected.double()), 1e-9)]


def blocks(tiny):
    """(name, dense, STL, inputs): an MLP as in GPU.md, a Llama-shaped MLP, and T2T-ViT-14."""
    wide, rows, dim, hidden = (64, 16, 32, 48) if tiny else (8192, 8192, 4096, 11008)
    for rank in (16, 24, 32):
        config = stl.STLConfig(rank=rank)
        for name, gated, k, h in (("mlp", False, wide, wide), ("llama-mlp", True, dim, hidden)):
            dense = Dense(k, h, gated)
            yield (
                name,
                rank,
                dense,
                stl.STLMLP(k, h, gated=gated, activation="silu" if gated else "gelu", config=config),
                (rows, k),
            )
    size = {"image_size": 8, "in_channels": 3} if tiny else {}
    for rank in (16, 24):
        dense, other = (models.t2t_vit("t2t_vit_nano" if tiny else "t2t_vit_14", **size) for _ in range(2))
        stl.convert(other, stl.STLConfig(rank=rank), filter_fn=lambda _, name: name.startswith("blocks."))
        yield "t2t_vit_14", rank, dense, other, (2 if tiny else 128, 3, *(2 * (8 if tiny else 224,)))


class Dense(torch.nn.Module):
    def __init__(self, k, h, gated):
        super().__init__()
        self.up, self.down = torch.nn.Linear(k, h * (2 if gated else 1)), torch.nn.Linear(h, k)
        self.gated = gated

    def forward(self, x):
        y = self.up(x)
        if self.gated:
            gate, up = y.chunk(2, dim=-1)
            return self.down(torch.nn.functional.silu(gate) * up)
        return self.down(torch.nn.functional.gelu(y))


def measure_blocks(device, dtype, seconds, tiny, where):
    for name, rank, dense, other, shape in blocks(tiny):
        x = torch.randn(shape if len(shape) == 4 else (1, *shape), device=device, dtype=dtype)
        first, second = (module.to(device, dtype).eval() for module in (dense, other))
        with torch.inference_mode():
            pairs = speed.interleave(
                lambda first=first, x=x: first(x), lambda second=second, x=x: second(x), seconds, device
            )
        ratios = sorted(a / b for a, b in pairs)
        middle = len(pairs) // 2
        yield {
            "device": device, "dtype": str(dtype).removeprefix("torch."), "block": name, "pass": "forward", "method": "stl",
            "rank": rank, "median_s": sorted(b for _, b in pairs)[middle], "dense_s": sorted(a for a, _ in pairs)[middle],
            "speedup": ratios[middle], "pairs": len(pairs), **where,
        }  # fmt: skip


def sanitize(out):
    """compute-sanitizer over the checks at their smallest, where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return []
    command = [
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        __file__,
        "--checks-only",
        "--small",
        "--out",
        str(out / "sanitizer"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    (out / "sanitizer.log").write_text(done.stdout + done.stderr)
    return [("compute-sanitizer", float(done.returncode != 0), 0.5)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu-check"))
    parser.add_argument("--seconds", type=float, default=480, help="to end within")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny, by Triton's interpreter")
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument("--small", action="store_true", help="the smallest checks")
    options = parser.parse_args()
    end, device = time.monotonic() + options.seconds, "cpu" if options.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry-run goes through the same steps on the CPU")
    if cuda.launcher() is None:
        parser.error("triton is not installed")
    options.out.mkdir(parents=True, exist_ok=True)
    where = environment("benchmarks/gpu_check.py " + " ".join(sys.argv[1:]))
    where["machine"] = torch.cuda.get_device_name() if device == "cuda" else where["machine"]

    tiny = options.dry_run or options.small
    sizes, dtypes = ([(5, 63)], [torch.float32]) if tiny else ([(5, 63), (64, 512), (1023, 1030)], list(ALLOWED))
    found = checks(device, sizes, dtypes)
    if device == "cuda":
        found = itertools.chain(found, captured(), [] if options.checks_only else sanitize(options.out))
    results = []
    for name, error, allowed in found:
        results.append({"check": name, "error": error, "allowed": allowed, "ok": error < allowed, **where})
    write_rows(options.out / "checks.json", results)
    wrong = [row["check"] for row in results if not row["ok"]]
    print(f"{len(results) - len(wrong)} of {len(results)} checks passed", *wrong, sep="\n  ", flush=True)
    rows = []
    if not options.checks_only:
        rows = list(measured(options, device, tiny, end, where))
    report(options.out, rows)
    sys.exit(1 if wrong else 0)


def measured(options, device, tiny, end, where):
    """Measurements until the time is up, each on disk once it is made."""
    seconds, kept = (0.0 if tiny else 0.4), []
    methods = ("stl",) if device == "cpu" else ("stl", "2:4")
    shapes = [(64, 64, 64)] if tiny else [shape for name in SHAPES for shape in speed.shapes_of(name)]
    dtypes = ("float32",) if tiny else ("bfloat16", "float16")
    runs = [(shape, name, dtype) for dtype in dtypes for shape in shapes for name in ("forward", "step")]
    for index, (shape, name, dtype) in enumerate(runs):
        if index == (0 if tiny else 4):  # the first shapes, then the blocks, then the rest
            yield from _kept(
                measure_blocks(device, torch.float32 if tiny else torch.bfloat16, seconds, tiny, where),
                kept,
                end,
                options,
            )
        chosen = methods if name == "forward" else ("stl",)
        made = speed.bench(
            [shape], (16, 24, 32), device=device, dtype=dtype, passes=(name,), methods=chosen, seconds=seconds
        )
        try:
            yield from _kept(made, kept, end, options)
        except (RuntimeError, stl.errors.STLError) as error:
            print(f"{shape} {name} {dtype}: {error}", flush=True)
        if time.monotonic() > end - 20:
            print(f"time is up: {index + 1} of {len(runs)} settings measured", flush=True)
            return


def _kept(rows, kept, end, options):
    for row in rows:
        kept.append(row)
        write_rows(options.out / "rows.json", kept)
        what = row.get("block") or f"{row['n']}x{row['k']}x{row['m']}"
        print(f"{what} {row['dtype']} {row['pass']} {row['method']} {row['rank']}: {row['speedup']:.2f}x", flush=True)
        yield row
        if time.monotonic() > end - 20:
            return


def report(out, rows):
    try:
        from strassen_tile.report.bench import write_report

        write_report(out, [row for row in rows if "block" not in row], "GPU check")
        write_rows(out / "rows.json", rows)
    except ImportError as error:
        print(f"no report.html and plot.png: {error}")


if __name__ == "__main__":
    main()
