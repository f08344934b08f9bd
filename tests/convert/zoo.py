"""Architectures for the test of non-interference, each small: what sees what is in their docstrings, not in their names."""

import torch
import torch.nn.functional as F
from torch import nn

D, VOCABULARY = 8, 31


def bend(x):
    """An activation that lets some of everything through, so that a test need not look twice."""
    return x + torch.tanh(x)


class Attention(nn.Module):
    def __init__(self, causal=False):
        super().__init__()
        self.qkv, self.proj, self.causal = nn.Linear(D, 3 * D), nn.Linear(D, D), causal

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal))


class Block(nn.Module):
    """A transformer block. Zero gates, as in ReZero, LayerScale or DiT, where asked for."""

    def __init__(self, causal=False, gate=1.0):
        super().__init__()
        self.norm1, self.norm2, self.gate = nn.LayerNorm(D), nn.LayerNorm(D), nn.Parameter(torch.tensor(gate))
        self.attention, self.up, self.down = Attention(causal), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x):
        x = x + self.gate * self.attention(self.norm1(x))
        return x + self.gate * self.down(bend(self.up(self.norm2(x))))


class Language(nn.Module):
    """Tokens (B, N) → what `output` makes of the hidden rows and the logits. Two blocks."""

    def __init__(self, causal, output="logits", first=False, gate=1.0, prepend=False):
        super().__init__()
        self.embed, self.output = nn.Embedding(VOCABULARY, D), output
        self.first = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D)) if first else nn.Identity()
        self.start = nn.Parameter(torch.randn(1, 1, D)) if prepend else None
        self.blocks = nn.Sequential(Block(causal, gate), Block(causal, gate))
        self.norm, self.words = nn.LayerNorm(D), nn.Linear(D, VOCABULARY)

    def forward(self, ids):
        x = self.first(self.embed(ids.long()))
        if self.start is not None:
            x = torch.cat([self.start.expand(len(x), -1, -1), x], dim=1)
        x = self.norm(self.blocks(x))
        if self.output == "pooled":
            return x.mean(dim=1)
        if self.output == "classes":
            return self.words(x.mean(dim=1))
        if self.output == "last":
            return self.words(x[:, [-1]])
        logits = self.words(x)
        if self.output == "loss":
            return F.cross_entropy(logits[:, -ids.shape[1] : -1].flatten(0, 1), ids[:, 1:].long().flatten())
        return logits.flatten(0, 1) if self.output == "flat" else logits.log_softmax(-1)


class SideHead(Language):
    """A causal language model, and a head beside it that reads both ways."""

    def __init__(self):
        super().__init__(causal=True)
        self.side, self.answer = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, ids):
        x = self.embed(ids)
        return super().forward(ids), self.answer(self.side(x + x.mean(dim=1, keepdim=True)).mean(dim=1))


class Pairs(Language):
    """Causal, two tokens a row."""

    def __init__(self):
        super().__init__(causal=True)
        self.join = nn.Linear(2 * D, D)

    def forward(self, ids):
        return self.words(self.blocks(self.join(self.embed(ids).unflatten(1, (-1, 2)).flatten(2)))).log_softmax(-1)


class Vision(nn.Module):
    """Pixels → classes, by the mean of all tokens or by the first; patches by a linear layer."""

    def __init__(self, token=False):
        super().__init__()
        self.patch, self.blocks, self.norm = nn.Linear(48, D), nn.Sequential(Block(), Block()), nn.LayerNorm(D)
        self.token, self.head = nn.Parameter(torch.randn(1, 1, D)) if token else None, nn.Linear(D, 5)

    def forward(self, pixels):
        x = self.patch(patches(pixels))
        x = x if self.token is None else torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        x = self.norm(self.blocks(x))
        return self.head(x.mean(dim=1) if self.token is None else x[:, 0])


def patches(pixels):
    return pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)


class Mixer(nn.Module):
    """MLPs over tokens and over channels, in turn; causal over tokens where asked for."""

    def __init__(self, tokens=16):
        super().__init__()
        self.patch, self.norm = nn.Linear(48, D), nn.LayerNorm(D)
        self.over, self.back = nn.Linear(tokens, 2 * tokens), nn.Linear(2 * tokens, tokens)
        self.up, self.down, self.head = nn.Linear(D, 2 * D), nn.Linear(2 * D, D), nn.Linear(D, 5)

    def forward(self, pixels):
        x = self.patch(patches(pixels))
        x = x + self.back(bend(self.over(self.norm(x).mT))).mT
        x = x + self.down(bend(self.up(self.norm(x))))
        return self.head(self.norm(x).mean(dim=1))


class Diffusion(nn.Module):
    """A diffusion transformer: all that a block adds is scaled by numbers that start at zero, and so does its last layer."""

    def __init__(self):
        super().__init__()
        self.patch, self.time, self.gates = nn.Linear(48, D), nn.Linear(1, D), nn.Linear(D, 4 * D)
        self.attention, self.up, self.down = Attention(), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.final = nn.Linear(D, 48)
        for layer in (self.gates, self.final):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, pixels, t):
        a, b, c, d = self.gates(F.silu(self.time(t[:, None])))[:, None].chunk(4, -1)
        x = self.patch(patches(pixels))
        x = x + a * self.attention(F.layer_norm(x, (D,)) * (1 + b))
        return self.final(x + c * self.down(bend(self.up(F.layer_norm(x, (D,)) * (1 + d)))))


class Recurrent(nn.Module):
    """Rows through a recurrent network: forwards, backwards in time, or both ways."""

    def __init__(self, way="forwards"):
        super().__init__()
        self.way, both = way, way == "both"
        self.before, self.after = nn.Linear(D, D), nn.Linear(D * (1 + both), D)
        self.net = nn.GRU(D, D, batch_first=True, bidirectional=both)

    def forward(self, x):
        turn = (lambda t: t.flip(1)) if self.way == "backwards" else (lambda t: t)
        return bend(self.after(turn(self.net(turn(bend(self.before(x))))[0])))


class Windows(nn.Module):
    """Attention within windows of rows, shifted by half in a second block where asked for; then a layer on all rows."""

    def __init__(self, width, shift=0, five=False):
        super().__init__()
        self.width, self.shift, self.five = width, shift, five
        self.block, self.after = Block(), nn.Linear(D, D)

    def forward(self, x):
        n = x.shape[1]
        y = x.roll(-self.shift, 1).unflatten(1, (n // self.width, self.width))
        y = self.block(y) if self.five else self.block(y.flatten(0, 1)).view_as(y)
        return bend(self.after(y.flatten(1, 2).roll(self.shift, 1)))


class Retention(nn.Module):
    """Decaying memory of earlier rows, by a masked product."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x):
        n = x.shape[1]
        decay = (0.9 ** (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0).to(x)).tril()
        return self.out(F.layer_norm((self.q(x) @ self.k(x).mT * decay) @ self.v(x), (D,)))


class Scan(nn.Module):
    """A gated scan over rows, as in Mamba: forwards, or both ways as in vision."""

    def __init__(self, both=False):
        super().__init__()
        self.both, self.inner, self.step, self.out = both, nn.Linear(D, 2 * D), nn.Linear(D, D), nn.Linear(D, D)

    def scan(self, u):
        keep, state, states = torch.sigmoid(self.step(u)), torch.zeros_like(u[:, 0]), []
        for t in range(u.shape[1]):
            state = keep[:, t] * state + (1 - keep[:, t]) * u[:, t]
            states.append(state)
        return torch.stack(states, dim=1)

    def forward(self, x):
        u, gate = self.inner(x).chunk(2, -1)
        y = self.scan(u) + (self.scan(u.flip(1)).flip(1) if self.both else 0)
        return bend(self.out(y * F.silu(gate)))


class Convolutions(nn.Module):
    """Layers between convolutions over rows: causal ones, or local ones that see one row to each side."""

    def __init__(self, causal):
        super().__init__()
        self.causal, self.first, self.second = causal, nn.Linear(D, D), nn.Linear(D, D)
        self.conv1, self.conv2 = nn.Conv1d(D, D, 3), nn.Conv1d(D, D, 3)

    def forward(self, x):
        sides = (2, 0) if self.causal else (1, 1)
        x = bend(self.first(self.conv1(F.pad(x.mT, sides)).mT))
        return bend(self.second(self.conv2(F.pad(x.mT, sides)).mT))


class UNet(nn.Module):
    """Rows at two scales, joined again; attention at the coarse one."""

    def __init__(self):
        super().__init__()
        self.fine, self.join = nn.Linear(D, D), nn.Linear(2 * D, D)
        self.shrink, self.block, self.grow = nn.Conv1d(D, D, 4, 4), Block(), nn.ConvTranspose1d(D, D, 4, 4)

    def forward(self, x):
        x = bend(self.fine(x))
        return bend(self.join(torch.cat([x, self.grow(self.block(self.shrink(x.mT).mT).mT).mT], dim=-1)))


class Folded(nn.Module):
    """`group` samples side by side in the rows of a layer, or interleaved; rows of a sample meet in a block before."""

    def __init__(self, group, interleaved=False):
        super().__init__()
        self.group, self.interleaved, self.block, self.layer = group, interleaved, Block(), nn.Linear(D, D)

    def forward(self, x):
        b, n, k = x.shape
        x = self.block(x).view(b // self.group, self.group, n, k)
        x = x.transpose(1, 2) if self.interleaved else x
        y = bend(self.layer(x.reshape(b // self.group, self.group * n, k)))
        y = y.view(b // self.group, n, self.group, k).transpose(1, 2) if self.interleaved else y
        return y.reshape(b, n, k)


class Shared(nn.Module):
    """One layer called on (B, N, K), where rows of a sample may meet, and on (N, B, K)."""

    def __init__(self):
        super().__init__()
        self.block, self.layer = Block(), nn.Linear(D, D)

    def forward(self, x):
        x = self.block(x)
        x = bend(self.layer(x)).transpose(0, 1)
        return bend(self.layer(x)).transpose(0, 1)


class FiveDimensions(nn.Module):
    """(B, T, H, N, K): rows along N meet; then a layer on them, or on rows along H, which do not."""

    def __init__(self, turned=False):
        super().__init__()
        self.block, self.after, self.turned = Block(), nn.Linear(D, D), turned

    def forward(self, x):
        y = self.block(x.flatten(0, 2)).view_as(x)
        return bend(self.after(y.transpose(2, 3) if self.turned else y))


class Cross(nn.Module):
    """Rows of one input read all rows of another; they do not meet each other."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)

    def forward(self, x, context):
        k, v = self.kv(context).chunk(2, -1)
        return x + bend(self.out(F.scaled_dot_product_attention(self.q(x), k, v)))


class Experts(nn.Module):
    """Attention, then a sparse mixture of experts that are fed the rows of all samples routed to them."""

    def __init__(self, attention=True):
        super().__init__()
        self.attention, self.router = Attention() if attention else nn.Identity(), nn.Linear(D, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D)) for _ in range(3))

    def forward(self, x):
        x = x + self.attention(x)
        scores, y = self.router(x), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = scores.argmax(-1) == number
            y[chosen] = expert(x[chosen])
        return y * scores.softmax(-1).amax(-1, keepdim=True)


class SetTransformer(nn.Module):
    """Induced attention, a layer row by row, pooling by attention."""

    def __init__(self):
        super().__init__()
        self.induced, self.seed = nn.Parameter(torch.randn(1, 5, D)), nn.Parameter(torch.randn(1, 1, D))
        self.reads, self.writes, self.rows, self.pool = Cross(), Cross(), nn.Linear(D, D), Cross()

    def forward(self, x):
        x = self.writes(x, self.reads(self.induced.expand(len(x), -1, -1), x))
        return self.pool(self.seed.expand(len(x), -1, -1), bend(self.rows(x)))[:, 0]


class TwoTowers(nn.Module):
    """Images both ways and text causally, as in CLIP; compared in the end."""

    def __init__(self):
        super().__init__()
        self.vision, self.text = Vision(), Language(causal=True)
        self.of_text = nn.Linear(VOCABULARY, 5)

    def forward(self, pixels, ids):
        image, text = self.vision(pixels), self.of_text(self.text(ids)[:, -1])
        return image @ text.mT, image, text


class Writer(nn.Module):
    """An encoder, and a causal decoder that reads it."""

    def __init__(self):
        super().__init__()
        self.embed, self.reader, self.writer = nn.Embedding(VOCABULARY, D), Block(), Block(causal=True)
        self.cross, self.after = Cross(), nn.Linear(D, D)

    def forward(self, source, target):
        memory = self.reader(self.embed(source))
        return bend(self.after(self.cross(self.writer(self.embed(target)), memory)))


class Field(nn.Module):
    """Points that a code and their positions say all of; they do not meet."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, code, positions):
        return bend(self.b(bend(self.a(positions.to(code.dtype).expand(-1, -1, D) + code[:, None]))))


class Masked(nn.Module):
    """Attention under a pattern (B, N, N) that `pattern` makes of a second input; rows that nobody reads are their own."""

    def __init__(self, pattern):
        super().__init__()
        self.block, self.pattern = Attention(), pattern

    def forward(self, x, second):
        n = x.shape[1]
        allowed = self.pattern(second, n) | torch.eye(n, dtype=torch.bool)
        q, k, v = self.block.qkv(x).chunk(3, -1)
        return x + self.block.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed))


class Crossing(nn.Module):
    """(B, H, W, D): a cell sees its line and its column."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x):
        return bend(self.layer(bend(x + x.mean(1, keepdim=True) + x.mean(2, keepdim=True))))


class Heads(nn.Module):
    """A causal block, a block both ways, and a statistic over all samples beside them."""

    def __init__(self):
        super().__init__()
        self.causal, self.both, self.turned, self.aside = Block(causal=True), Block(), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        turned = bend(self.turned(x.transpose(0, 1))).transpose(0, 1)
        return self.causal(x), self.both(x), turned, self.aside(x.mean(dim=(0, 1))[None, None])
