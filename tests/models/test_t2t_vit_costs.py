"""MACs of T2T-ViT: torch's counter against the formula and against the published figures.

Definition: every matrix product, in linear layers, inside attention and in the performer's features and sums; one MAC a
multiplication and addition; nothing elementwise. One image of 224×224, 1000 classes.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from strassen_tile.models import T2TConfig, t2t_vit

# From the authors' README; 13.8 is left to a test of its own.
PUBLISHED_GMACS = {
    "t2t_vit_7": 1.1,
    "t2t_vit_10": 1.5,
    "t2t_vit_12": 1.8,
    "t2t_vit_14": 4.8,
    "t2t_vit_19": 8.5,
    "t2t_vit_t_14": 6.1,
    "t2t_vit_t_19": 9.8,
    "t2t_vit_t_24": 15.0,
}
ALL_NAMES = [*PUBLISHED_GMACS, "t2t_vit_24"]


def macs(name, *, device="meta", training=False, image_size=224, **options):
    with torch.device(device):
        model = t2t_vit(name, image_size=image_size, **options).train(training)
        pixels = torch.zeros(1, 3, image_size, image_size)
    with FlopCounterMode(display=False) as counter:
        model(pixels)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2, model.config


def macs_by_formula(config: T2TConfig) -> tuple[int, int]:
    """(in linear layers, inside attention)."""
    dim, t, m = config.embed_dim, config.token_dim, config.token_dim // 2
    linear, products, channels = 0, 0, config.in_channels
    for split, grid in zip(config.splits[:-1], config.grid_sizes[:-1], strict=True):
        n = grid**2
        linear += n * (channels * split.kernel**2 * 3 * t + 3 * t * t)  # qkv, proj, two layers of the MLP
        # Performer: features of q and of k, Σ φ(k) v, φ(q) times it, and the normaliser.
        products += n * (4 * t * m + m) if config.token_type == "performer" else 2 * n * n * t
        channels = t
    linear += config.grid_sizes[-1] ** 2 * channels * config.splits[-1].kernel ** 2 * dim
    n = config.tokens
    linear += config.depth * n * (4 * dim * dim + 2 * dim * int(dim * config.mlp_ratio))
    products += config.depth * 2 * n * n * dim
    return linear + dim * config.num_classes, products


@pytest.mark.parametrize("name", ALL_NAMES)
def test_counted_macs_are_the_formulas(name):
    counted, config = macs(name)
    assert counted == sum(macs_by_formula(config))


@pytest.mark.parametrize("name", PUBLISHED_GMACS)
def test_macs_round_to_the_published_figure(name):
    assert round(macs(name)[0] / 1e9, 1) == PUBLISHED_GMACS[name]


def test_attention_has_to_be_counted_to_give_the_published_figures():
    # Linear layers alone would print 1.0, 1.3, 1.5, 4.3: what a counter that cannot see attention shows.
    for name in ("t2t_vit_7", "t2t_vit_10", "t2t_vit_12", "t2t_vit_14"):
        linear, _ = macs_by_formula(macs(name)[1])
        assert round(linear / 1e9, 1) < PUBLISHED_GMACS[name]


def test_the_published_figure_of_t2t_vit_24_is_not_reproduced():
    # Published 13.8. The count is 13.66, and the published table contradicts itself: the two token modules differ by
    # the same MACs at every size, so 15.0 for t2t_vit_t_24 leaves less than 15.05 − 1.305 = 13.745 here.
    difference = {size: macs(f"t2t_vit_t_{size}")[0] - macs(f"t2t_vit_{size}")[0] for size in (14, 19, 24)}
    assert set(difference.values()) == {1_305_253_376}
    assert macs("t2t_vit_24")[0] == 13_661_874_688


@pytest.mark.parametrize("options", [{}, {"token_type": "transformer"}, {"pool": "cls"}], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_cpu_counts_what_meta_counts_in_both_modes(options, training):
    # F.scaled_dot_product_attention would be counted on meta and not on CPU.
    on_cpu, config = macs("t2t_vit_micro", device="cpu", training=training, image_size=12, drop_path=0.1, **options)
    assert on_cpu == macs("t2t_vit_micro", training=training, image_size=12, drop_path=0.1, **options)[0]
    assert on_cpu == sum(macs_by_formula(config))
