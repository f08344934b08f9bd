"""T2T-ViT: published names and shapes, positions, small images, isolation of samples, gradients."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from strassen_tile.errors import ShapeError
from strassen_tile.models import t2t_vit
from strassen_tile.models.layers import DropPath, sinusoid_table
from strassen_tile.models.sizes import small_splits

PUBLISHED = json.loads((Path(__file__).parent / "t2t_vit_state_dicts.json").read_text())["models"]
SMALL_VARIANTS = {
    "mean-performer": {},
    "cls-performer": {"pool": "cls"},
    "mean-transformer": {"token_type": "transformer"},
    "three-splits": {"splits": ((3, 1, 1), (3, 2, 1), (3, 1, 1)), "token_dim": 16},
}


def on_meta(name, **options):
    with torch.device("meta"):
        return t2t_vit(name, **options)


def small(name="t2t_vit_micro", *, image_size=8, seed=0, **options):
    torch.manual_seed(seed)
    return t2t_vit(name, num_classes=5, image_size=image_size, in_channels=1, **options)


# --- what checkpoints rely on


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(name):
    rows = sorted([key, list(value.shape)] for key, value in on_meta(name).state_dict().items())
    if "state_dict" in PUBLISHED[name]:  # spelled out for two models, so that a difference can be read
        assert rows == PUBLISHED[name]["state_dict"]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == PUBLISHED[name]["sha256"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_trainable_parameters_are_the_published_ones(name):
    trainable = sum(p.numel() for p in on_meta(name).parameters() if p.requires_grad)
    assert trainable == PUBLISHED[name]["trainable"]


@pytest.mark.parametrize(
    ("name", "millions"),
    {
        "t2t_vit_7": 4.3,
        "t2t_vit_10": 5.9,
        "t2t_vit_12": 6.9,
        "t2t_vit_14": 21.5,
        "t2t_vit_19": 39.2,
        "t2t_vit_24": 64.1,
        "t2t_vit_t_14": 21.5,
        "t2t_vit_t_19": 39.2,
        "t2t_vit_t_24": 64.1,
    }.items(),
)
def test_all_parameters_round_to_the_published_millions(name, millions):
    assert round(sum(p.numel() for p in on_meta(name).parameters()) / 1e6, 1) == millions


def test_sinusoid_table_against_the_formula_one_number_at_a_time():
    tokens, dim = 11, 10
    table = sinusoid_table(tokens, dim)
    assert table.shape == (1, tokens, dim)
    for position in range(tokens):
        for pair in range(dim // 2):
            angle = position * math.exp(-2 * pair / dim * math.log(10000))
            assert table[0, position, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-7)
            assert table[0, position, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-7)


def test_initial_values():
    model = small()
    weights = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, torch.nn.Linear)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    assert all(not m.bias.any() for m in model.modules() if isinstance(m, torch.nn.Linear) and m.bias is not None)
    w = model.tokens_to_token.attention1.w  # orthogonal rows of length sqrt(m)
    torch.testing.assert_close(w @ w.t(), 32.0 * torch.eye(32), rtol=0, atol=1e-4)


def test_positions_are_added_to_the_tokens():
    for pool in ("cls", "mean"):
        model = small(pool=pool)
        with torch.no_grad():
            seen = []
            model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # noqa: B023
            model.tokens_to_token.register_forward_hook(lambda module, args, out: seen.append(out))  # noqa: B023
            model(torch.randn(2, 1, 8, 8))
        tokens, fed = seen
        if pool == "cls":
            tokens = torch.cat([model.cls_token.expand(2, 1, -1), tokens], dim=1)
        torch.testing.assert_close(fed - tokens, sinusoid_table(*tokens.shape[1:]).expand_as(fed), rtol=0, atol=1e-6)


# --- images


@pytest.mark.parametrize(("image_size", "grid"), {8: 4, 9: 4, 10: 4, 11: 4, 12: 4, 16: 4, 28: 7, 32: 8}.items())
@pytest.mark.parametrize("name", ["t2t_vit_mini", "t2t_vit_micro"])
def test_small_images_give_the_promised_grid_and_logits(name, image_size, grid):
    model = small(name, image_size=image_size, depth=1).eval()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    with torch.no_grad():
        logits = model(torch.randn(2, 1, image_size, image_size))
    assert seen == [(2, grid**2, model.config.embed_dim)]
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()


@pytest.mark.parametrize("image_size", range(8, 41))
def test_small_splits_leave_no_pixel_unread(image_size):
    # Without the attention between them: a pixel that reaches no token has no gradient.
    pixels = torch.ones(1, 1, image_size, image_size, requires_grad=True)
    first, second = small_splits(image_size)
    side = first.out_size(image_size)
    tokens = F.unfold(pixels, first.kernel, padding=first.padding, stride=first.stride).sum(dim=1)
    F.unfold(
        tokens.view(1, 1, side, side), second.kernel, padding=second.padding, stride=second.stride
    ).sum().backward()
    assert (pixels.grad > 0).all()


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_t_14"])
def test_published_sizes_take_224_pixels_in_196_tokens_and_a_class_token(name):
    model = on_meta(name, num_classes=10)
    assert model.config.grid_sizes == (56, 28, 14)
    assert model.config.tokens == 197
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 10)


def test_pool_cls_reads_the_class_token_and_pool_mean_every_token():
    for pool, reads in (("cls", [True] + 16 * [False]), ("mean", 16 * [True])):
        model = small(pool=pool).eval()
        tokens = []
        model.norm.register_forward_hook(lambda module, args, out: out.retain_grad() or tokens.append(out))  # noqa: B023
        model(torch.randn(1, 1, 8, 8)).sum().backward()
        assert tokens[0].grad[0].ne(0).any(dim=-1).tolist() == reads


# --- what must hold of any model


@pytest.mark.parametrize("options", SMALL_VARIANTS.values(), ids=SMALL_VARIANTS)
@pytest.mark.parametrize("other", ["noise", "nan"])
def test_a_sample_does_not_see_the_rest_of_its_batch(options, other):
    model = small(**options).eval()
    pixels = torch.randn(3, 1, 8, 8)
    changed = pixels.clone()
    changed[[0, 2]] = torch.randn(2, 1, 8, 8) if other == "noise" else float("nan")
    with torch.no_grad():
        before, after = model(pixels), model(changed)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)
    assert not torch.equal(after[0], before[0])  # the change was one


@pytest.mark.parametrize("options", SMALL_VARIANTS.values(), ids=SMALL_VARIANTS)
def test_gradient_reaches_every_trainable_parameter_and_no_other(options):
    model = small(**options)
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == trainable
    fixed = {name for name, _ in model.named_parameters()} - trainable
    assert "pos_embed" in fixed
    assert all(name == "pos_embed" or name.endswith(".w") for name in fixed)


def test_learns_to_tell_two_images_apart():
    model = small(drop_path=0.1)
    pixels, labels = torch.randn(2, 1, 8, 8).repeat(4, 1, 1, 1), torch.tensor([0, 1]).repeat(4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(pixels), labels).backward()
        optimizer.step()
    assert F.cross_entropy(model.eval()(pixels), labels) < 0.1


def test_double_precision_confirms_single():
    model = small("t2t_vit_mini", image_size=12).eval()
    pixels = torch.randn(2, 1, 12, 12)
    with torch.no_grad():
        single = model(pixels)
        double = model.double()(pixels.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)


def test_drop_path_drops_whole_samples_keeps_the_mean_and_grows_with_depth():
    torch.manual_seed(0)
    dropped = DropPath(0.25).train()(torch.ones(4000, 2, 3))
    values = dropped.flatten(1)
    assert (values == values[:, :1]).all()
    assert values.unique().tolist() == pytest.approx([0, 4 / 3])
    assert values.mean().item() == pytest.approx(1, abs=0.04)
    rates = [block.drop_path.rate for block in small(drop_path=0.3).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    model = small(drop_path=0.9, token_dropout=0.0)
    pixels = torch.randn(1, 1, 8, 8)
    outputs = [model(pixels) for _ in range(4)]
    assert any(not torch.equal(outputs[0], output) for output in outputs[1:])
    assert torch.equal(model.eval()(pixels), model(pixels))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 8, 9), (2, 1, 12, 12), (1, 8, 8)])
def test_wrong_pixels_are_named(shape):
    with pytest.raises(ShapeError, match=r"expected \(B, 1, 8, 8\), got \(" + ", ".join(map(str, shape))):
        small()(torch.zeros(shape))
