"""Whole blocks, dense against STL: an MLP as in the targets, a Llama-shaped decoder block, T2T-ViT-14.

Dense is given the better of eager and torch.compile; STL runs as it stands.
"""

import statistics

import torch
import torch.nn.functional as F
from torch import nn

import strassen_tile as stl
from gpu.timing import best_of
from strassen_tile import models
from strassen_tile.experiments.pairs import interleave

RANKS = (16, 24, 32)


class DenseMLP(nn.Module):
    """gelu, or gated by silu."""

    def __init__(self, k, hidden, gated):
        super().__init__()
        self.up, self.down = nn.Linear(k, hidden, bias=not gated), nn.Linear(hidden, k, bias=not gated)
        self.gate = nn.Linear(k, hidden, bias=False) if gated else None

    def forward(self, x):
        if self.gate is None:
            return self.down(F.gelu(self.up(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Decoder(nn.Module):
    """A Llama block on (B, N, dim): attention with rotary positions, gated MLP, each after an RMSNorm and with a skip.

    Made of dense layers if `config` is None, of STL layers with their norms in them otherwise.
    """

    def __init__(self, dim, heads, hidden, config):
        super().__init__()
        self.heads = heads
        norms = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        if config is None:
            self.qkv = nn.Sequential(norms[0], nn.Linear(dim, 3 * dim, bias=False))
            self.out = nn.Linear(dim, dim, bias=False)
            self.mlp = nn.Sequential(norms[1], DenseMLP(dim, hidden, gated=True))
        else:
            self.qkv = stl.STLLinear(dim, 3 * dim, bias=False, config=config, norm=norms[0])
            self.out = stl.STLLinear(dim, dim, bias=False, config=config)
            options = {"gated": True, "activation": "silu", "bias": False}
            self.mlp = stl.STLMLP(dim, hidden, config=config, norm=norms[1], **options)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def rotated(x):
    """Rotary positions (Su et al. 2021): pairs of features turned by position / 10000^(2j/d)."""
    n, d = x.shape[-2:]
    angle = torch.arange(n, device=x.device)[:, None] / 10000 ** (torch.arange(0, d, 2, device=x.device) / d)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def blocks(tiny):
    """(name, rank, dense, STL, input shape). The Llama block is causal: rows of a tile see each other backwards only."""
    wide, rows = (64, 16) if tiny else (8192, 8192)
    dim, heads, hidden, samples, tokens = (32, 2, 48, 1, 8) if tiny else (4096, 32, 11008, 4, 2048)
    for rank in RANKS:
        config = stl.STLConfig(rank=rank)
        yield (
            "mlp",
            rank,
            lambda: DenseMLP(wide, wide, False),
            lambda c=config: stl.STLMLP(wide, wide, config=c),
            (1, rows, wide),
        )
    for rank in RANKS:
        config = stl.STLConfig(rank=rank, mixing="causal")
        make = [lambda c=c: Decoder(dim, heads, hidden, c) for c in (None, config)]
        yield "llama-block", rank, *make, (samples, tokens, dim)
    side = 8 if tiny else 224
    size = {"image_size": side, "in_channels": 3} if tiny else {}

    def vision():
        return models.t2t_vit("t2t_vit_nano" if tiny else "t2t_vit_14", **size)

    for rank in RANKS[:2]:

        def converted(rank=rank):
            model = vision()
            pixels = torch.randn(2, 3, side, side)
            keep = lambda _, name: name.startswith("blocks.")  # noqa: E731
            stl.convert(model, stl.STLConfig(rank=rank), example_inputs=pixels, filter_fn=keep)
            stl.fuse_mlps(model)
            return model

        yield "t2t_vit_14", rank, vision, converted, (2 if tiny else 128, 3, side, side)


def measure(device, dtype, seconds, tiny, where):
    """A row a block and rank."""
    kept = {}
    for name, rank, make_dense, make_stl, shape in blocks(tiny):
        x = torch.randn(shape, device=device, dtype=dtype)
        with torch.inference_mode():
            if name not in kept:
                kept.clear()
                dense = make_dense().to(device, dtype).eval()
                kept[name] = (x, *best_of(lambda dense=dense, x=x: dense(x), device))
            x, run, how = kept[name]
            other = make_stl().to(device, dtype).eval()
            assert other(x).shape == run().shape
            pairs = interleave(run, lambda other=other, x=x: other(x), seconds, device)
        yield {
            "block": name, "device": device, "dtype": str(dtype).removeprefix("torch."), "pass": "forward", "method": "stl",
            "rank": rank, "shape": "x".join(map(str, shape)), "dense": how,
            "median_s": statistics.median(b for _, b in pairs), "dense_s": statistics.median(a for a, _ in pairs),
            "speedup": statistics.median(a / b for a, b in pairs), "pairs": len(pairs), **where,
        }  # fmt: skip
