"""Configurations of T2T-ViT: what is refused and how it is said."""

import pytest
import torch

from strassen_tile.errors import ConfigError, ShapeError
from strassen_tile.models import T2TConfig, T2TViT, t2t_vit
from strassen_tile.models.sizes import SIZES


def on_meta(name, **options):
    with torch.device("meta"):
        return t2t_vit(name, **options)


@pytest.mark.parametrize(
    ("name", "image_size", "least"), [("t2t_vit_7", 2, 3), ("t2t_vit_mini", 7, 8), ("t2t_vit_micro", 1, 8)]
)
def test_too_small_images_are_named(name, image_size, least):
    message = rf"at least \({least}, {least}\) pixels.*got \({image_size}, {image_size}\)"
    with pytest.raises(ShapeError, match=message):
        t2t_vit(name, image_size=image_size)
    on_meta(name, image_size=least)  # and the size named is enough


def test_least_image_of_unusual_splits_is_exact():
    splits = ((5, 3, 0), (4, 2, 1), (3, 2, 0))
    with pytest.raises(ShapeError, match=r"at least \(20, 20\)"):
        on_meta("t2t_vit_7", image_size=19, splits=splits)
    assert on_meta("t2t_vit_7", image_size=20, splits=splits).config.grid_sizes == (6, 3, 1)


def test_unknown_names_and_options_list_what_there_is():
    with pytest.raises(ConfigError, match="t2t_vit_8.*" + ".*".join(SIZES)):
        t2t_vit("t2t_vit_8")
    with pytest.raises(ConfigError, match=r"unknown option droppath.*drop_path"):
        t2t_vit("t2t_vit_7", droppath=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 3},
        {"depth": 0},
        {"embed_dim": 256.0},
        {"mlp_ratio": 0},
        {"mlp_ratio": "3"},
        {"token_type": "linear"},
        {"pool": "max"},
        {"drop_path": 1.0},
        {"token_dropout": -0.1},
        {"qk_scale": "head"},
        {"splits": ()},
        {"splits": ((3, 2),)},
        {"splits": ((3, 0, 1),)},
        {"image_size": (28, 28)},
        {"num_classes": 0},
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_named(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        t2t_vit("t2t_vit_mini", **{"image_size": 28, **options})


def test_config_is_frozen_and_builds_the_same_model():
    config = T2TConfig(embed_dim=32, depth=2, heads=2, mlp_ratio=1.5, image_size=32, num_classes=3)
    with pytest.raises(AttributeError):
        config.depth = 3
    model = T2TViT(config)
    assert model.blocks[0].mlp.fc1.weight.shape == (48, 32)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
