"""Bases of group algebras: the algebra's identities, the error that counting says, and what is not a group."""

import pytest
import torch

import strassen_tile as st
from strassen_tile.bases import groups
from strassen_tile.bases.finite_groups import Group, as_group
from strassen_tile.bases.group_algebra import degrees, products
from strassen_tile.errors import BasisError

# Name, products of its algebra: 1, 3 or 8 times those of an n×n product (Strassen's for 2, the naive ones for 3).
GROUPS = [("Z1", 1), ("Z2", 2), ("Z5", 7), ("Z32", 47), ("Z2^5", 32), ("D4", 11), ("Q8", 12), ("S3", 9), ("A4", 31),
          ("S4", 63), ("D4xZ2^2", 44), ("Q8xZ3", 45), ("Q12", 20), ("Q8xQ8", 129)]  # fmt: skip


@pytest.mark.parametrize("name,rank", GROUPS)
def test_the_algebra(name: str, rank: int) -> None:
    group = as_group(name)
    algebra = products(group)
    assert algebra.left.shape == algebra.right.shape == algebra.decoder.shape == (rank, group.order)
    assert sum(degree**2 for degree in degrees(group)) == group.order
    x, y = torch.randn(2, group.order, dtype=torch.float64)
    expected = torch.zeros_like(x).index_add(0, group.table.flatten(), (x[:, None] * y[None]).flatten())
    found = algebra.decoder.mT @ ((algebra.left @ x) * (algebra.right @ y))
    assert (found - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize("tile", [(2, 2, 2), (4, 4, 4), (1, 3, 2)])
@pytest.mark.parametrize("name", ["Z7", "Z2^5", "D4xZ2", "Q8", "S3"])
def test_errors_are_those_of_counting(name: str, tile: tuple[int, int, int]) -> None:
    group, (p, q, s) = as_group(name), tile
    maps = groups.search(group, tile, restarts=4)
    terms = groups.terms_at_reads(group, maps)
    as_lists = [maps.a.tolist(), maps.b.tolist(), maps.c.tolist()]
    raw, scaled, best = (groups.group(name, tile, decoder=how, maps=as_lists) for how in ("raw", "scaled", "ls"))
    assert raw.error == pytest.approx(float((terms - q).sum()) / (p * q * s), abs=1e-12)
    assert scaled.error == pytest.approx(1 - float((q / terms).sum()) / (p * s), abs=1e-12)
    assert best.error <= scaled.error + 1e-12
    assert scaled.error >= groups.lower_bound(name, tile) - 1e-12
    # By hand: every product of an entry of X and one of W, and where it goes.
    count = torch.zeros(group.order)
    at = group.table[group.inverse[maps.a][:, None], maps.b]
    to = group.table[group.inverse[maps.b][:, None], maps.c]
    for u in at.flatten().tolist():
        for v in to.flatten().tolist():
            count[group.table[u, v]] += 1
    assert torch.equal(count[group.table[group.inverse[maps.a][:, None], maps.c]].double(), terms)


def test_what_was_measured() -> None:
    assert groups.group("D4xZ2^2", 4).error == pytest.approx(2 / 7, abs=1e-6)
    assert groups.group("D4xZ2", 4).error == pytest.approx(0.6417, abs=1e-4)
    assert groups.group("Z2^5", 4).error == pytest.approx(0.5, abs=1e-9)  # as of dropping half of the products
    assert set(groups.group("Z2^5", 4, decoder="raw").encoder.unique().tolist()) == {-1.0, 1.0}


def test_a_triple_product_is_exact() -> None:
    # In Z2 × Z3 × Z2 each index has a factor of its own, so that nothing collides: element (x, y, z) is 6x + 2y + z.
    maps = [[0, 6], [0, 2, 4], [0, 1]]
    basis = st.bases.group("Z2xZ3xZ2", (2, 3, 2), decoder="raw", maps=maps)
    assert basis.is_exact
    x, w = torch.randn(5, 9), torch.randn(9, 7)
    torch.testing.assert_close(st.stl_matmul(x, w, basis), x @ w)


def test_the_same_seed_finds_the_same(monkeypatch) -> None:
    first = groups.group("D4", (2, 2, 2), restarts=3, seed=5)
    groups._search.cache_clear()
    assert torch.equal(first.encoder, groups.group("D4", (2, 2, 2), restarts=3, seed=5).encoder)


def test_a_table_is_taken_as_it_is() -> None:
    table = [[(g + h) % 3 for h in range(3)] for g in range(3)]
    expected = pytest.approx(st.bases.group("Z3", (1, 2, 1)).error)
    assert st.bases.group(table, (1, 2, 1)).error == expected
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64):
        given = torch.tensor(table, dtype=dtype)
        for group in (given, Group("three", given)):
            assert st.bases.group(group, (1, 2, 1)).error == expected
    with pytest.raises(BasisError, match="must be a tensor"):
        Group("three", table)
    with pytest.raises(BasisError, match="element numbers"):
        as_group(torch.tensor(table).to(torch.complex64))


@pytest.mark.parametrize(
    "table,said",
    [
        ([[0, 1], [1, 1]], "no inverse"),
        ([[1, 1], [1, 1]], "identity"),
        ([[0, 1, 2], [1, 0, 2], [2, 2, 0]], "not associative"),
        ([[0, 1], [1, 2]], "from 0 to 1"),
        ([[0, -1], [1, 0]], "from 0 to 1"),
        ([[0.0, 1.0], [1.0, 0.0]], "element numbers"),
        ([[0, 1]], "square"),
        ([], "square"),
        (3, "square"),
        ([[0, 1], [1]], "square table"),
        ("Z0", "Z0"),
        ("Q6", "multiples of 4"),
        ("X5", "names are like"),
        ("", "names are like"),
        ("Z257", "256"),
        ("Z2^9", "256"),
        ("Z2^0", "256"),
        ("S6", "256"),
        ("S99999999", "256"),
        ("Z99999999999999999999", "256"),
        (None, "name or a square table"),
    ],
)
def test_what_is_no_group(table: object, said: str) -> None:
    with pytest.raises(BasisError, match=said):
        st.bases.group(table, 2)


@pytest.mark.parametrize(
    "options,said",
    [
        ({"decoder": "best"}, "decoder must be one of"),
        ({"restarts": 0}, "restarts"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"maps": [[0, 1], [0, 1]]}, "three lists"),
        ({"maps": [[0, 1], [0, 1], [0, 8]]}, "from 0 to 7"),
        ({"maps": [[0, 1], [0, 1], [0, 0.5]]}, "from 0 to 7"),
        ({"maps": 5}, "three lists"),
        ({"maps": [[0, 1], [0, 1], ["a", "b"]]}, "three lists"),
    ],
)
def test_bad_options(options: dict, said: str) -> None:
    with pytest.raises(BasisError, match=said):
        st.bases.group("D4", 2, **options)


def test_a_tile_too_large_to_search() -> None:
    with pytest.raises(BasisError, match="give maps"):
        st.bases.group("Z4", 64)
