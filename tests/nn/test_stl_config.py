"""If these fail, a saved configuration comes back as another one, or a wrong one is accepted and trained."""

import dataclasses
import json
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from strassen_tile import STLConfig, STLLinear, bases
from strassen_tile.errors import BasisError, ConfigError

SIDE = some.integers(4, 16)
NAMES = ["random", "orthogonal", "signs", "approximate", "truncated", "naive", "strassen"]
CONFIGS = some.builds(
    STLConfig,
    tile=SIDE | some.tuples(SIDE, SIDE, SIDE) | some.lists(SIDE, min_size=3, max_size=3),
    rank=some.integers(1, 3),
    basis=some.sampled_from(NAMES) | some.text(min_size=1),
    mixing=some.sampled_from(["sequence", "none", "causal"]),
    encoder_scope=some.sampled_from(["layer", "tile"]),
    init=some.sampled_from(["auto", "random", "spectral", "fit"]),
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


TEXTS = ["", "[]", "4", "null", '"rank"', "{", '{"rank": 1', "NaN", "[" * 100_000, '{"tile": ' * 100_000]
TEXTS += ['{"rank": 1, "rank": 2}', '{"rank": ' + "9" * 5000 + "}", '{"rank": NaN}', "\ufeff{}"]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:20])
def test_text_that_is_no_config_is_refused(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        STLConfig.from_json(text)
    with pytest.raises(ConfigError, match=r"cannot read a configuration from .*config\.json"):
        STLConfig.load(path)


@pytest.mark.parametrize("record", [None, [("rank", 3)], "rank", 3])
def test_what_is_no_record_is_refused(record):
    with pytest.raises(ConfigError, match="an object is wanted"):
        STLConfig.from_dict(record)


def test_files_that_cannot_be_read_are_our_errors(tmp_path):
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    for name in ("", "none", "latin", "x" * 300, "nul\0"):
        with pytest.raises(ConfigError, match="cannot read a configuration"):
            STLConfig.load(tmp_path / name)


EXPECTED = {  # tile, basis, mixing → rank
    (4, "random", "sequence"): 24,
    (4, "random", "none"): 6,
    (4, "random", "causal"): 24,
    ((1, 4, 4), "random", "sequence"): 6,
    ((2, 3, 5), "random", "sequence"): 11,
    ((1, 1, 2), "random", "sequence"): 1,
    (8, "random", "sequence"): 192,
    (4, "approximate", "sequence"): 24,
    (2, "approximate", "sequence"): 3,
    ((8, 2, 4), "approximate", "sequence"): 24,
    ((2, 3, 5), "naive", "sequence"): 30,
    (4, "naive", "none"): 16,
    (4, "orthogonal", "none"): 6,
    ((2, 3, 5), "signs", "causal"): 11,
    (4, "truncated", "sequence"): 24,
    (2, "truncated", "sequence"): 3,
    (2, "strassen", "sequence"): 7,
    (4, "strassen", "sequence"): 49,
}


@pytest.mark.parametrize(("tile", "basis", "mixing"), EXPECTED)
def test_the_rank_follows_the_tile_where_none_is_given(tile, basis, mixing):
    """mixing="none" kept the 24 of a 4×4×4 tile on 1×4×4, half as many products again as the dense layer."""
    config = STLConfig(tile=tile, basis=basis, mixing=mixing)
    assert config.rank == EXPECTED[tile, basis, mixing]
    assert type(config.rank) is int
    assert config == STLConfig(tile=tile, basis=basis, mixing=mixing, rank=None)
    assert config == STLConfig.from_json(config.to_json()) == dataclasses.replace(config)
    config.load_basis()
    record = {**config.to_dict(), "rank": None}
    assert STLConfig.from_dict(record) == config


def test_a_file_brings_its_rank(tmp_path):
    bases.random((2, 3, 2), 5).save(tmp_path / "b.json")
    assert STLConfig(tile=(2, 3, 2), basis=str(tmp_path / "b.json")).rank == 5
    with pytest.raises(BasisError, match=r"none\.json"):
        STLConfig(tile=2, basis=str(tmp_path / "none.json"))
    with pytest.raises(
        BasisError, match=rf"basis must be one of {', '.join(NAMES)}, group:NAME, or the path of a file; .*orthogonol"
    ):
        STLConfig(rank=24, basis="orthogonol").load_basis()
    with pytest.raises(ConfigError, match="cubic tile"):
        STLConfig(tile=(2, 3, 2), basis="strassen")


def test_an_approximate_basis_that_does_not_ship_is_said(tmp_path):
    config = STLConfig(tile=5, basis="approximate")
    with pytest.raises(BasisError, match="Shipped"):
        config.load_basis()


def test_a_rank_that_was_written_down_stays():
    with pytest.warns(UserWarning, match=r"rank 24 on a tile of 1×4×4 takes 1\.50 times"):
        old = STLConfig.from_json('{"tile": [1, 4, 4], "rank": 24, "mixing": "none"}')
    assert old.rank == 24
    assert dataclasses.replace(STLConfig(), mixing="causal").rank == 24


@pytest.mark.parametrize(("tile", "rank"), [((1, 4, 4), 16), ((1, 4, 4), 64), (2, 8), (2, 32), (4, 64)])
def test_a_rank_that_saves_nothing_is_said(tile, rank):
    with pytest.warns(
        UserWarning, match=rf"rank {rank} on a tile .* it saves nothing; leave rank out for \d+, or take a larger"
    ):
        STLConfig(tile=tile, rank=rank)
    STLConfig(tile=tile, rank=rank, basis="naive")  # warnings are errors here


def test_copies_made_by_the_library_do_not_warn_again():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        config = STLConfig(tile=2, rank=8)
        STLLinear.from_linear(torch.nn.Linear(8, 8), config)
    assert len(caught) == 1


@pytest.mark.parametrize("basis", ["naive", "strassen"])
def test_a_basis_of_the_wrong_rank_is_never_made(basis):
    """Strassen's for tiles of 2^20 has 7^20 terms."""
    with pytest.raises(ConfigError, match=f"basis '{basis}' has rank"):
        STLConfig(tile=2**10, rank=7, basis=basis).load_basis()
    with pytest.raises(ConfigError, match="encoders of"):
        STLConfig(tile=2**20, basis=basis)


def test_only_a_file_that_is_not_exact_is_warned_of(tmp_path):
    for name, basis in (("exact", bases.naive(2, 2, 2)), ("drawn", bases.random(2, 8))):
        basis.save(tmp_path / name)
    STLConfig(tile=2, basis=str(tmp_path / "exact")).load_basis()
    with pytest.warns(UserWarning, match="rank 8 on a tile of 2×2×2 takes 1.00 times"):
        STLConfig(tile=2, basis=str(tmp_path / "drawn")).load_basis()


def test_integers_of_numpy_are_integers():
    np = pytest.importorskip("numpy")
    config = STLConfig(tile=[np.int64(2), np.int32(3), 4], rank=np.int64(5))
    assert config == STLConfig(tile=(2, 3, 4), rank=5)
    assert STLConfig(tile=np.int64(4)) == STLConfig()
    assert STLConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("record", [{"ranks": 3}, {"rank": 3, "Tile": 4}, {3: 4, "x": 1}])
def test_unknown_keys_are_refused_and_named(record):
    with pytest.raises(ConfigError, match=r"unknown keys .*(ranks|Tile|3)"):
        STLConfig.from_dict(record)


BAD = [
    *(
        {"tile": tile}
        for tile in (
            0,
            -1,
            True,
            4.0,
            "444",
            None,
            (),
            (4, 4),
            (4, 4, 4, 4),
            (4, 0, 4),
            (4, 4, 4.0),
            {},
            (4, 4, True),
            [10**9] * 3,
            ["4"] * 3,
        )
    ),
    *({"rank": rank} for rank in (0, -3, 2.0, True, "24", 24.0, float("nan"), 10**30, torch.tensor(24), [24])),
    *({"mixing": mixing} for mixing in ("rows", "", None, True, ["none"])),
    *({"encoder_scope": scope} for scope in ("column", None)),
    *({"init": init} for init in ("zeros", None)),
    *({"backend": backend} for backend in ("gpu", None)),
    *({"basis": basis} for basis in (None, 3, bases.strassen())),
    {"train_encoder": "no"},
    {"train_decoder": None},
    {"train_encoder": 1},
    {"recompute": 0},
    {"basis": ""},
    {"tile": 2, "rank": 999},
    {"tile": 4, "rank": 257},
    {"mixing": {}},
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
        ("auto", "orthogonal", False),
        ("auto", "signs", False),
        ("auto", "truncated", True),
        ("fit", "signs", True),
        ("spectral", "truncated", False),
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
        (STLConfig(tile=4, rank=50, basis="approximate"), BasisError),
        (STLConfig(tile=4, rank=50, basis="truncated"), BasisError),
        (STLConfig(tile=(2, 4, 4), rank=7, basis="truncated"), ConfigError),
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
