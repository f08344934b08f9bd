"""If these fail, a saved configuration comes back as another one, or a wrong one is accepted and trained."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from strassen_tile import STLConfig, STLLinear, bases
from strassen_tile.errors import BasisError, ConfigError

SIDE = some.integers(1, 16)
CONFIGS = some.builds(
    STLConfig,
    tile=SIDE | some.tuples(SIDE, SIDE, SIDE) | some.lists(SIDE, min_size=3, max_size=3),
    rank=some.integers(1, 512),
    basis=some.sampled_from(["random", "approximate", "naive", "strassen"]) | some.text(),
    mixing=some.sampled_from(["sequence", "none", "causal"]),
    encoder_scope=some.sampled_from(["layer", "tile"]),
    init=some.sampled_from(["auto", "random", "fit"]),
    train_encoder=some.booleans(),
    train_decoder=some.booleans(),
    backend=some.sampled_from(["auto", "reference", "cpu", "triton"]),
    recompute=some.booleans(),
)


@given(CONFIGS)
def test_json_gives_the_same_config_back(config):
    assert STLConfig.from_json(config.to_json()) == config
    assert STLConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert set(config.to_dict()) == {field.name for field in dataclasses.fields(STLConfig)}
    assert hash(STLConfig.from_json(config.to_json())) == hash(config)


@given(CONFIGS)
def test_repr_gives_the_same_config_back(config):
    assert eval(repr(config)) == config


@given(CONFIGS, CONFIGS)
def test_json_differs_where_configs_do(one, other):
    assert (one.to_json() == other.to_json()) == (one == other)


def test_config_from_a_file_takes_defaults_for_what_is_missing(tmp_path):
    (tmp_path / "config.json").write_text('{"rank": 7, "tile": [4, 2, 8]}', encoding="utf-8")
    assert STLConfig.load(tmp_path / "config.json") == STLConfig(tile=(4, 2, 8), rank=7)


@pytest.mark.parametrize("text", ["", "[]", "4", "null", '"rank"', "{", '{"rank": 1'])
def test_text_that_is_no_json_object_is_refused(text):
    with pytest.raises(ConfigError):
        STLConfig.from_json(text)


@pytest.mark.parametrize("record", [{"ranks": 3}, {"rank": 3, "Tile": 4}, {3: 4, "x": 1}])
def test_unknown_keys_are_refused_and_named(record):
    with pytest.raises(ConfigError, match=r"unknown keys .*(ranks|Tile|3)"):
        STLConfig.from_dict(record)


BAD = [
    *({"tile": tile} for tile in (0, -1, True, 4.0, "444", None, (), (4, 4), (4, 4, 4, 4), (4, 0, 4), (4, 4, 4.0), {})),
    *({"rank": rank} for rank in (0, -3, 2.0, True, None, "24")),
    *({"mixing": mixing} for mixing in ("rows", "", None, True, ["none"])),
    *({"encoder_scope": scope} for scope in ("column", None)),
    *({"init": init} for init in ("zeros", None)),
    *({"backend": backend} for backend in ("gpu", None)),
    *({"basis": basis} for basis in (None, 3, bases.strassen())),
    {"train_encoder": "no"},
    {"train_decoder": None},
]


@pytest.mark.parametrize("wrong", BAD, ids=str)
def test_values_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError):
        STLConfig(**wrong)


@pytest.mark.parametrize(("tile", "held"), [(4, (1, 4, 4)), ((8, 2, 3), (1, 2, 3)), ([1, 5, 6], (1, 5, 6))])
def test_no_mixing_is_a_tile_of_one_row(tile, held):
    config = STLConfig(tile=tile, mixing="none")
    assert config.tile == config.pqs == held
    assert not config.mixes_rows


@pytest.mark.parametrize("mixing", ["sequence", "causal"])
def test_rows_mix_where_a_tile_has_several(mixing):
    assert STLConfig(tile=4, mixing=mixing).pqs == (4, 4, 4)
    assert STLConfig(tile=4, mixing=mixing).mixes_rows
    assert not STLConfig(tile=(1, 4, 4), mixing=mixing).mixes_rows


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        STLConfig().rank = 3


@pytest.mark.parametrize(
    ("init", "basis", "fits"),
    [
        ("auto", "random", False),
        ("auto", "naive", True),
        ("fit", "random", True),
        ("random", "naive", False),
    ],
)
def test_which_starts_look_at_the_weight(init, basis, fits):
    assert STLConfig(init=init, basis=basis).fits is fits


def test_named_bases():
    assert STLConfig().load_basis() is None
    assert STLConfig(tile=(2, 3, 2), rank=12, basis="naive").load_basis().is_exact
    assert STLConfig(tile=4, rank=49, basis="strassen").load_basis().is_exact
    assert STLConfig(tile=4, rank=24, basis="approximate").load_basis().error == pytest.approx(0.471, abs=0.002)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (STLConfig(tile=4, rank=48, basis="strassen"), ConfigError),
        (STLConfig(tile=2, rank=8, basis="strassen"), ConfigError),
        (STLConfig(tile=3, rank=7, basis="strassen"), ConfigError),
        (STLConfig(tile=(2, 4, 4), rank=7, basis="strassen"), ConfigError),
        (STLConfig(tile=1, rank=1, basis="strassen"), ConfigError),
        (STLConfig(tile=2, rank=7, basis="strassen", mixing="none"), ConfigError),
        (STLConfig(tile=4, rank=24, basis="naive"), ConfigError),
        (STLConfig(tile=4, rank=25, basis="approximate"), BasisError),
        (STLConfig(tile=4, rank=24, basis="no/such/file.json"), BasisError),
    ],
    ids=str,
)
def test_basis_that_is_not_for_this_tile_and_rank_is_refused(config, error):
    for fails in (config.load_basis, lambda: STLLinear(8, 8, config=config)):
        with pytest.raises(error):
            fails()


def test_basis_from_a_file_must_be_the_one_configured(tmp_path):
    path = tmp_path / "mine.json"
    bases.strassen().save(path)
    loaded = STLConfig(tile=2, rank=7, basis=str(path)).load_basis()
    torch.testing.assert_close(loaded.encoder, bases.strassen().encoder, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="rank 7"):
        STLConfig(tile=2, rank=8, basis=str(path)).load_basis()
    with pytest.raises(ConfigError, match=r"tile \(2, 2, 2\)"):
        STLConfig(tile=4, rank=7, basis=str(path)).load_basis()
