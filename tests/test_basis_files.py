"""A basis on disk: every bit comes back, a file is whole or absent, and one that lies is refused."""

import json
import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strassen_tile import Basis, bases
from strassen_tile.errors import BasisError

FACTORS = ("encoder", "weight_encoder", "decoder")
LOADERS = [Basis.load, bases.load]
SIDE = st.integers(1, 3)
NUMBER = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([5e-324, -2.2e-308, -0.0, 1 / 3, 2.0**-1074])
)


@settings(max_examples=60, deadline=None)
@given(st.data(), SIDE, SIDE, SIDE, SIDE, st.text(max_size=8))
def test_round_trip_is_exact(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, r: int, p: int, q: int, s: int, name: str
) -> None:
    """A coefficient (a subnormal, a negative zero, the largest float) or the name changes on the way to disk and back."""
    sizes = [(r, p, q), (r, q, s), (r, p, s)]
    values = [data.draw(st.lists(NUMBER, min_size=a * b * c, max_size=a * b * c)) for a, b, c in sizes]
    made = [torch.tensor(v, dtype=torch.float64).reshape(size) for v, size in zip(values, sizes, strict=True)]
    path = tmp_path_factory.mktemp("basis") / "b.json"
    Basis(*made, name=name).save(path)
    assert Basis(*made, name=name).name == name or not name.isprintable()
    for load in LOADERS:
        basis = load(str(path))
        assert basis.name == Basis(*made, name=name).name
        for field, factor in zip(FACTORS, made, strict=True):
            assert torch.equal(getattr(basis, field).view(torch.int64), factor.view(torch.int64))


def test_round_trip_of_real_ones_states_what_they_are(tmp_path: Path) -> None:
    """Whoever reads the file without us is told the wrong tile, rank or error."""
    for basis in (bases.strassen(2), bases.approximate((2, 4, 8), 24)):
        path = tmp_path / "ünï ☃.json"
        basis.save(path)
        record = json.loads(path.read_text())
        assert (record["tile"], record["rank"], record["exact"]) == (list(basis.tile), basis.rank, basis.is_exact)
        assert (record["relative_squared_error"], record["kappa"]) == (basis.error, basis.kappa)
        assert repr(Basis.load(path)) == repr(basis)


def full_disk(path: Path, patch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        bases.strassen(2).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def interrupted(path: Path, patch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    patch.setattr(Path, "replace", stop)
    patch.setattr(os, "replace", stop)
    bases.strassen(2).save(path)


@pytest.mark.parametrize(("fail", "error"), [(full_disk, BasisError), (interrupted, KeyboardInterrupt)])
def test_failing_write_leaves_the_old_file_and_nothing_else(
    fail: Callable[[Path, pytest.MonkeyPatch], None], error: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk or Ctrl-C destroys the basis that was there, or litters its folder."""
    path = tmp_path / "b.json"
    bases.strassen().save(path)
    before = path.read_bytes()
    with pytest.raises(error):
        fail(path, monkeypatch)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["b.json"]  # noqa: PTH208 - the hidden ones as well


def test_saved_files_are_readable_by_others(tmp_path: Path) -> None:
    """A temporary file's private mode kept: colleagues cannot read the result."""
    bases.strassen().save(tmp_path / "b.json")
    (tmp_path / "plain").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("b.json", "plain")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("where", ["", "x" * 300, "nul\0byte"])
def test_unwritable_paths_are_our_errors(where: str, tmp_path: Path) -> None:
    """A raw OSError reaches the command line as a traceback; a failed save into a folder litters its parent."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(BasisError, match="cannot write"):
        bases.strassen().save(folder / where)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_a_missing_folder_is_made_and_a_link_followed(tmp_path: Path) -> None:
    """As with files of other formats; a link that is replaced leaves what it points to as it was."""
    real, link = tmp_path / "new" / "real.json", tmp_path / "link.json"
    bases.strassen().save(real)
    link.symlink_to(real)
    bases.naive(1, 1, 2).save(link)
    assert link.is_symlink() and Basis.load(real).rank == 2


def lie(**changes: object) -> str:
    record = {"tile": [2, 2, 2], "rank": 7, "exact": True, "name": "", "relative_squared_error": 0.0}
    record |= {field: getattr(bases.strassen(), field).tolist() for field in FACTORS} | changes
    return json.dumps({key: value for key, value in record.items() if value != "drop"})


WRONG = [[[1.0, 2.0], [3.0, 4.0]]] * 7
DAMAGED = {
    "empty": ("", "cannot read"), "cut": (lie()[:-9], "cannot read"), "bytes": ("\udcff", "cannot read"),
    "list": ("[]", "not a basis file"), "null": ("null", "not a basis file"), "deep": ("[" * 99999, "recursion"),
    "long integer": ('{"encoder": ' + "9" * 5000 + "}", "digits"), "BOM": ("\ufeff" + lie(), "BOM"),
    "key twice": (lie()[:-1] + ', "exact": false}', "twice"), "key inside twice": ('{"a": {"b": 1, "b": 2}}', "twice"),
    "unknown key": (lie(colour="red"), "unknown keys: colour"), "missing factor": (lie(decoder="drop"), "decoder"),
    "tile": (lie(tile=[2, 2, 3]), r"says tile \[2, 2, 3\]"), "tile order": (lie(tile=[2, 2]), "tile"),
    "no tile": (lie(tile=None), "tile must be"), "float tile": (lie(tile=2.0), "tile must be"),
    "rank": (lie(rank=6), "says rank 6"), "rank as text": (lie(rank="7"), "says rank '7'"),
    "exact": (lie(encoder=WRONG), "claims to be exact"), "error 0": (lie(encoder=WRONG, exact="drop"), "claims"),
    "error": (lie(encoder=WRONG, exact=False, relative_squared_error=1e-20), "says relative_squared_error 1e-20"),
    "kappa": (lie(kappa=1.0), "says kappa 1.0"), "kappa as text": (lie(kappa="2"), "says kappa '2'"),
    "huge kappa": (lie(exact=False, relative_squared_error="drop", kappa=10**400), "says kappa 1000"),
    "overflows": (lie(encoder=[[[1e300] * 2] * 2] * 7, exact=False, relative_squared_error=0.3), "0.3, but .* is inf"),
    "says both": (lie(encoder=WRONG, exact=False), "claims"), "nan": (lie(encoder=[[[float("nan")] * 2] * 2] * 7), "fin"),
    "ragged": (lie(encoder=[[[1]], [[1, 2]]]), "rectangular"), "text": (lie(encoder=[[["1"]]]), "rectangular"),
    "no terms": (lie(encoder=[]), "three non-empty"), "too large": (lie(encoder=[[[10**400]]]), "too large"),
    "object": (lie(encoder={"a": 1}), "rectangular"), "other rank": (lie(encoder=WRONG[:3]), "fit together"),
}  # fmt: skip


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_or_lying_files_are_refused(case: str, load: Callable[[Path], Basis], tmp_path: Path) -> None:
    """A wrong algorithm passes for an exact one, or the user gets a traceback that does not name the file."""
    text, message = DAMAGED[case]
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BasisError, match=message) as raised:
        load(path)
    assert "bad.json" in str(raised.value)


@pytest.mark.parametrize("load", LOADERS)
def test_unreadable_paths_are_our_errors(load: Callable[[Path], Basis], tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", tmp_path / "nul\0byte", tmp_path / ("x" * 300), ""):
        with pytest.raises(BasisError, match="cannot read"):
            load(path)


def test_an_inexact_file_that_says_so_is_welcome(tmp_path: Path) -> None:
    """Refusing what tells the truth: factors alone, or with their real error, load."""
    path = tmp_path / "b.json"
    for text in (lie(encoder=WRONG, exact="drop", relative_squared_error="drop"), lie(tile="drop", rank="drop")):
        path.write_text(text)
        assert Basis.load(path).rank == 7
