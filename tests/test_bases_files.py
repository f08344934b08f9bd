"""Published algorithms: the catalogue's JSON and AlphaTensor's NPZ, read as they are or refused with a reason."""

import io
import json
import os
import time
import zipfile
from pathlib import Path

import pytest
import torch

from strassen_tile import Basis, bases
from strassen_tile.errors import BasisError

np = pytest.importorskip("numpy")

# Strassen (1969) as published, integers, one row a product: (a11+a22)(b11+b22), (a21+a22)b11, a11(b12-b22), …
U = [[1, 0, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0], [-1, 0, 1, 0], [0, 1, 0, -1]]
V = [[1, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, -1], [-1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]]
W = [[1, 0, 0, 1], [0, 0, 1, -1], [0, 1, 0, 1], [1, 0, 1, 0], [-1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]
STRASSEN = {"n": [2, 2, 2], "m": 7, "u": U, "v": V, "w": W, "z2": False, "url": "catalogues have more keys"}


def rows(factor: torch.Tensor) -> list[list[float]]:
    return factor.flatten(1).tolist()


def write(folder: Path, record: object) -> Path:
    path = folder / "algorithm.json"
    path.write_text(record if isinstance(record, str) else json.dumps(record), encoding="utf-8")
    return path


def npz(folder: Path, *, name: str = "algorithm.npz", **arrays: object) -> Path:
    np.savez(folder / name, **arrays)
    return folder / name


def stacked(basis: Basis, transposed: bool = False) -> "np.ndarray":
    decoder = basis.decoder.mT if transposed else basis.decoder
    return np.stack([factor.flatten(1).T.numpy() for factor in (basis.encoder, basis.weight_encoder, decoder)])


PUBLISHED = Basis(*(torch.tensor(f, dtype=torch.float64).view(7, 2, 2) for f in (U, V, W)))


def test_catalogue_json(tmp_path: Path) -> None:
    """The published form not understood; names come from the file."""
    basis = bases.load(write(tmp_path, STRASSEN))
    assert basis.is_exact and basis.tile == (2, 2, 2) and basis.rank == 7 and basis.name == "algorithm"
    assert rows(basis.encoder) == U and rows(basis.weight_encoder) == V and rows(basis.decoder) == W


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("basis", [bases.naive(2, 3, 4), bases.naive(3, 1, 2), bases.strassen()], ids=lambda b: b.name)
def test_third_factor_either_way(basis: Basis, transposed: bool, tmp_path: Path) -> None:
    """Half of the published files store the third factor as s×p; read as p×s they would be refused."""
    third = basis.decoder.mT if transposed else basis.decoder
    record = {"n": basis.tile, "m": basis.rank, "u": rows(basis.encoder), "v": rows(basis.weight_encoder)}
    loaded = bases.load(write(tmp_path, {**record, "w": rows(third)}))
    assert loaded.is_exact and torch.equal(loaded.decoder, basis.decoder)
    if len({side * other for side, other in zip(basis.tile, basis.tile[1:] + basis.tile[:1], strict=True)}) == 1:
        key = ",".join(map(str, basis.tile))  # only then do the three factors stack
        loaded = bases.load(npz(tmp_path, **{key: stacked(basis, transposed)}))
        assert loaded.is_exact and torch.equal(loaded.decoder, basis.decoder)


def test_fractions(tmp_path: Path) -> None:
    """Coefficients such as 1/3, written as text, lose their digits."""
    thirds = {**STRASSEN, "u": [[f"{c}/3" for c in row] for row in U], "v": [[3 * c for c in row] for row in V]}
    basis = bases.load(write(tmp_path, thirds))
    assert basis.is_exact and basis.encoder[0, 0, 0].item() == 1 / 3
    assert bases.load(write(tmp_path, {**STRASSEN, "w": [[f"{c}.0e0" for c in row] for row in W]})).is_exact


def test_wrong_coefficient_is_refused_with_its_error(tmp_path: Path) -> None:
    """A misprint in a published file makes a wrong product that nobody notices."""
    wrong = [[2 if (k, c) == (5, 3) else v for c, v in enumerate(row)] for k, row in enumerate(W)]
    # One entry of D_6 off by 1: the error is ‖E_6‖²‖F_6‖²/8 = 2·2/8.
    with pytest.raises(BasisError, match=r"algorithm\.json.*relative squared error is 0\.5 "):
        bases.load(write(tmp_path, {**STRASSEN, "w": wrong}))


BROKEN = {
    "n missing a side": ({"n": [2, 2]}, "three sizes"), "n zero": ({"n": [0, 2, 2]}, "three sizes"),
    "n text": ({"n": "222"}, "three sizes"), "n null": ({"n": None}, "three sizes"), "m text": ({"m": "7"}, "m the rank"),
    "n floats": ({"n": [2.0, 2, 2]}, "three sizes"), "m wrong": ({"m": 6}, "u must be a list of m = 6"),
    "m huge": ({"m": 10**400}, r"more than 10\^15 coefficients"), "n huge": ({"n": [10**300] * 3}, "more than 10"),
    "m zero": ({"m": 0, "u": [], "v": [], "w": []}, "non-empty"), "u null": ({"u": None}, "u must be a list"),
    "row short": ({"v": [*V[:-1], [1, 0, 0]]}, "row of v must hold 4"), "row a number": ({"w": [1] * 7}, "row of w"),
    "nested": ({"u": [[[1]] * 4] * 7}, "not a real number"), "null": ({"u": [[None] * 4] * 7}, "not a real number"),
    "bool": ({"u": [[True] * 4] * 7}, "not a real number"), "word": ({"u": [["one"] * 4] * 7}, "'one', which is not"),
    "complex": ({"u": [["1j"] * 4] * 7}, "not a real number"), "1/0": ({"u": [["1/0"] * 4] * 7}, "'1/0', which is not"),
    "nan": ({"u": [[float("nan")] * 4] * 7}, "not a real number"), "inf": ({"u": [["-inf"] * 4] * 7}, "not a real"),
    "large": ({"u": [[10**400] * 4] * 7}, "not a real number"), "overflow": ({"u": [[1e300] * 4] * 7}, "exactly"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_malformed_catalogue_is_refused(case: str, tmp_path: Path) -> None:
    """A traceback, or a message that does not say which file and what in it."""
    changes, message = BROKEN[case]
    with pytest.raises(BasisError, match=message) as raised:
        bases.load(write(tmp_path, {**STRASSEN, **changes}))
    assert "algorithm.json" in str(raised.value) and len(str(raised.value)) < 400


def test_a_short_file_cannot_cost_much_time(tmp_path: Path) -> None:
    """Exact arithmetic on "1e10000000" writes ten million digits for each coefficient: minutes for one line."""
    start = time.process_time()
    with pytest.raises(BasisError, match="not a real number"):
        bases.load(write(tmp_path, {**STRASSEN, "u": [["1e10000000"] * 4] * 7}))
    assert time.process_time() - start < 0.5


class Bomb:
    """Unpickling this makes the file it names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_arrays_are_never_unpickled(tmp_path: Path) -> None:
    """A downloaded basis runs code on the user's machine."""
    path = npz(tmp_path, **{"2,2,2": np.array([Bomb(tmp_path / "executed")] * 3, dtype=object)})
    with pytest.raises(BasisError, match="object arrays are pickles and are not read"):
        bases.load(path)
    assert not (tmp_path / "executed").exists()
    with np.load(path, allow_pickle=True) as archive:
        assert archive["2,2,2"].shape == (3,)
    assert (tmp_path / "executed").exists(), "the bomb was no bomb"


def test_algorithms_modulo_2_are_refused(tmp_path: Path) -> None:
    """AlphaTensor's files over Z2 look the same and are wrong over the reals."""
    signless = Basis(PUBLISHED.encoder.abs(), PUBLISHED.weight_encoder.abs(), PUBLISHED.decoder.abs())
    x, w = torch.tensor([[0.0, 1.0], [1.0, 1.0]]).double(), torch.tensor([[1.0, 1.0], [0.0, 1.0]]).double()
    factors = zip(signless.encoder, signless.weight_encoder, signless.decoder, strict=True)
    product = sum((e * x).sum() * (f * w).sum() * d for e, f, d in factors)
    assert torch.equal(product % 2, (x @ w) % 2) and not torch.equal(product, x @ w)
    with pytest.raises(BasisError, match=r"relative squared error is .*modulo 2"):
        bases.load(npz(tmp_path, **{"2,2,2": stacked(signless)}))


GOOD = stacked(PUBLISHED)
BAD_ARRAYS = {
    "object": ({"2,2,2": GOOD.astype(object)}, "pickles"), "two": ({"2,2,2": GOOD, "2,2,3": GOOD}, "holds 2 entries"),
    "none": ({}, "holds 0 entries"), "name": ({"factors": GOOD}, "named like"), "sides": ({"2,2": GOOD}, "named like"),
    "negative": ({"-2,2,2": GOOD}, "named like"), "other tile": ({"2,2,3": GOOD}, "of 4, 6, 6 rows"),
    "complex": ({"2,2,2": GOOD * (1 + 1j)}, "complex128"), "text": ({"2,2,2": GOOD.astype(str)}, "real numbers"),
    "two factors": ({"2,2,2": GOOD[:2]}, "three factors"), "no terms": ({"2,2,2": GOOD[..., :0]}, "non-empty"),
    "flat": ({"2,2,2": np.ones(3)}, "three factors"), "scalar": ({"2,2,2": np.float64(3)}, "three factors"),
    "nan": ({"2,2,2": GOOD * np.nan}, "finite"), "wrong": ({"2,2,2": GOOD[::-1]}, "exactly, but"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_malformed_npz_is_refused(case: str, tmp_path: Path) -> None:
    """An imaginary part dropped in silence, or a traceback from numpy."""
    arrays, message = BAD_ARRAYS[case]
    with pytest.raises(BasisError, match=message) as raised:
        bases.load(npz(tmp_path, **arrays))
    assert "algorithm.npz" in str(raised.value)


def test_npz_forms_that_load_and_archives_that_do_not(tmp_path: Path) -> None:
    """Integer arrays and an upper-case suffix are as good; a damaged archive is our error, not zipfile's."""
    assert bases.load(str(npz(tmp_path, **{"2,2,2": GOOD.astype(np.int8)}))).is_exact
    upper = (tmp_path / "algorithm.npz").rename(tmp_path / "A.NPZ")
    assert bases.load(upper).name == "A"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("2,2,2", "no array")
    good = upper.read_bytes()
    for content in (b"", b"PK\x03\x04 garbage", good[: len(good) // 2], buffer.getvalue()):
        path = tmp_path / "damaged.npz"
        path.write_bytes(content)
        with pytest.raises(BasisError, match="cannot read"):
            bases.load(path)
    for path in (tmp_path / "missing.npz", tmp_path / "folder.npz"):
        (tmp_path / "folder.npz").mkdir(exist_ok=True)
        with pytest.raises(BasisError, match="cannot read"):
            bases.load(path)
