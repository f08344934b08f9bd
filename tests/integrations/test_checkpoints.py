"""Only a checkpoint that is as its seal says is gone on from."""

import shutil
from pathlib import Path

import pytest
from torch import nn

from strassen_tile.integrations.checkpoints import resumable, seal

NETWORK = nn.Linear(3, 2)


def checkpoint(folder: Path, step: int, epoch: int) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "shards").mkdir(parents=True)
    (path / "weights").write_bytes(b"weights")
    (path / "shards" / "0").write_bytes(b"of the optimiser")
    seal(path, NETWORK, epoch)
    return path


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "weights").write_bytes(b"weightz"),
        lambda path: (path / "weights").write_bytes(b""),
        lambda path: (path / "weights").unlink(),
        lambda path: shutil.rmtree(path / "shards"),
        lambda path: (path / "shards" / "1").write_bytes(b"one more"),
        lambda path: (path / "complete.json").unlink(),
        lambda path: (path / "complete.json").write_bytes((path / "complete.json").read_bytes()[:-1]),
        lambda path: (path / "complete.json").write_bytes(b"\xff"),
        lambda path: (path / "complete.json").write_text("[" * 100_000),
        lambda path: (path / "complete.json").write_text("[1]"),
        lambda path: (path / "complete.json").write_text('{"epoch": "2"}'),
        lambda path: seal(path, NETWORK, 3),  # an epoch that has no record
        lambda path: seal(path, nn.Linear(2, 3), 2),
        lambda path: seal(path, nn.Linear(3, 2, bias=False), 2),
    ],
)
def test_one_that_is_not_whole_is_removed_and_the_one_before_is_taken(tmp_path, damage) -> None:
    before = checkpoint(tmp_path, 50, 1)
    damage(checkpoint(tmp_path, 100, 2))
    assert resumable(tmp_path, NETWORK, recorded=2) == before
    assert list(tmp_path.iterdir()) == [before]


def test_the_latest_is_taken_and_no_other_is_left(tmp_path) -> None:
    """By epoch: as names, checkpoint-100 comes before checkpoint-50."""
    for step, epoch in ((50, 1), (100, 2)):
        latest = checkpoint(tmp_path, step, epoch)
    assert resumable(tmp_path, NETWORK, recorded=7) == latest
    assert list(tmp_path.iterdir()) == [latest]


def test_there_may_be_none(tmp_path) -> None:
    assert resumable(tmp_path / "nowhere", NETWORK, recorded=1) is None
    checkpoint(tmp_path, 50, 1)
    (tmp_path / "rest").mkdir()
    assert resumable(tmp_path, NETWORK, recorded=0) is None
    assert [path.name for path in tmp_path.iterdir()] == ["rest"]
