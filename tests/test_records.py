"""If these fail, measurements are lost, garbled, or kept without the machine that made them."""

import ast
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from strassen_tile import report
from strassen_tile.errors import DataError
from strassen_tile.files import write_bytes
from strassen_tile.records import ENVIRONMENT_FIELDS, append_rows, environment, environment_of, read_rows, write_rows
from strassen_tile.records.environment import _commit

ROWS = [
    {"method": "2:4", "rank": None, "top1": 88.25, "seed": 0, "kept": True, "note": 'a "quoted" line\nand ×'},
    {"method": "stl", "rank": 24, "top1": 1e-300, "seed": 1, "kept": False, "note": ""},
]


@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS])
def test_round_trip_keeps_values_types_and_order(tmp_path, rows):
    path = tmp_path / "new" / "rows.json"
    write_rows(path, rows)
    back = read_rows(path)
    assert back == rows
    assert [[type(value) for value in row.values()] for row in back] == [
        [type(value) for value in row.values()] for row in rows
    ]
    assert [list(row) for row in back] == [list(row) for row in rows]


def test_one_record_a_line(tmp_path):
    write_rows(tmp_path / "rows.json", ROWS)
    lines = (tmp_path / "rows.json").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(ROWS) + 2
    assert lines[1].startswith('{"method": "2:4"')


def test_append_extends_and_starts_a_file(tmp_path):
    path = tmp_path / "rows.json"
    append_rows(path, ROWS[:1])
    append_rows(path, ROWS[1:])
    assert read_rows(path) == ROWS


def test_append_leaves_a_malformed_file_alone(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1},')
    with pytest.raises(DataError, match=r"rows\.json"):
        append_rows(path, ROWS)
    assert path.read_text() == '[{"a": 1},'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_becomes_null(tmp_path, value):
    write_rows(tmp_path / "rows.json", [{"loss": value, "epoch": 3}])
    assert read_rows(tmp_path / "rows.json") == [{"loss": None, "epoch": 3}]
    (tmp_path / "other.json").write_text('[{"loss": NaN, "gain": -Infinity}]')
    assert read_rows(tmp_path / "other.json") == [{"loss": None, "gain": None}]


@pytest.mark.parametrize("row", [{"a": [1]}, {"a": {"b": 1}}, {"a": object()}, {1: 2}, "text"])
def test_a_row_that_is_not_flat_is_refused_and_nothing_written(tmp_path, row):
    path = tmp_path / "rows.json"
    write_rows(path, ROWS)
    with pytest.raises(DataError, match=r"rows\.json: row 1"):
        write_rows(path, [ROWS[0], row])
    assert read_rows(path) == ROWS


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read"),
        (b"\xff\xfe", "cannot read"),
        (b'[\n{"a": 1},\n{"a"}\n]', "line 3"),
        (b'{"a": 1}', "one dict"),
        (b'[{"a": [1]}]', "row 0, field 'a' is a list"),
        (b"[3]", "row 0 is a int"),
    ],
)
def test_malformed_files_are_named(tmp_path, content, says):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        read_rows(path)
    assert "broken.json" in str(caught.value)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, broken, error):
    path = tmp_path / "rows.json"
    write_rows(path, ROWS)

    def fail(*_):
        raise error

    monkeypatch.setattr(*((os, "fsync") if broken == "fsync" else (Path, "replace")), fail)
    with pytest.raises(type(error)):
        write_rows(path, ROWS[:1])
    monkeypatch.undo()
    assert read_rows(path) == ROWS
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
def test_files_follow_the_umask_and_links_stay_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "rows.json")
    before = os.umask(0o022)
    try:
        write_bytes(tmp_path / "link.json", b"[]")
    finally:
        os.umask(before)
    assert (tmp_path / "link.json").is_symlink()
    assert stat.S_IMODE((tmp_path / "real" / "rows.json").stat().st_mode) == 0o644


def test_environment_is_flat_and_names_no_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/someone/bin/strassen-tile", "compare", "--out", "my results"])
    fields = environment()
    assert fields["command"] == "strassen-tile compare --out 'my results'"
    assert set(fields) <= set(ENVIRONMENT_FIELDS)
    assert fields["date"].endswith("Z")
    assert fields["cores"] >= 1
    write_rows(tmp_path / "rows.json", [fields])
    assert read_rows(tmp_path / "rows.json") == [fields]
    assert environment("make it")["command"] == "make it"


def test_commit_is_that_of_the_package_s_own_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    package, elsewhere = tmp_path / "src" / "strassen_tile", tmp_path / "venv" / "lib" / "strassen_tile"
    for folder in (package, elsewhere):
        folder.mkdir(parents=True)
    (package / "a.py").write_text("a = 1\n")
    git("init", "-q")
    assert _commit(package) == ""  # A checkout without a commit.
    git("add", "src")
    git("commit", "-qm", "first")
    head = git("rev-parse", "--short", "HEAD")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # As a git hook would set it.
    assert _commit(package) == head
    (package / "untracked.py").write_text("")
    assert _commit(package) == head
    (package / "a.py").write_text("a = 2\n")
    assert _commit(package) == head + "+dirty"
    assert _commit(elsewhere) == ""


def test_environment_of_rows_merges_what_differs():
    rows = [
        {"date": "2026-01-02T00:00:00Z", "cores": 8, "machine": "A", "top1": 1.0},
        {"date": "2026-01-01T00:00:00Z", "cores": 8, "machine": "B"},
    ]
    assert environment_of(rows) == {
        "date": "2026-01-01T00:00:00Z to 2026-01-02T00:00:00Z",
        "machine": "A; B",
        "cores": 8,
    }


def test_importing_the_report_imports_neither_rich_nor_matplotlib():
    # Read, not run: a fresh interpreter with torch takes seconds. Imports inside functions and under
    # TYPE_CHECKING are nested, and so not among the statements of the module itself.
    for path in Path(report.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {"rich", "matplotlib"}, path
