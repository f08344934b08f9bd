"""`strassen-tile amm`: Gaussian and own matrices, rows and page, and what it refuses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from strassen_tile.baselines import roster
from strassen_tile.cli import main
from strassen_tile.experiments import approximation
from strassen_tile.records import read_rows

np = pytest.importorskip("numpy")
QUICK = ["--budgets", "0.6", "--trials", "2", "--seconds", "0.001"]


def test_gaussian(tmp_path: Path, capsys) -> None:
    out = tmp_path / "amm"
    assert main(["amm", "--shapes", "32x48x32", *QUICK, "--out", str(out)]) == 0
    rows = read_rows(out / "rows.json")
    by_name = {row["method"]: row for row in rows}
    assert set(by_name) == set(roster.APPROXIMATIONS)
    assert by_name["stl"]["predicted"] == pytest.approx(by_name["stl"]["error"], rel=0.15)
    assert by_name["dense"]["error"] < 1e-10
    assert by_name["gaussian"]["trials"] == 2
    assert by_name["low-rank"]["trials"] == 1
    assert all(row["flop_ratio"] > 0 for row in rows)
    page = (out / "report.html").read_text()
    assert "co-occurring-directions" in page
    assert (out / "plot.png").stat().st_size > 1000
    assert "rows.json" in capsys.readouterr().out


def test_own_matrices(tmp_path: Path) -> None:
    x, w = torch.randn(40, 16), torch.randn(16, 12)
    save_file({"x": x, "w": w}, tmp_path / "pair.safetensors")
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "w.npy", w.double().numpy())
    found = []
    for data in (f"{tmp_path}/pair.safetensors", f"{tmp_path}/x.npy,{tmp_path}/w.npy"):
        out = str(tmp_path / "out")
        assert main(["amm", "--data", data, "--methods", "low-rank,2:4,pca", *QUICK, "--out", out]) == 0
        found.append([row["error"] for row in read_rows(tmp_path / "out/rows.json")])
    assert found[0] == pytest.approx(found[1])
    assert read_rows(tmp_path / "out/rows.json")[0]["n"] == 20  # the other half is fitted to


def test_what_an_interrupt_says(tmp_path: Path, capsys, monkeypatch) -> None:
    """Only commands that go on where they were say so."""

    def interrupted(*given: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(approximation, "measure", interrupted)
    assert main(["amm", "--out", str(tmp_path)]) == 130
    assert "goes on" not in capsys.readouterr().err
    monkeypatch.setattr("strassen_tile.experiments.basis.search", interrupted)
    assert main(["basis", "search", "--rank", "5", "--tile", "2", "--out", str(tmp_path / "one.json")]) == 130
    assert "goes on from here" in capsys.readouterr().err


def test_sizes_that_some_products_do_not_take(tmp_path: Path) -> None:
    """2:4 wants groups of four features: it is left out, and the rest is measured."""
    assert main(["amm", "--shapes", "10x10x10", *QUICK, "--out", str(tmp_path)]) == 0
    methods = {row["method"] for row in read_rows(tmp_path / "rows.json")}
    assert {"low-rank", "dense"} <= methods and not any(name.startswith("2:4") for name in methods)


def test_what_no_budget_pays_for_is_said(tmp_path: Path, capsys) -> None:
    """Nothing measured over an earlier run's rows, or a budget in the rows that a method did not keep."""
    out = ["--out", str(tmp_path), "--shapes", "8x8x8", "--seconds", "0.01", "--trials", "2"]
    assert main(["amm", *out, "--methods", "stl,pq,low-rank", "--budgets", "0.3,0.6"]) == 0
    assert "pq at 0.3 of gaussian 8×8×8" in " ".join(capsys.readouterr().out.split())
    rows = read_rows(tmp_path / "rows.json")
    assert rows and all(row["flop_ratio"] <= row["budget"] for row in rows)
    assert main(["amm", *out, "--methods", "stl,pq", "--budgets", "0.25"]) == 1
    assert "no budget pays for anything: stl at 0.25" in capsys.readouterr().err
    assert read_rows(tmp_path / "rows.json") == rows


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--data", "nothing"], "data must be"),
        (["--data", "{}/none.safetensors"], "cannot read"),
        (["--data", "{}/broken.safetensors"], "cannot read"),
        (["--data", "{}/other.safetensors"], "must have tensors x and w"),
        (["--data", "{}/apart.safetensors"], "x must be"),
        (["--data", "{}/nan.safetensors"], "not finite"),
        (["--data", "{}/objects.npy,{}/objects.npy"], "cannot read"),
        (["--data", "{}/open.npy,{}/open.npy"], "cannot read"),
        (["--data", "{}/large.npy,{}/large.npy"], "not finite in float32"),
        (["--data", "{}/zero.safetensors"], "x w is all zeros"),
        (["--data", "{}/apart.npy,{}/half.npy"], "x w is all zeros"),
        (["--data", "{}/huge.npy,{}/huge.npy"], "overflows float32"),
        (["--data", "{}/complex.safetensors"], "real numbers"),
        (["--data", "{}/eight.safetensors"], "16 bits or more"),
        (["--data", "~nobody-of-this-name/x.safetensors"], "cannot find"),
        (["--budgets", "nan"], "budgets must be"),
        (["--shapes", "3x4"], "NxKxM"),
        (["--methods", "magic"], "unknown methods"),
        (["--budgets", "0"], "budgets must be"),
        (["--budgets", "1.5"], "budgets must be"),
        (["--trials", "0"], "trials"),
        (["--seconds", "0"], "seconds"),
    ],
)
def test_what_is_refused(tmp_path: Path, capsys, arguments: list[str], said: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    save_file({"a": torch.ones(2)}, folder / "other.safetensors")
    save_file({"x": torch.ones(4, 3), "w": torch.ones(4, 3)}, folder / "apart.safetensors")
    save_file({"x": torch.full((4, 3), float("nan")), "w": torch.ones(3, 3)}, folder / "nan.safetensors")
    save_file({"x": torch.zeros(4, 3), "w": torch.ones(3, 3)}, folder / "zero.safetensors")
    for name, dtype in (("complex", torch.complex64), ("eight", torch.float8_e4m3fn)):
        save_file({"x": torch.ones(3, 3).to(dtype), "w": torch.ones(3, 3).to(dtype)}, folder / f"{name}.safetensors")
    np.save(folder / "apart.npy", np.eye(4) * [0, 0, 1, 1])  # on features that w does not have
    np.save(folder / "half.npy", np.eye(4) * [1, 1, 0, 0])
    np.save(folder / "huge.npy", np.full((4, 4), 1e25))
    np.save(folder / "large.npy", np.full((4, 4), 1e300))
    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2"  # a bracket that is never closed
    (folder / "open.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head)
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    out = tmp_path / "out"
    assert main(["amm", *(one.replace("{}", str(folder)) for one in arguments), "--out", str(out)]) == 1
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_layer_that_is_near_no_product_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["amm", "--methods", "stl,dense+mix", *QUICK, "--out", str(tmp_path)]) == 1
    assert "dense+mix is a layer of its own" in capsys.readouterr().err
