"""The search for bases: its descent against autograd, its rounds, and what it keeps in a file."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from strassen_tile import Basis, bases
from strassen_tile.bases import descent
from strassen_tile.bases import search as module
from strassen_tile.bases.search import Bounds, search
from strassen_tile.errors import BasisError, BasisMismatchError


def factors(tile: tuple[int, int, int], rank: int, *batch: int, seed: int = 0) -> descent.Factors:
    p, q, s = tile
    generator = torch.Generator().manual_seed(seed)
    sizes = ((p, q), (q, s), (p, s))
    return tuple(torch.randn(*batch, rank, *size, generator=generator, dtype=torch.float64) for size in sizes)


@pytest.mark.parametrize("tile", [(2, 2, 2), (1, 3, 2), (2, 3, 4)])
def test_objective_and_its_derivatives(tile: tuple[int, int, int]) -> None:
    """Against the tensor written out: a transpose in a contraction, or a block of the Jacobian in the wrong place."""
    p, q, s = tile
    some = tuple(factor.requires_grad_() for factor in factors(tile, 4))

    def residual(e: torch.Tensor, f: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        tensor = torch.zeros(p, q, q, s, p, s, dtype=torch.float64)
        for i, j, k in itertools.product(range(p), range(q), range(s)):
            tensor[i, j, j, k, i, k] = 1.0
        return (torch.einsum("kab,kcd,kef->abcdef", e, f, d) - tensor).flatten()

    ridge = 0.3
    expected = residual(*some).square().sum() + ridge * sum(factor.square().sum() for factor in some)
    found = descent.objective(some, ridge)
    torch.testing.assert_close(found, expected)
    assert float(descent.error(some)) == pytest.approx(Basis(*some).error)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, some)])
    sizes = [factor.numel() for factor in some]

    def together(flat: torch.Tensor) -> torch.Tensor:
        parts = [part.view(factor.shape) for part, factor in zip(flat.split(sizes), some, strict=True)]
        return residual(*parts).square().sum()

    flat = torch.cat([factor.detach().flatten() for factor in some])
    with torch.no_grad():
        half, down = descent._second_order(some, ridge)
    torch.testing.assert_close(half, torch.autograd.functional.hessian(together, flat) / 2)
    torch.testing.assert_close(down, -gradient / 2)


def test_alternating_takes_each_to_its_best() -> None:
    """A sweep never raises the objective, and its last factor is at a minimum."""
    ridge, some = 1e-3, factors((2, 3, 2), 5, 6)
    before = descent.objective(some, ridge)
    after = descent.alternate(some, ridge, 1)
    assert (descent.objective(after, ridge) < before).all()
    decoder = after[2].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(descent.objective((*after[:2], decoder), ridge).sum(), decoder)
    assert gradient.abs().max() < 1e-9


def test_levelling_and_polishing() -> None:
    some = factors((2, 2, 2), 4)
    even = descent.level(some)
    norms = [factor.flatten(1).norm(dim=1) for factor in even]
    torch.testing.assert_close(norms[0], norms[1])
    torch.testing.assert_close(norms[0], norms[2])
    assert float(descent.error(even)) == pytest.approx(float(descent.error(some)))
    polished = descent.polish(even, 1e-2, 100)
    leaves = tuple(factor.clone().requires_grad_() for factor in polished)
    gradients = torch.autograd.grad(descent.objective(leaves, 1e-2), leaves)
    assert max(float(g.abs().max()) for g in gradients) < 1e-6


def test_polishing_where_newton_would_take_too_much(monkeypatch) -> None:
    """Sweeps in its place, of factors without a batch: what is no larger than before, and near where Newton comes to."""
    start = descent.level(factors((2, 2, 2), 4))
    newton = float(descent.objective(descent.polish(start, 1e-2, 60), 1e-2))
    monkeypatch.setattr(descent, "_MOST_UNKNOWNS", 47)  # 4 · (4 + 4 + 4) are too many
    monkeypatch.setattr(descent, "_second_order", None)
    found = descent.polish(start, 1e-2, 60)
    assert [part.shape for part in found] == [part.shape for part in start]
    assert float(descent.objective(found, 1e-2)) == pytest.approx(newton, rel=0.05)


def test_strassen_is_found() -> None:
    """Seven products of 2×2 matrices do, and six do not: what is left is an eighth (MATH §2)."""
    seven = search(2, 7, rounds=1, seed=1)
    assert seven.basis.error < 1e-8
    six = search(2, 6, rounds=1)
    assert six.basis.error == pytest.approx(0.125, abs=1e-4)
    assert Bounds().hold(six.basis.balance())
    assert six.history == ((1, six.basis.error),)


@pytest.fixture
def quick(monkeypatch) -> None:
    for name, value in (("_STARTS", 4), ("_HOPS", 4), ("_SWEEPS", 20), ("_POLISHES", 5), ("_RIDGES", (1e-3, 1e-4))):
        monkeypatch.setattr(module, name, value)


@pytest.mark.usefixtures("quick")
def test_stopped_and_gone_on_with(tmp_path: Path) -> None:
    """As if it had not been stopped; and the file says where its factors come from."""
    seen = []
    whole = search((2, 2, 3), 8, rounds=6, seed=3, progress=seen.append)
    assert [found.rounds for found in seen] == [1, 2, 3, 4, 5, 6]
    errors = [error for _, error in whole.history]
    assert errors == sorted(errors, reverse=True)
    file = tmp_path / "basis.json"
    search((2, 2, 3), 8, rounds=2, seed=3, file=file)
    after = search((2, 2, 3), 8, rounds=6, seed=3, file=file)
    assert after.history == whole.history
    assert torch.equal(after.basis.encoder, whole.basis.encoder)
    kept = bases.load(file)
    assert torch.equal(kept.encoder, whole.basis.encoder)
    said = json.loads(file.read_text())["provenance"]
    assert said["rounds"] == 6
    assert said["seed"] == 3
    assert said["history"] == [list(step) for step in whole.history]
    # As many rounds as are done already: nothing more.
    assert search((2, 2, 3), 8, rounds=3, seed=3, file=file).rounds == 6


@pytest.mark.usefixtures("quick")
def test_starts_from_neighbours() -> None:
    exact = bases.strassen()
    less = search(2, 6, rounds=1, starts=[exact])
    assert less.basis.error < 0.3
    more = search((1, 2, 3), 5, rounds=1, starts=[bases.random((3, 1, 2), 4), bases.random((1, 2, 3), 5)])
    assert more.basis.rank == 5
    with pytest.raises(BasisMismatchError, match="a start must be"):
        search(2, 5, starts=[exact])
    with pytest.raises(BasisMismatchError, match="a start must be"):
        search(3, 7, starts=[exact])


@pytest.mark.usefixtures("quick")
def test_bounds_hold(tmp_path: Path) -> None:
    found = search(2, 4, rounds=2, bounds=Bounds(coefficient=1.2, kappa=3.0))
    assert found.basis is None or Bounds(coefficient=1.2, kappa=3.0).hold(found.basis)
    none = search(2, 4, rounds=1, bounds=Bounds(coefficient=1e-3), file=tmp_path / "none.json")
    assert none.basis is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options,said",
    [
        ({"rank": 0}, "rank must be"),
        ({"rank": 9}, "rank must be"),
        ({"rank": 2.5}, "rank must be"),
        ({"rounds": 0}, "rounds must be"),
        ({"minutes": 0}, "minutes must be"),
        ({"minutes": float("nan")}, "minutes must be"),
        ({"seed": 0.5}, "seed must be"),
    ],
)
def test_bad_arguments(options: dict, said: str) -> None:
    with pytest.raises(BasisError, match=said):
        search(2, **{"rank": 4, **options})


@pytest.mark.usefixtures("quick")
def test_a_file_that_is_not_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "basis.json"
    bases.strassen().save(file)
    before = file.read_bytes()
    with pytest.raises(BasisError, match="not of a search"):
        search(2, 7, file=file)
    assert file.read_bytes() == before
    search(2, 5, seed=2, file=tmp_path / "other.json")
    with pytest.raises(BasisError, match="seed 2, not 3"):
        search(2, 5, seed=3, file=tmp_path / "other.json")
    with pytest.raises(BasisError, match="of a search with bounds"):
        search(2, 5, seed=2, file=tmp_path / "other.json", bounds=Bounds(kappa=10.0))
    with pytest.raises(BasisError, match="of a search with starts"):
        search(2, 5, seed=2, file=tmp_path / "other.json", starts=[bases.random(2, 5)])
    with pytest.raises(BasisMismatchError, match="rank 5"):
        search(2, 6, seed=2, file=tmp_path / "other.json")
    record = json.loads((tmp_path / "other.json").read_text())
    for rounds in ("Infinity", "-5", "1e30", '"1"', "null"):
        text = json.dumps({**record, "provenance": {**record["provenance"], "rounds": "ROUNDS"}})
        (tmp_path / "far.json").write_text(text.replace('"ROUNDS"', rounds))
        with pytest.raises(BasisError, match="how far"):
            search(2, 5, seed=2, file=tmp_path / "far.json")
