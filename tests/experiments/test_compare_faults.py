"""Whatever stops `strassen-tile compare`, and whenever, the same command goes on to the rows it would have had."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerState

from strassen_tile.cli import main
from strassen_tile.errors import ConfigError
from strassen_tile.experiments import runner, vision
from strassen_tile.experiments.log import locked
from strassen_tile.experiments.recipe import Recipe
from strassen_tile.integrations import checkpoints, trainer

posix = pytest.mark.skipif(os.name != "posix", reason="signals, limits and locks of POSIX")
# What a second training, or another day, changes in a row.
TIMES = ("train_seconds", "date", "command", "commit")


def command(out: Path, *more: str) -> list[str]:
    fixed = ["--model", "t2t_vit_micro", "--methods", "dense,stl", "--ranks", "8", "--seeds", "1"]
    return ["compare", *fixed, "--limit", "40", "--batch-size", "16", "--epochs", "3", "--out", str(out), *more]


RECIPE = Recipe(
    data="digits", model="t2t_vit_micro", image_size=None, methods=("dense",), ranks=(8,), seeds=(0,),
    tile=(4, 4, 4), mixing="sequence", encoder_scope="layer", init="random", epochs=3, batch_size=16, lr=1e-3, limit=40,
)  # fmt: skip


def go_on(out: Path) -> None:
    """The command's first method, without page and plot, to save time. The folder checks that the recipe is the same."""
    vision.compare(RECIPE, out)


def results(out: Path) -> list[dict]:
    rows = json.loads((out / "rows.json").read_text())
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def left_over(out: Path) -> list[str]:
    """Files a finished comparison has no use for."""
    kept = {"rows.json", "recipe.json", "report.html", "plot.png", ".lock"}
    return [path.name for path in out.rglob("*") if path.is_file() and path.name not in kept]


def die(out: Path, kind: str, at: float) -> int:
    """Run the command until it dies at that moment (see dying.py); its exit status."""
    script = Path(__file__).with_name("dying.py")
    arguments = [sys.executable, str(script), kind, str(int(at)), *command(out)]
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    with child:
        if kind == "time":
            child.stdout.readline()
            time.sleep(at)
            os.killpg(child.pid, signal.SIGKILL)
        said = child.communicate()[0].decode()
    assert "Traceback" not in said, said
    return child.returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[dict]:
    """The rows of a run that nothing stops."""
    out = tmp_path_factory.mktemp("whole")
    assert main(command(out)) == 0
    assert len(results(out)) == 6
    return results(out)


@posix
def test_killed_within_a_write_it_goes_on_to_the_same_rows(tmp_path, whole) -> None:
    assert die(tmp_path, "bytes", 100_000) == -signal.SIGXFSZ  # half of the first checkpoint
    (checkpoint,) = tmp_path.rglob("checkpoint-*")
    assert not (checkpoint / "complete.json").exists()  # it did die within one
    assert main(command(tmp_path)) == 0
    assert results(tmp_path) == whole
    assert not left_over(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@posix
def test_killed_at_twenty_random_moments_it_goes_on_to_the_same_rows(tmp_path, whole) -> None:
    """Eight before a change to the folder, six in the middle of writing a file, six at any time; four for each folder."""
    draw = random.Random(9)
    moments = [("step", draw.randrange(3, 30)) for _ in range(8)]
    moments += [("bytes", draw.randrange(1_000, 4_000_000)) for _ in range(6)]
    moments += [("time", draw.uniform(0.0, 1.5)) for _ in range(6)]
    draw.shuffle(moments)
    for number in range(5):
        out = tmp_path / str(number)
        for kind, at in moments[4 * number : 4 * number + 4]:
            status = die(out, kind, at)
            print(f"folder {number}: killed at {kind} {at:.4g}: exit status {status}")
            # By then a comparison may have ended: only half-written files come for certain.
            assert status == -signal.SIGXFSZ if kind == "bytes" else status in (0, -signal.SIGKILL)
        assert main(command(out)) == 0
        assert results(out) == whole
        assert not left_over(out)


def test_stopped_by_hand_while_a_checkpoint_is_made_it_goes_on(tmp_path, whole, monkeypatch, capsys) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    assert main(command(tmp_path)) == 130
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.undo()
    go_on(tmp_path)
    assert results(tmp_path) == whole[:3]


@posix
@pytest.mark.parametrize("size", [250, 3_000, 100_000, 3_000_000])
def test_a_full_disk_is_one_line_and_with_space_it_goes_on(tmp_path, whole, capsys, size) -> None:
    """No file may grow beyond `size` bytes: no recipe, no second row, no weights, no state of the optimiser."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        status = main(command(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert status == 1
    assert error.count("\n") == 1 and str(tmp_path) in error
    assert not list(tmp_path.rglob("*.tmp"))
    go_on(tmp_path)
    assert results(tmp_path) == whole[:3]


def test_a_disk_that_is_full_at_each_file_in_turn(tmp_path, whole, monkeypatch, capsys) -> None:
    def fill(owner: object, method: str, position: int, name: str) -> None:
        write = getattr(owner, method)

        def full(*arguments: object, **others: object) -> object:
            if Path(arguments[position]).name == name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[position]))
            return write(*arguments, **others)

        monkeypatch.setattr(owner, method, full)

    for name in (
        "recipe.json", "rows.json", "training_args.bin", "rng_state.pth", "trainer_state.json", "complete.json",
        "plot.png", "report.html",
    ):  # fmt: skip
        for writer in (
            (Path, "replace", 1),
            (Path, "write_text", 0),
            (torch, "save", 1),
            (TrainerState, "save_to_json", 1),
        ):
            fill(*writer, name)
        assert main(command(tmp_path)) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "No space left" in error and f"/{name}'" in error
        assert not list(tmp_path.rglob("*.tmp"))
        assert all((checkpoint / "complete.json").exists() for checkpoint in tmp_path.rglob("checkpoint-*"))
        monkeypatch.undo()
    assert main(command(tmp_path)) == 0
    assert results(tmp_path) == whole
    assert not left_over(tmp_path)


def test_a_second_comparison_in_the_folder_is_refused_and_loses_nothing(tmp_path, whole, monkeypatch, capsys) -> None:
    found = []
    run = runner.run

    def meddled(comparison, folder, **callbacks):
        def on_progress(progress: runner.Progress) -> None:
            if progress.run == 2 and not found:
                found.append(None)  # the second comparison makes progress too, where it is let in
                before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
                found[0] = main(command(tmp_path, "--methods", "2:4"))
                assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

        return run(comparison, folder, **{**callbacks, "on_progress": on_progress})

    monkeypatch.setattr(runner, "run", meddled)
    assert main(command(tmp_path)) == 0
    assert found == [1]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{tmp_path} is in use by process {os.getpid()}" in error
    assert results(tmp_path) == whole


@posix
def test_a_lock_is_let_go_of_and_says_who_holds_it(tmp_path, monkeypatch) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path):
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on "), locked(tmp_path):
            pass
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    import fcntl

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="cannot be locked"), locked(tmp_path):
        pass
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with pytest.warns(UserWarning, match="cannot be locked"), locked(tmp_path):
        pass


def stop_after(epoch: int, monkeypatch: pytest.MonkeyPatch, out: Path) -> Path:
    """The checkpoint of `epoch` of a run that is interrupted just then."""
    seal = trainer.seal

    def last(checkpoint: Path, model: torch.nn.Module, at: int) -> None:
        seal(checkpoint, model, at)
        if at == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "seal", last)
        with pytest.raises(KeyboardInterrupt):
            go_on(out)
    return next(out.rglob(f"checkpoint-{3 * epoch}"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "of another network", "of an older version", "without its rows"])
def test_a_checkpoint_of_no_use_is_not_gone_on_from(tmp_path, whole, monkeypatch, damage) -> None:
    """A disk that lies, an edit by hand: the run starts over, and comes to the same rows."""
    checkpoint = stop_after(1, monkeypatch, tmp_path)
    weights = checkpoint / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "cut":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    elif damage == "of another network":
        checkpoints.seal(checkpoint, torch.nn.Linear(2, 2), 1)
    elif damage == "of an older version":
        (checkpoint / "complete.json").unlink()
    else:
        (tmp_path / "rows.json").unlink()
    steps = []
    vision.compare(RECIPE, tmp_path, on_progress=lambda progress: steps.append(progress.step))
    assert steps == list(range(1, 10))
    assert results(tmp_path) == whole[:3]
    assert not left_over(tmp_path)


@pytest.mark.parametrize("damaged,first_step", [(False, 7), (True, 4)])
def test_it_goes_on_from_the_last_checkpoint_that_is_whole(tmp_path, whole, monkeypatch, damaged, first_step) -> None:
    checkpoint = stop_after(2, monkeypatch, tmp_path)
    if damaged:
        (checkpoint / "optimizer.pt").write_bytes(b"")
    steps = []
    vision.compare(RECIPE, tmp_path, on_progress=lambda progress: steps.append(progress.step))
    assert steps == list(range(first_step, 10))
    assert results(tmp_path) == whole[:3]


@pytest.mark.parametrize("name", ["recipe.json", "rows.json"])
@pytest.mark.parametrize("content", ["{not json", "[1]", "[" * 100_000, '[{"epoch": 1}]'])
def test_files_that_are_not_a_comparison_s_are_one_line(tmp_path, capsys, name, content) -> None:
    (tmp_path / name).write_text(content)
    assert main(command(tmp_path)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / name) in error
    assert (tmp_path / name).read_text() == content
