"""What stands in --methods: which runs that is, how each is told from the others, and what is refused."""

import warnings

import pytest
import torch

from strassen_tile.errors import BasisError, ConfigError
from strassen_tile.experiments.methods import Methods
from strassen_tile.experiments.recipe import recipe_of
from strassen_tile.experiments.settings import listed
from strassen_tile.models import t2t_vit


def names(methods: str, **settings: object) -> list[tuple[str, int | None, str]]:
    made = Methods(methods=listed(methods), **{"ranks": (16, 24), **settings}).roster()
    return [(one.method.name, one.method.rank, one.variant) for one in made]


def test_an_entry_alone_has_no_variant_but_its_rank() -> None:
    """As rows had it before there were variants (low rank apart): folders begun then go on."""
    assert names("dense,2:4,stl,low-rank,dense+mix") == [
        ("dense", None, ""),
        ("2:4", None, ""),
        ("stl", 16, "r=16"),
        ("stl", 24, "r=24"),
        ("low-rank", None, "0.25 of the FLOPs"),
        ("dense+mix", None, ""),
    ]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("stl[rank=6,mixing=none,tile=1x4x4]", [("stl", 6, "r=6, tile 1×4×4, mixing none")]),
        ("stl[ rank = 6 , mixing = none ]", [("stl", 6, "r=6, tile 1×4×4, mixing none")]),
        ("stl[encoder_scope=tile]", [("stl", 16, "r=16, scope tile"), ("stl", 24, "r=24, scope tile")]),
        ("stl[rank=24,mixing=sequence,tile=4]", [("stl", 24, "r=24")]),
        ("stl[rank=49,init=strassen,train_encoder=false]", [("stl", 49, "r=49, start strassen, encoder fixed")]),
        ("low-rank[flop_ratio=0.25]", [("low-rank", None, "0.25 of the FLOPs")]),
        ("dense[weight_decay=0]", [("dense", None, "decay 0")]),
        ("dense[weight_decay=0.05,lr=1e-3]", [("dense", None, "decay 0.05, lr 0.001")]),
    ],
)
def test_a_variant_says_what_is_not_as_the_recipe_has_it(entry, expected) -> None:
    assert names(entry) == expected


def test_what_the_recipe_says_is_no_variant() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no rank of 16 on a tile of 1×4×4 is made on the way
        assert names("stl,stl[mixing=sequence]", mixing="none", tile=(4, 4, 4), ranks=(6,)) == [
            ("stl", 6, "r=6"),
            ("stl", 6, "r=6, tile 4×4×4, mixing sequence"),
        ]


def test_settings_of_an_entry_are_those_of_its_layers() -> None:
    (one,) = Methods(methods=("stl[rank=5,tile=2x3x4,mixing=none,encoder_scope=tile,train_decoder=false]",)).roster()
    assert one.variant == "r=5, tile 1×3×4, mixing none, scope tile, decoder fixed"
    model = t2t_vit("t2t_vit_micro", num_classes=10, image_size=8, in_channels=1)
    found = one.method.apply(model, torch.randn(2, 1, 8, 8), lambda _, name: name.startswith("blocks."))
    for layer in found.converted.values():
        config = layer.config
        assert (config.pqs, config.rank, config.mixing, config.encoder_scope) == ((1, 3, 4), 5, "none", "tile")
        assert layer.encoder.requires_grad and not layer.decoder.requires_grad


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("denes", "unknown methods denes; there are dense, 2:4, stl, low-rank, monarch, rotated, dense\\+mix"),
        ("", "unknown methods"),
        ("stl[rank=24", r"name or name\[key=value,…\] is wanted; got 'stl\[rank=24'"),
        ("stl]", "name or name"),
        ("stl[rank]", "stl: key=value is wanted; got 'rank'"),
        ("stl[]", "stl: key=value is wanted; got ''"),
        ("stl[rank=24,rank=16]", "stl: rank is given twice"),
        ("stl[rnak=24]", "stl: unknown key 'rnak'; there are tile, mixing, .*rank"),
        ("dense[rank=24]", "dense: unknown key 'rank'"),
        ("stl[rank=two]", "stl: rank: a whole number .* is wanted; got 'two'"),
        ("stl[mixing=some]", "stl: mixing: one of sequence, none, causal is wanted; got 'some'"),
        ("stl[tile=0]", "stl: tile"),
        ("stl[rank=0]", "rank must be a positive integer"),
        ("stl[init=als]", "stl: init: one of random, orthogonal, signs, approximate"),
        ("stl[rank=24,init=strassen]", "has rank 49"),
        ("low-rank[flop_ratio=nan]", "positive and finite"),
        ("stl,stl[rank=24]", "the same run twice: stl r=24"),
        ("stl[mixing=none,rank=6],stl[mixing=none,tile=1x4x4,rank=6]", "the same run twice"),
        ("dense,dense", "the same run twice: dense"),
        ("dense,dense[mix=none]", "the same run twice: dense"),
        ("dense[mix=some]", "dense: mix: one of none, causal, symmetric, tile, grid is wanted"),
        ("monarch[flop_ratio=0]", "monarch: flop_ratio must be positive"),
    ],
)
def test_what_is_no_method_is_refused(methods, message) -> None:
    with pytest.raises(ConfigError, match=message):
        names(methods)


@pytest.mark.parametrize("settings", [{"ranks": ()}, {"ranks": (16, 16)}, {"seeds": (1, 1)}, {"mixing": "some"}])
def test_settings_that_make_no_sense_are_refused(settings) -> None:
    with pytest.raises(ConfigError):
        names("stl", **settings)


def test_starts_of_their_own_are_of_language_models() -> None:
    with pytest.raises(ConfigError, match="init_range is for language models"):
        recipe_of("digits", ["methods=dense[init_range=0.1]"])


def test_low_rank_has_the_products_of_the_smallest_rank_and_needs_one() -> None:
    with pytest.raises(ConfigError, match="low-rank takes the FLOPs of the smallest rank"):
        names("low-rank", ranks=())
    assert names("low-rank[flop_ratio=0.5]", ranks=()) == [("low-rank", None, "0.5 of the FLOPs")]


def test_a_basis_that_is_not_there_is_said_before_anything_runs() -> None:
    with pytest.raises(BasisError, match="no approximate basis"):
        names("dense,stl[init=approximate,rank=7]")


def test_low_rank_has_the_flops_of_the_smallest_rank_where_rows_are_apart() -> None:
    """6 products of 16, not of 64."""
    assert names("low-rank", ranks=(6, 8), mixing="none") == [("low-rank", None, "0.375 of the FLOPs")]
