"""If these fail, a newcomer who pastes from the README or the docs meets an error."""

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest

from strassen_tile import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page: the line of their first statement, and their text."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


# A tutorial is one program from page top to bottom, on a model folder that its test makes: integrations/test_tutorials.py.
ALONE = [path for path in PAGES if path.name != "your-own-model.md"]
BLOCKS = [pytest.param(path, line, code, id=f"{path.name}:{line}") for path in ALONE for line, code in blocks(path)]


def test_there_are_blocks_to_run() -> None:
    assert sum(line.startswith("```python") for path in ALONE for line in path.read_text().splitlines()) == len(BLOCKS)
    assert len(blocks(ROOT / "README.md")) >= 3


@pytest.mark.parametrize(("path", "line", "code"), BLOCKS)
def test_a_block_runs_pasted_alone(tmp_path, monkeypatch, path, line, code) -> None:
    monkeypatch.chdir(tmp_path)
    # Empty lines before it, so that a traceback names the line of the page.
    exec(compile("\n" * (line - 1) + code, f"<{path.name}>", "exec"), {"__name__": "__main__"})


def commands() -> list[str]:
    """Every `strassen-tile` command that pages show and that published rows say made them."""
    found = []
    for path in PAGES:
        for code in re.findall(r"`([^`\n]+)`|^    (\S.*)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            command = re.search(r"(?:^|[ ;])(?:strassen-tile|-m strassen_tile\.cli)\s+([^;&|#]+)", "".join(code))
            found += [command[1].replace("…", "").strip()] if command else []
    for path in (ROOT / "results").glob("*/rows.json"):
        rows = json.loads(path.read_text(encoding="utf-8"))
        found += [row["command"].partition(" ")[2] for row in rows]
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_a_command_is_one_that_the_program_takes(monkeypatch, command) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, *arguments, **others):
        parse(self, *arguments, **others)
        self.exit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    for added, status in (([], 0), (["--no-such-option"], 2)):
        with pytest.raises(SystemExit) as ended:
            cli.main([*shlex.split(command), *added])
        assert ended.value.code == status
