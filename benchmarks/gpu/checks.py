"""Are the kernels right on this device? Every kernel, pass and gradient against float64, memory poisoned before."""

import itertools

import torch

import strassen_tile as stl
from strassen_tile.ops import eager, taps
from strassen_tile.ops.cuda import choices, fp8, passes, tune
from strassen_tile.ops.cuda import taps as triton_taps
from strassen_tile.ops.fused import Norm, Weights, composed_mlp, composed_norm_linear

TILES = ((4, 4, 24), (4, 4, 16), (4, 4, 32), (4, 4, 49), (2, 2, 7), (2, 4, 24), (1, 4, 6), (8, 8, 64), (3, 2, 5))
ALLOWED = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
NORMS = ("none", "layer", "rms")


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def cases(device, sizes, dtypes, large=True):
    """Functions that each yield (name, error, allowed): what shards divide among themselves. `large` ones need 15 GB."""
    for tile, dtype, size in itertools.product(TILES, dtypes, sizes):
        yield lambda tile=tile, dtype=dtype, size=size: kernels(device, *tile, dtype, *size)
    for tile, dtype, gated, kind in itertools.product(TILES[:2] + TILES[4:7], dtypes, (False, True), NORMS):
        yield lambda tile=tile, dtype=dtype, gated=gated, kind=kind: chains(
            device, *tile, dtype, sizes[-1][0], gated, kind
        )
    for tile, dtype in itertools.product(TILES, dtypes):
        yield lambda tile=tile, dtype=dtype: gradients(device, *tile, dtype, sizes[-1][0])
    if device == "cpu" or torch.cuda.get_device_capability() >= (8, 9):
        for tile, dtype, size in itertools.product(TILES, dtypes, sizes):
            yield lambda tile=tile, dtype=dtype, size=size: eight_bits(device, *tile, dtype, *size)
    for dtype, size in itertools.product(dtypes, sizes):
        yield lambda dtype=dtype, size=size: convolution(device, dtype, *size)
    if device == "cuda" and large:
        yield captured
        yield far


def kernels(device, p, q, r, dtype, n, k):
    label = f"{p}x{q} r={r} {dtype} {n}x{k}".replace("torch.", "")
    x, e = torch.randn(2, n, k, device=device).to(dtype), torch.randn(r, p, q, device=device).to(dtype)
    torch.full_like(x.expand(4, *x.shape).contiguous(), float("nan"))  # what the allocator hands out next
    encoded = eager.encode(x.double(), e.double())
    yield f"encode {label}", relative(passes.encode(x, e), encoded), ALLOWED[dtype]
    z = torch.randn(encoded.shape, device=device).to(dtype)
    expected = eager.decode(z.double(), e.double(), 2, n, k)
    yield f"decode {label}", relative(passes.decode(z, e, 2, n, k), expected), ALLOWED[dtype]
    expected = eager.correlate(x.double(), z.double(), (p, q), False)
    yield f"correlate {label}", relative(passes.correlate(x, z, (p, q), False), expected), ALLOWED[dtype]
    each = torch.randn(encoded.shape[2], r, p, q, device=device).to(dtype)
    encoded = eager.encode(x.double(), each.double())
    yield f"encode, a factor a tile {label}", relative(passes.encode(x, each), encoded), ALLOWED[dtype]
    expected = eager.decode(z.double(), each.double(), 2, n, k)
    yield f"decode, a factor a tile {label}", relative(passes.decode(z, each, 2, n, k), expected), ALLOWED[dtype]


def convolution(device, dtype, n, k):
    """The short convolution ahead of a layer, and the gradients of both of its factors."""
    x, grad = (torch.randn(3, n, k, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(k, 4, device=device)
    label = f"{dtype} {n}x{k}".replace("torch.", "")
    for kind, before in (("causal", 3), ("symmetric", 2)):
        doubles = [t.double().requires_grad_() for t in (x, weight)]
        expected = taps.shifted_sum(*doubles, before, residual=True)
        wide = torch.autograd.grad(expected, doubles, grad.double())
        y = triton_taps.convolve(x, weight, before, True)
        yield f"taps {kind} {label}", relative(y, expected.detach()), ALLOWED[dtype]
        back = triton_taps.convolve(grad, weight.flip(-1), 3 - before, True)
        yield f"taps {kind}, gradient of x {label}", relative(back, wide[0]), ALLOWED[dtype]
        found = triton_taps.correlate(grad, x, 4, before)
        yield f"taps {kind}, gradient of the weight {label}", relative(found, wide[1]), 1e-5


def layer(device, p, q, r, dtype, features, out):
    shapes = ((r, -(-features // q), -(-out // q)), (r, p, q), (r, p, q), (out,))
    w, e, d, bias = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    return Weights(w / features**0.5, e, d, bias)


def chains(device, p, q, r, dtype, n, gated, kind):
    k, hidden, m = 36, 48, 20
    scale, shift = (torch.randn(2, k, device=device) + 1).to(dtype)
    norm = {"none": Norm(), "layer": Norm("layer", scale, shift, 1e-5), "rms": Norm("rms", scale, None, 1e-6)}[kind]
    wide_norm = Norm(kind, *(None if t is None else t.double() for t in norm[1:3]), norm.eps)
    layers = [layer(device, p, q, r, dtype, a, b) for a, b in ((k, hidden), (hidden, m), (k, hidden))]
    up, down, gate = layers
    up_wide, down_wide, gate_wide = (Weights(*(t.double() for t in parts)) for parts in layers)
    x = torch.randn(2, n, k, device=device).to(dtype)
    label = f"{p}x{q} r={r} {dtype} gated={gated} norm={kind}".replace("torch.", "")
    with torch.no_grad():
        gates = (gate, gate_wide) if gated else ((), ())
        expected = composed_mlp(x.double(), *wide_norm, up_wide, gates[1], down_wide, hidden, m, "silu")
        found = passes.mlp(x, *norm, up, gates[0], down, hidden, m, "silu")
        yield f"mlp {label}", relative(found, expected), 6 * ALLOWED[dtype]
        expected = composed_norm_linear(x.double(), *wide_norm, *up_wide, hidden, "gelu")
        found = passes.norm_linear(x, *norm, *up, hidden, "gelu")
        yield f"linear {label}", relative(found, expected), 4 * ALLOWED[dtype]


def gradients(device, p, q, r, dtype, n):
    m, parts = 48, layer(device, p, q, r, dtype, 36, 48)
    x, grad = (torch.randn(2, n, size, device=device).to(dtype) for size in (36, m))
    leaves = [t.detach().requires_grad_() for t in (x, *parts)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    found = torch.autograd.grad(stl.stl_linear(*leaves, out_features=m), leaves, grad)
    reference = stl.stl_linear(*doubles, out_features=m, backend="reference")
    label = f"{p}x{q} r={r} {dtype}".replace("torch.", "")
    names = ("x", "weight", "encoder", "decoder", "bias")
    for name, got, wanted in zip(names, found, torch.autograd.grad(reference, doubles, grad.double()), strict=True):
        yield f"gradient of {name} {label}", relative(got, wanted), 4 * ALLOWED[dtype]


def eight_bits(device, p, q, r, dtype, n, k):
    """Both factors are rounded, each by some 2.6 per cent in root mean square: 0.06 is well above both together. (On a CPU the
    interpreter halves what it should round up to a power of two.)
    """
    allowed = 0.06 if device == "cuda" else 0.4
    x, parts = torch.randn(2, n, k, device=device).to(dtype), layer(device, p, q, r, dtype, k, 48)
    found = passes.fp8_linear(x, *fp8.rounded(parts.encoded_weight, parts.encoder), *parts[1:], 48)
    doubles = [t.double() for t in (x, *parts)]
    label = f"fp8 {p}x{q} r={r} {dtype} {n}x{k}".replace("torch.", "")
    yield label, relative(found, stl.stl_linear(*doubles, out_features=48, backend="reference")), allowed


def captured():
    """Passes in a CUDA graph give what they give outside: no synchronisation hides in them."""
    config = stl.STLConfig(rank=24)
    x = torch.randn(1, 512, 512, device="cuda", dtype=torch.bfloat16)
    options = {"config": config, "device": "cuda", "dtype": torch.bfloat16}
    norm = torch.nn.LayerNorm(512, device="cuda", dtype=torch.bfloat16)
    modules = {
        "linear": stl.STLLinear(512, 512, norm=norm, **options),
        "mlp": stl.STLMLP(512, 512, gated=True, **options),
    }
    for name, module in modules.items():
        with torch.no_grad():
            expected = module(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = module(x)
            graph.replay()
        yield f"CUDA graph of {name}", relative(y, expected.double()), ALLOWED[torch.bfloat16]
        with torch.no_grad():
            y = torch.compile(module, fullgraph=True)(x)
        yield f"torch.compile of {name}", relative(y, expected.double()), ALLOWED[torch.bfloat16]


def far():
    """More than 2³¹ entries, 4.3 GB: the rows beyond are encoded and decoded as those before."""
    x = torch.randn(1, 4, 8192, device="cuda").bfloat16().expand(1, 4, 8192).repeat(1, 2**16 + 4, 1)
    e = torch.randn(24, 4, 4, device="cuda").bfloat16()
    encoded = passes.encode(x, e)
    first = encoded[:, :1]
    yield "encode beyond 2^31", float((encoded != first).any()), 0.5
    y = passes.decode(encoded, e, 1, x.shape[1], x.shape[2])
    yield "decode beyond 2^31", float((y.view(-1, 4, 8192) != y[:, :4]).any()), 0.5


def warm(index, of, ranks):
    """Compile this shard's part of what tuning will try, on few rows: the compiled code is the same and stays on disk."""
    among = list(choices.candidates(16))[index::of]
    for _ in tune.tune(ranks, n=64, k=8192, clock=lambda run: float(run() is None), among=among):
        pass
