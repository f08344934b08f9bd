"""Whatever is typed, the command line says what is wrong with it in one line, before it does any work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from strassen_tile import cli
from strassen_tile.cli import main
from strassen_tile.cost import Machine
from strassen_tile.experiments import measuring, speed

HUGE = "9" * 23
BENCH, PLAN, COMPARE = ["bench", "--shapes", "64x64x64"], ["plan", "--shapes", "64x64x64"], ["compare", "--limit", "20"]
FLAT = Machine("cpu", "float32", 1, ((128, 1e11),), ((32, 1e11),), 1e11, 1e30, 1e30, 0.0)
ATTACKS = {
    "huge number of seeds": ([*COMPARE, "--seeds", HUGE], "whole number"),
    "too many seeds": ([*COMPARE, "--seeds", "100000"], "at most 1000 seeds"),
    "huge seed": ([*COMPARE, "--seeds", "0,4294967296"], "seeds are numbers from 0 to"),
    "negative seed": ([*COMPARE, "--seeds", "-1"], "seeds are numbers from 0 to"),
    "seed of no digits": ([*COMPARE, "--seeds", ""], "whole number"),
    "lr infinite": ([*COMPARE, "--lr", "inf"], "finite"),
    "lr nan": ([*COMPARE, "--lr", "nan"], "finite"),
    "lr text": ([*COMPARE, "--lr", "1e"], "a number is wanted"),
    "huge epochs": ([*COMPARE, "--epochs", HUGE], "whole number"),
    "float epochs": ([*COMPARE, "--epochs", "1.5"], "whole number"),
    "huge image": ([*COMPARE, "--image-size", "100000000"], "at most 4096"),
    "digits of another script": ([*COMPARE, "--ranks", "٣"], "whole number"),
    "superscript": ([*COMPARE, "--ranks", "²"], "whole number"),
    "underscore": ([*COMPARE, "--ranks", "1_0"], "whole number"),
    "huge rank": ([*COMPARE, "--ranks", "10000000000", "--methods", "stl"], "rank 10000000000"),
    "huge tile": ([*COMPARE, "--tile", "1000000", "--methods", "stl"], "encoders of"),
    "set of no pair": ([*COMPARE, "--set", "epochs"], "key=value is wanted; got 'epochs'"),
    "set of no key": ([*COMPARE, "--set", "ephocs=3"], "unknown key 'ephocs'; there are epochs"),
    "set of no number": ([*COMPARE, "--set", "epochs=1_0"], "epochs: a whole number"),
    "set twice": ([*COMPARE, "--set", "lr=1", "--set", "lr=2"], "lr is given twice"),
    "set and option": ([*COMPARE, "--set", "lr=1", "--lr", "2"], "lr: given twice, by --set and by an option"),
    "no recipe": ([*COMPARE, "--recipe", "digit"], "there is no recipe 'digit'; there are demo, digits"),
    "recipe without data": (["compare", "--recipe", "imagefolder"], "imagefolder.toml leaves data open; give --data"),
    "recipe of another folder": ([*COMPARE, "--recipe", "../recipes/digits"], "there is no recipe"),
    "no recipe file": ([*COMPARE, "--recipe", "nowhere.toml"], "nowhere.toml cannot be read as TOML: No such file"),
    "recipe that is a folder": ([*COMPARE, "--recipe", f"{Path(__file__).parent}/.toml"], "there is no recipe"),
    "method of no setting": ([*COMPARE, "--methods", "stl[rnk=8]"], "unknown key 'rnk'; there are"),
    "method without settings": (
        [*COMPARE, "--methods", "dense[rank=2]"],
        "dense: unknown key 'rank'; there are mix, width",
    ),
    "no method": ([*COMPARE, "--methods", ""], "unknown methods without a name; there are dense"),
    "method half open": ([*COMPARE, "--methods", "stl[rank=8,dense"], "name or name[key=value,…] is wanted"),
    "method twice": ([*COMPARE, "--methods", "stl,stl[rank=16]"], "the same run twice: stl r=16"),
    "precision": ([*COMPARE, "--precision", "float8"], "one of auto, float32, bfloat16 is wanted; got 'float8'"),
    "workers": ([*COMPARE, "--workers", "-1"], "workers must be from 0 to 1024"),
    "long data": ([*COMPARE, "--data", "x" * 5000], "File name too long"),
    "home of nobody": ([*COMPARE, "--data", "~nobody-at-all/x"], "home"),
    "empty data": ([*COMPARE, "--data", ""], "is not a folder"),
    "nul": ([*COMPARE, "--data", "a\0b"], "text in UTF-8"),
    "bytes that are no text": ([*COMPARE, "--data", "a\udcffb"], "text in UTF-8"),
    "out of no text": ([*BENCH, "--out", "a\udcffb"], "text in UTF-8"),
    "empty out": ([*BENCH, "--out", ""], "path of a folder"),
    "out of nobody": ([*BENCH, "--out", "~nobody-at-all/x"], "home"),
    "a hundred thousand threads": ([*BENCH, "--threads", "100000"], "--threads must be positive"),
    "threads beyond integers": ([*BENCH, "--threads", HUGE], "whole number"),
    "negative threads": ([*BENCH, "--threads", "-1"], "--threads must be positive"),
    "giant shape": (["bench", "--shapes", "x".join(["9" * 9] * 3)], "too large"),
    "wide shape": (["bench", "--shapes", "64x64x999999999"], "too large"),
    "bench rank": ([*BENCH, "--ranks", "10000000000"], "rank 10000000000"),
    "bench rank after a good one": ([*BENCH, "--ranks", "8,10000000000"], "rank 10000000000"),
    "bench tile": ([*BENCH, "--tile", "1000000"], "encoders of"),
    "bench seconds": ([*BENCH, "--seconds=-inf"], "seconds not negative"),
    "bench seconds without end": ([*BENCH, "--seconds", "inf"], "finite"),
    "bench seconds beyond floats": ([*BENCH, "--seconds", "1e309"], "finite"),
    "plan least of all": ([*PLAN, "--min-speedup", "inf"], "finite"),
    "plan least of nothing": ([*PLAN, "--min-speedup", "nan"], "finite"),
    "plan into a device": ([*PLAN, "--out", os.devnull], f"{os.devnull} is not a folder"),
    "bench into a device": ([*BENCH, "--out", os.devnull], f"{os.devnull} is not a folder"),
    "compare into a device": ([*COMPARE, "--out", os.devnull], f"{os.devnull} is not a folder"),
    "bench passes": ([*BENCH, "--pass", ""], "a pass forward or step"),
    "bench 2:4 on a CPU": ([*BENCH, "--methods", "2:4"], "need an NVIDIA GPU"),
    "plan rank": ([*PLAN, "--rank", HUGE], "whole number"),
    "plan rank 10^17": ([*PLAN, "--rank", "1" + "0" * 17], "rank 1000000000"),
    "plan rank 0": ([*PLAN, "--rank", "0"], "rank must be a positive integer"),
    "plan tile": ([*PLAN, "--tile", "4,x"], "whole number"),
    "plan tile of two": ([*PLAN, "--tile", "4,4"], "three of them"),
    "plan exits": (["plan", "sys:exit"], "SystemExit"),
    "plan of no module": (["plan", "os:getcwd"], "is a str, not a torch module"),
    "plan of a colon": (["plan", ":x"], "cannot make a model"),
    "plan of a long name": (["plan", "a" * 5000], "a"),
    "plan of a folder of nothing": (["plan", str(Path(__file__).parent)], "cannot make a model"),
    "deep arguments": (["plan", "torch.nn:Linear", "--arguments", "[" * 100_000], "JSON object"),
    "arguments twice": (["plan", "torch.nn:Linear", "--arguments", '{"a": 1, "a": 2}'], "appears twice"),
    "unknown option": ([*PLAN, "--colour"], "unrecognized arguments: --colour"),
    "no command": ([], "command"),
    "unknown command": (["plot"], "invalid choice: 'plot'"),
}


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    return status, capsys.readouterr().err


@pytest.mark.parametrize("case", ATTACKS)
@pytest.mark.timeout(60)
def test_a_bad_argument_is_said_in_one_line(case: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "machine", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr(measuring, "machine", lambda *_, **__: pytest.fail("work was begun"))
    arguments, message = ATTACKS[case]
    status, error = said(arguments, capsys)
    assert status in (1, 2)
    assert message in error
    assert error.startswith("strassen-tile") and error.endswith("\n")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir()), "something was left behind"


@pytest.mark.parametrize("command", [BENCH, PLAN])
@pytest.mark.parametrize("kind", ["file", "below a file", "read-only", "loop"])
def test_a_folder_that_cannot_be_written_is_said_before_work(command, kind, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(speed, "machine", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr(measuring, "machine", lambda *_, **__: pytest.fail("work was begun"))
    out = tmp_path / "out"
    if kind == "read-only":
        out.mkdir(mode=0o500)
        if os.access(out, os.W_OK):
            pytest.skip("root writes anywhere")
    elif kind == "loop":
        out.symlink_to(out)
    else:
        out.touch()
    status, error = said([*command, "--out", str(out / "x" if kind == "below a file" else out)], capsys)
    assert (status, error.count("\n")) == (1, 1)
    assert str(out) in error


def test_brackets_in_a_path_are_no_markup(tmp_path, capsys, monkeypatch) -> None:
    """rich read [/b] as markup, after all the work was done."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measuring, "machine", lambda *_, **__: FLAT)
    out = tmp_path / "[/b] [red]x[:smile:]"
    assert main([*PLAN, "--out", str(out)]) == 0
    assert f"{out / 'rows.json'}\n" in capsys.readouterr().out  # in one line too, to be copied
    assert json.loads((out / "rows.json").read_text())


def test_a_home_is_expanded(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(measuring, "machine", lambda *_, **__: FLAT)
    monkeypatch.chdir(tmp_path)
    assert main([*PLAN, "--out", "~/out"]) == 0
    assert (tmp_path / "out" / "rows.json").exists()


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes\nmore"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
    ids=["python", "cpu", "cuda"],
)
def test_memory_that_is_not_there_is_one_line(failure, tmp_path, capsys, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(measuring, "machine", fail)
    status, error = said([*PLAN, "--out", str(tmp_path)], capsys)
    assert (status, error.count("\n")) == (1, 1)
    assert "too large for this machine's memory" in error


def test_a_mistake_of_ours_is_not_covered_up(tmp_path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(measuring, "machine", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main([*PLAN, "--out", str(tmp_path)])


HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
from strassen_tile.cli import main
from strassen_tile.cost import Machine
sys.exit(main(sys.argv[2:]))
"""
MISSING = [
    *[("rich", extra, command) for extra, command in (("report", PLAN), ("report", BENCH), ("vision", COMPARE))],
    *[("matplotlib", "report", PLAN), ("numpy", "report", BENCH)],
    *[(package, "vision", COMPARE) for package in ("transformers", "accelerate", "safetensors")],
]


@pytest.mark.parametrize(("package", "extra", "command"), MISSING)
def test_a_missing_package_is_named_with_its_extra(package, extra, command, capsys, monkeypatch) -> None:
    real = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == package else real(name))
    status, error = said(command, capsys)
    assert (status, error.count("\n")) == (1, 1)
    assert f'needs {package}, which is not installed: pip install "strassen-tile[{extra}]"' in error


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("rich", BENCH),
        pytest.param("sklearn", COMPARE, marks=pytest.mark.slow),
        ("transformers", ["plan", str(Path(__file__).parent)]),
    ],
)
def test_without_a_package_the_command_starts_and_says_so(package, command, tmp_path) -> None:
    command = [sys.executable, "-c", HIDE, package, *command, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert package in done.stderr
    assert 'pip install "strassen-tile[' in done.stderr
