"""`strassen-tile basis`: every part of it once as a user would type it, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from strassen_tile import bases
from strassen_tile.bases import search
from strassen_tile.cli import main


def test_list_and_show(capsys) -> None:
    assert main(["basis", "list", "--tile", "4"]) == 0
    assert "0.4712" in capsys.readouterr().out
    assert main(["basis", "list", "--tile", "4,2,2"]) == 0
    assert "2x2x4_r6" in (said := capsys.readouterr().out)
    assert "4x4x4" not in said
    assert main(["basis", "show", "strassen", "--tile", "2", "--factors"]) == 0
    said = capsys.readouterr().out
    assert "exact" in said
    assert "decoder (7, 2, 2)" in said
    assert main(["basis", "show", "group:Z2^2", "--tile", "2"]) == 0


def test_export_verify_import(tmp_path: Path, capsys) -> None:
    assert main(["basis", "export", "strassen", "--tile", "4", "--out", str(tmp_path / "one.sms")]) == 0
    assert main(["basis", "verify", str(tmp_path / "one_R.sms")]) == 0
    assert "4×4×4, rank 49, exact" in capsys.readouterr().out
    assert main(["basis", "import", str(tmp_path / "one_L.sms"), "--out", str(tmp_path / "one.json")]) == 0
    assert torch.equal(bases.load(tmp_path / "one.json").encoder, bases.strassen(2).encoder)
    text = (tmp_path / "one_L.sms").read_text()
    (tmp_path / "one_L.sms").write_text(text.replace("1 1 1\n", "1 1 2\n"))
    assert main(["basis", "verify", str(tmp_path / "one.json"), str(tmp_path / "one_P.sms")]) == 1
    said = capsys.readouterr()
    assert "rank 49" in said.out
    assert "claims to multiply" in said.err


def test_search_and_condition(tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "found.json")
    assert (
        main(["basis", "search", "--tile", "2", "--rank", "6", "--rounds", "1", "--start", "strassen", "--out", out])
        == 0
    )
    assert bases.load(out).error < 0.126
    assert (
        main(["basis", "search", "--tile", "2", "--rank", "6", "--rounds", "2", "--start", "strassen", "--out", out])
        == 0
    )
    assert "after 2 rounds" in capsys.readouterr().out
    assert main(["basis", "condition", "strassen", "--tile", "2", "--out", str(tmp_path / "better.json")]) == 0
    assert bases.load(tmp_path / "better.json").kappa < bases.strassen().kappa


def test_a_start_of_its_own_rank(tmp_path: Path, monkeypatch) -> None:
    for name, value in (("_STARTS", 4), ("_HOPS", 4), ("_SWEEPS", 20), ("_POLISHES", 5), ("_RIDGES", (1e-3,))):
        monkeypatch.setattr(search, name, value)
    out = tmp_path / "one.json"
    assert main(["basis", "search", "--tile", "2", "--rank", "6", "--start", "strassen", "--out", str(out)]) == 0
    assert "strassen" in json.loads(out.read_text())["provenance"]["starts"][0]


def test_names_are_shown_as_they_are(tmp_path: Path, capsys) -> None:
    """A name with what rich takes for markup, or what a terminal cannot show."""
    record = {field: getattr(bases.strassen(), field).tolist() for field in ("encoder", "weight_encoder", "decoder")}
    for name in ("[/x]", "[red]hi", "\ud800", "two\nlines"):
        (tmp_path / "one.json").write_text(json.dumps({**record, "name": name}))
        assert main(["basis", "show", str(tmp_path / "one.json")]) == 0
        if name.isprintable():
            assert name in capsys.readouterr().out
        assert main(["basis", "export", str(tmp_path / "one.json"), "--out", str(tmp_path / "one.txt")]) == 0
        assert main(["basis", "verify", str(tmp_path / "one.txt")]) == 0


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["show", "strassen", "--tile", "3"], "cubic tile"),
        (["show", "nothing.json"], "cannot read"),
        (["export", "approximate", "--rank", "24", "--out", "{}/one.sms"], "hold exact algorithms"),
        (["export", "strassen", "--out", "{}/one.pkl"], "saved as"),
        (["condition", "approximate", "--out", "{}/one.json"], "keeps exact bases exact"),
        (["search", "--tile", "2", "--rank", "9", "--out", "{}/one.json"], "rank must be"),
        (["search", "--tile", "2", "--rank", "5", "--out", "{}/one.txt"], "must be a .json"),
        (["search", "--tile", "2", "--rank", "5", "--minutes", "-1", "--out", "{}/one.json"], "minutes must be"),
        (["search", "--tile", "2", "--rank", "5", "--out", "/proc/none/one.json"], "/proc/none"),
        (["show", "group:Z" + "9" * 5000], "no group"),
        (["show", "random:" + "9" * 5000], "cannot read"),
        (["import", "{}", "--out", "{}/one.json"], "folder"),
    ],
)
def test_what_is_refused(tmp_path: Path, capsys, arguments: list[str], said: str) -> None:
    assert main(["basis", *(argument.format(tmp_path) for argument in arguments)]) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["search", "--out", "x.json"], ["show"], ["show", "naive", "--tile", "x"]])
def test_usage(capsys, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["basis", *arguments])
    assert stopped.value.code == 2
    assert "strassen-tile basis" in capsys.readouterr().err
