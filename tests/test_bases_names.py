"""`bases.named`: every kind of name, and what is said where there is none."""

from pathlib import Path

import pytest
import torch

from strassen_tile import Basis, STLConfig, bases
from strassen_tile.errors import BasisError, BasisMismatchError, ConfigError


@pytest.mark.parametrize(
    "spec,tile,rank,wanted",
    [
        ("naive", (2, 3, 1), None, bases.naive(2, 3, 1)),
        ("strassen", None, 49, bases.strassen(2)),
        ("approximate", 4, 24, bases.approximate(4, 24)),
        ("approximate", None, None, bases.approximate(4, 24)),
        ("truncated", 2, 5, bases.truncated(1, 5)),
        ("random", (1, 4, 4), None, bases.random((1, 4, 4), 6)),
        ("4x4x4_r32", None, None, bases.approximate(4, 32)),
        ("4x2x2_r11", None, 11, bases.approximate((4, 2, 2), 11)),
        ("random:7", 2, 3, bases.random(2, 3, seed=7)),
        ("group:Z2^2", 2, None, bases.group("Z2^2", 2)),
        ("group:Z2^2:raw", 2, 4, bases.group("Z2^2", 2, decoder="raw")),
    ],
)
def test_names(spec: str, tile: object, rank: int | None, wanted: Basis) -> None:
    found = bases.named(spec, tile, rank)
    for field in ("encoder", "weight_encoder", "decoder"):
        assert torch.equal(getattr(found, field), getattr(wanted, field))


def test_a_file_has_its_own_tile(tmp_path: Path) -> None:
    bases.strassen().save(tmp_path / "one.json")
    assert bases.named(str(tmp_path / "one.json")).tile == bases.named(tmp_path / "one.json").tile == (2, 2, 2)
    with pytest.raises(BasisMismatchError, match="has tile"):
        bases.named(str(tmp_path / "one.json"), 4)


@pytest.mark.parametrize(
    "spec,tile,rank,said",
    [
        ("strassen", 3, None, "cubic tile"),
        ("strassen", 4, 48, "has rank 49"),
        ("naive", 2, 7, "has rank 8"),
        ("group:Z2^2", 2, 5, "has rank 4"),
        ("group:", 2, None, "no group"),
        ("group:Z2:best", 2, None, "decoder"),
        ("approximate", 4, 7, "no approximate basis"),
        ("nothing", 4, None, "cannot read"),
        ("random:x", 4, None, "cannot read"),
        ("strassen", 32, None, "51631104 coefficients; take a smaller"),
        ("random", 128, None, "coefficients; take a smaller"),
        ("4x4x4_r32", 2, None, "in its name"),
        ("4x4x4_r7", None, None, "no approximate basis"),
        (None, 4, None, "named by a text"),
        (b"naive", 4, None, "named by a text"),
    ],
)
def test_bad_names(spec: str, tile: int, rank: int | None, said: str) -> None:
    with pytest.raises(BasisError, match=said):
        bases.named(spec, tile, rank)


def test_a_group_in_a_config() -> None:
    config = STLConfig(tile=(2, 2, 2), basis="group:D4")
    assert config.rank == 11
    with pytest.raises(ConfigError, match="has rank 11"):
        STLConfig(tile=(2, 2, 2), basis="group:D4", rank=8).load_basis()
    with pytest.raises(BasisError, match="no group is called"):
        STLConfig(basis="group:X5")
    assert torch.equal(config.load_basis().encoder, bases.group("D4", 2).encoder)
