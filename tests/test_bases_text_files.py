"""Published algorithms as text: written, read back, and refused where they are cut short or lie."""

from pathlib import Path

import pytest
import torch

from strassen_tile import Basis, bases, reference
from strassen_tile.errors import BasisError

# Strassen (1969) as SMS has it: 7 × 4, 7 × 4 and 4 × 7.
STRASSEN = {
    "L": ["1 1 1", "1 4 1", "2 3 1", "2 4 1", "3 1 1", "4 4 1", "5 1 1", "5 2 1", "6 1 -1", "6 3 1", "7 2 1", "7 4 -1"],
    "R": ["1 1 1", "1 4 1", "2 1 1", "3 2 1", "3 4 -1", "4 1 -1", "4 3 1", "5 4 1", "6 1 1", "6 2 1", "7 3 1", "7 4 1"],
    "P": ["1 1 1", "1 4 1", "1 5 -1", "1 7 1", "2 3 1", "2 5 1", "3 2 1", "3 4 1", "4 1 1", "4 2 -1", "4 3 1", "4 6 1"],
}


def sms(folder: Path, parts: dict[str, list[str]] = STRASSEN, end: str = "0 0 0") -> Path:
    for part, entries in parts.items():
        size = "4 7 R" if part == "P" else "7 4 R"
        (folder / f"strassen_{part}.sms").write_text("\n".join(["# as published", size, *entries, end, ""]))
    return folder / "strassen.sms"


def check_product(basis: Basis) -> None:
    x, w = torch.randn(7, 9, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    torch.testing.assert_close(reference.stl_matmul(x, w, basis), x @ w)


def test_published_sms(tmp_path: Path) -> None:
    path = sms(tmp_path)
    for name in ("strassen.sms", "strassen_L.sms", "strassen_P.sms"):
        basis = bases.load(tmp_path / name)
        assert basis.tile == (2, 2, 2)
        assert basis.rank == 7
        assert basis.is_exact
        assert basis.name == "strassen"
    assert path.name == "strassen.sms"


def test_published_coefficients(tmp_path: Path) -> None:
    """⟨1, 2, 3⟩ by hand, as fast-matmul writes it: blocks of entries × rank, remarks, any spaces."""
    (tmp_path / "classical123-6-12").write_text(
        "# by hand\n1 0  1 0 1 0\n0 1 0 1 0 1\n#\n"
        + "\n".join(" ".join("1" if k == 2 * j + i else "0" for k in range(6)) for i in range(2) for j in range(3))
        + "\n# C\n1 1 0 0 0 0\n0 0 1 1 0 0\n0 0 0 0 1/1 1e0\n"
    )
    basis = bases.load(tmp_path / "classical123-6-12")
    assert basis.tile == (1, 2, 3)
    assert basis.is_exact


@pytest.mark.parametrize("suffix", [".sms", ".txt", ".json"])
@pytest.mark.parametrize(
    "basis",
    [bases.strassen(2), bases.naive(2, 3, 1), bases.naive(1, 1, 1), bases.strassen().kron(bases.naive(1, 3, 2))],
    ids=lambda basis: basis.name or "product",
)
def test_what_is_written_is_read_back(tmp_path: Path, basis: Basis, suffix: str) -> None:
    bases.save(basis, tmp_path / f"kept{suffix}")
    again = bases.load(tmp_path / f"kept{suffix}")
    for field in ("encoder", "weight_encoder", "decoder"):
        assert torch.equal(getattr(again, field), getattr(basis, field))
    check_product(again)


def test_thirds_are_written_as_fractions(tmp_path: Path) -> None:
    one = bases.naive(1, 1, 1)
    basis = Basis(one.encoder / 3, one.weight_encoder * 3, one.decoder * 1.1, name="thirds")
    basis = Basis(basis.encoder, basis.weight_encoder, one.decoder)
    bases.save(basis, tmp_path / "thirds.sms")
    assert "1 1 1/3" in (tmp_path / "thirds_L.sms").read_text()
    assert torch.equal(bases.load(tmp_path / "thirds.sms").encoder, basis.encoder)


def test_what_is_no_exact_algorithm_is_not_written_as_one(tmp_path: Path) -> None:
    for suffix in (".sms", ".txt"):
        with pytest.raises(BasisError, match="relative squared error"):
            bases.save(bases.approximate(4, 24), tmp_path / f"one{suffix}")
    with pytest.raises(BasisError, match="saved as"):
        bases.save(bases.strassen(), tmp_path / "one.pkl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", "LRP")
def test_nothing_is_half_written(tmp_path: Path, part: str) -> None:
    bases.save(bases.strassen(), tmp_path / "one.sms")
    (tmp_path / f"one_{part}.sms").unlink()
    (tmp_path / f"one_{part}.sms").mkdir()  # one of the files cannot be
    before = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(BasisError, match="cannot write"):
        bases.save(bases.naive(2, 2, 2), tmp_path / "one.sms")
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == before


def test_coefficients_that_are_no_simple_fractions(tmp_path: Path) -> None:
    """Doubles whose exact fractions have more digits than a 64-bit number."""
    basis = bases.strassen().conditioned()
    for suffix in (".sms", ".txt"):
        bases.save(basis, tmp_path / f"one{suffix}")
        assert torch.equal(bases.load(tmp_path / f"one{suffix}").encoder, basis.encoder)


def changed(part: str, at: int, to: str | None) -> dict[str, list[str]]:
    entries = list(STRASSEN[part])
    entries[at : at + 1] = [] if to is None else [to]
    return {**STRASSEN, part: entries}


@pytest.mark.parametrize(
    "parts,said",
    [
        (changed("L", 3, None), "exact"),  # a lie
        (changed("L", 2, "2 3 2"), "exact"),
        (changed("R", 0, "1 5 1"), "no entry"),
        (changed("R", 0, "0 1 1"), "no entry"),
        (changed("R", 0, "1 2"), "no entry"),
        (changed("R", 0, "1 2 x"), "'x'"),
        (changed("R", 0, "1 2 1/0"), "1/0"),
        (changed("R", 0, "1 2 nan"), "nan"),
        (changed("R", 0, "1 2 1e999999999"), "1e999999999"),
        (changed("R", 0, "1 4 1"), "twice"),
        (changed("P", 0, "0 0 0"), "goes on"),
        ({"L": STRASSEN["L"], "R": STRASSEN["R"]}, "cannot read"),
    ],
)
def test_sms_that_is_refused(tmp_path: Path, parts: dict[str, list[str]], said: str) -> None:
    with pytest.raises(BasisError, match=said):
        bases.load(sms(tmp_path, parts))


@pytest.mark.parametrize(
    "text,said",
    [
        ("", "rows columns R"),
        ("7 4\n", "rows columns R"),
        ("7 4 5\n", "rows columns R"),
        ("-7 4 R\n", "rows columns R"),
        ("99999999 99999999 R\n0 0 0\n", "max_bytes"),
        ("8 4 R\n0 0 0\n", "8 × 4"),
        ("7 5 R\n0 0 0\n", "of no product"),
    ],
)
def test_a_first_file_that_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = sms(tmp_path)
    (tmp_path / "strassen_L.sms").write_text(text)
    with pytest.raises(BasisError, match=said):
        bases.load(path)


def test_sms_cut_short(tmp_path: Path) -> None:
    with pytest.raises(BasisError, match="cut short"):
        bases.load(sms(tmp_path, end=""))


@pytest.mark.parametrize(
    "text,said",
    [
        ("# nothing\n", "blocks"),
        ("1\n#\n1\n", "2 blocks"),
        ("1 0\n#\n1\n#\n1 0\n", "as many numbers"),
        ("1\n#\n1\n#\n2\n", "exact"),
        ("x\n#\n1\n#\n1\n", "'x'"),
        ("1 0\n0 1\n#\n1 0\n#\n1 0\n", "of no product"),
        ("\x00\x01", "not a real number"),
    ],
)
def test_coefficients_that_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "coefficients").write_text(text)
    with pytest.raises(BasisError, match=said):
        bases.load(tmp_path / "coefficients")


def test_text_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BasisError, match="cannot read"):
        bases.load(tmp_path / "one.txt")
