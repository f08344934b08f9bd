"""Token modules and attention against direct computations of the same thing."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from strassen_tile.models import t2t_vit
from strassen_tile.models.layers import Attention
from strassen_tile.models.token_modules import (
    TokenPerformer,
    TokensToToken,
    TokenTransformer,
    linear_attention,
    positive_features,
)


def randomised(module, std=0.3):
    """Every parameter away from its initial value, so that no term of a formula is hidden by a zero or a one."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.endswith("w"):
                parameter.add_(torch.randn_like(parameter), alpha=std)
    return module.double().eval()


def performer_by_definition(module, x):
    """Quadratic cost, one pair of tokens at a time in the weights: y_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j)."""
    normal = F.layer_norm(x, x.shape[-1:], module.norm1.weight, module.norm1.bias)
    dim = module.proj.in_features
    k, q, v = F.linear(normal, module.kqv.weight, module.kqv.bias).split(dim, dim=-1)
    w = module.w

    def features(u):
        return torch.stack(
            [(u @ row - (u * u).sum(-1) / 2).exp() / math.sqrt(len(w)) for row in w], dim=-1
        )  # (B, N, m)

    weights = (features(q)[:, :, None, :] * features(k)[:, None, :, :]).sum(-1)  # (B, N, N)
    y = (weights[..., None] * v[:, None]).sum(2) / (weights.sum(-1, keepdim=True) + 1e-8)
    y = v + F.linear(y, module.proj.weight, module.proj.bias)
    hidden = F.layer_norm(y, (dim,), module.norm2.weight, module.norm2.bias)
    hidden = F.gelu(F.linear(hidden, module.mlp[0].weight, module.mlp[0].bias))
    return y + F.linear(hidden, module.mlp[2].weight, module.mlp[2].bias)


def test_performer_equals_the_quadratic_computation():
    torch.manual_seed(0)
    module = randomised(TokenPerformer(18, 16))
    x = torch.randn(2, 21, 18, dtype=torch.float64)
    torch.testing.assert_close(module(x), performer_by_definition(module, x), rtol=1e-10, atol=1e-10)


def test_performer_with_k_and_q_exchanged_is_another_function():
    # So the test above, whose definition splits k, q, v as the published weights do, fails on another order.
    torch.manual_seed(0)
    module = randomised(TokenPerformer(18, 16))
    x = torch.randn(1, 9, 18, dtype=torch.float64)
    before = module(x)
    with torch.no_grad():
        for tensor in (module.kqv.weight, module.kqv.bias):
            tensor.copy_(torch.cat([tensor[16:32], tensor[:16], tensor[32:]]))
    assert (module(x) - before).abs().max() > 1e-3


def test_positive_features_estimate_the_exponential_kernel():
    torch.manual_seed(0)
    u, v = 0.25 * torch.randn(2, 1, 5, 8, dtype=torch.float64)
    w = torch.randn(400_000, 8, dtype=torch.float64)  # Gaussian rows: the estimate is unbiased
    estimate = positive_features(u, w) @ positive_features(v, w).transpose(1, 2)
    torch.testing.assert_close(estimate, (u @ v.transpose(1, 2)).exp(), rtol=0.02, atol=0)


@pytest.mark.parametrize("mode", ["autocast", "half"])
def test_performer_in_half_precision_rounds_its_attention_only_once(mode):
    # What proj is fed may differ from the exact attention of the same q, k, v by bfloat16's last rounding and no more:
    # exponents worked out in bfloat16 would be off by several per cent.
    torch.manual_seed(0)
    module = TokenPerformer(18, 64).eval()
    fed = {}
    module.kqv.register_forward_hook(lambda _, args, out: fed.update(kqv=out))
    module.proj.register_forward_pre_hook(lambda _, args: fed.update(y=args[0]))
    x = torch.randn(2, 50, 18)
    with torch.no_grad():
        if mode == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                module(x)
        else:
            module.bfloat16()(x.bfloat16())
    assert fed["y"].dtype == fed["kqv"].dtype == torch.bfloat16
    k, q, v = fed["kqv"].double().chunk(3, dim=-1)
    expected = linear_attention(q, k, v, module.w.double())
    torch.testing.assert_close(fed["y"].double(), expected, rtol=2**-8, atol=1e-5)


def test_performer_survives_float16_sums_beyond_its_range():
    module = TokenPerformer(4, 8).eval()
    with torch.no_grad():
        module.w.zero_()  # every feature is exp(−|u|²/2)/√m: with q = k = 0 the sums over tokens are N/m · values
        module.kqv.weight.zero_()
        module.kqv.bias.zero_()
        module.kqv.bias[16:] = 100.0
        out = module.half()(torch.zeros(1, 3136, 4, dtype=torch.float16))
    # Σ φ(k) v = 3136 · 100/2 is above 65504, float16's largest number.
    assert out.isfinite().all()


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_equals_torchs_own(heads):
    torch.manual_seed(0)
    module = randomised(Attention(24, 24, heads, scale=0.37, qkv_bias=True))
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    q, k, v = (part.view(2, 13, heads, -1).transpose(1, 2) for part in module.qkv(x).chunk(3, dim=-1))
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.37).transpose(1, 2).reshape(2, 13, 24)
    torch.testing.assert_close(module(x), module.proj(expected), rtol=1e-10, atol=1e-10)


def test_transformer_token_module_scales_by_its_input_width_and_adds_v():
    torch.manual_seed(0)
    module = randomised(TokenTransformer(18, 16))
    x = torch.randn(2, 10, 18, dtype=torch.float64)
    q, k, v = module.attn.qkv(module.norm1(x)).split(16, dim=-1)
    attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=18**-0.5)[:, 0]
    y = v + module.attn.proj(attended)
    y = y + module.mlp.fc2(F.gelu(module.mlp.fc1(module.norm2(y))))
    torch.testing.assert_close(module(x), y, rtol=1e-10, atol=1e-10)


def test_block_scale_is_head_dim_unless_given():
    assert t2t_vit("t2t_vit_micro", image_size=8).blocks[0].attn.scale == pytest.approx(32**-0.5)
    assert t2t_vit("t2t_vit_micro", image_size=8, qk_scale=128**-0.5).blocks[3].attn.scale == pytest.approx(128**-0.5)


def test_soft_splits_keep_the_picture_upright():
    # With the attention taken out, soft split and project are two convolutions of the same kernels and strides.
    torch.manual_seed(0)
    module: TokensToToken = t2t_vit("t2t_vit_micro", image_size=28, in_channels=2).tokens_to_token.double()
    first, second = module.splits
    mix = nn.Linear(2 * first.kernel**2, 64).double()
    module.attention1 = mix
    pixels = torch.randn(1, 2, 28, 28, dtype=torch.float64)
    maps = F.conv2d(pixels, mix.weight.view(64, 2, 3, 3), mix.bias, stride=first.stride, padding=first.padding)
    project = module.project
    maps = F.conv2d(maps, project.weight.view(-1, 64, 3, 3), project.bias, stride=second.stride, padding=second.padding)
    torch.testing.assert_close(module(pixels), maps.flatten(2).transpose(1, 2), rtol=1e-10, atol=1e-10)
