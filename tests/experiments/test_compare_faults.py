"""Whatever stops `strassen-tile compare`, and whenever, the same command goes on to the rows it would have had."""

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

from strassen_tile.cli import main
from strassen_tile.errors import ConfigError
from strassen_tile.experiments import runner, vision
from strassen_tile.experiments.log import locked
from strassen_tile.experiments.recipe import Recipe
from strassen_tile.integrations import checkpoints, trainer

pytestmark = pytest.mark.usefixtures("among_few")
posix = pytest.mark.skipif(os.name != "posix", reason="signals, limits and locks of POSIX")
# What a second training, or another day, changes in a row.
TIMES = ("train_seconds", "date", "command", "commit")


def command(out: Path, *more: str) -> list[str]:
    data = "--recipe digits --data few --limit 40 --validation 0"
    fixed = f"{data} --model t2t_vit_micro --methods dense,stl --ranks 8 --seeds 1 --batch-size 16 --epochs 3"
    return ["compare", *fixed.split(), "--save", "--out", str(out), *more]


RECIPE = Recipe(
    data="few", model="t2t_vit_micro", image_size=None, methods=("dense",), ranks=(8,), seeds=(0,),
    tile=(4, 4, 4), mixing="sequence", encoder_scope="layer", init="random", epochs=3, batch_size=16, lr=1e-3, limit=40,
    save=True,
)  # fmt: skip


def go_on(out: Path) -> None:
    """The command's first method, without page and plot, to save time. The folder checks that the recipe is the same."""
    vision.compare(RECIPE, out)


def results(out: Path) -> list[dict]:
    """The rows, with a digest of the weights kept of a run in its last one."""
    rows = json.loads((out / "rows.json").read_text())
    last = {row["method"]: row for row in rows if row["epoch"] == RECIPE.epochs}
    for path in (out / "models").glob("*"):
        last[path.name.partition("-")[0]]["weights"] = digest(path)
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def digest(path: Path) -> str:
    """Of names, types and all bits of the tensors in a safetensors file."""
    found = hashlib.sha256()
    for name, value in sorted(load_file(path).items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def left_over(out: Path) -> list[str]:
    """Files a finished comparison has no use for."""
    kept = {"rows.json", "recipe.json", "report.html", "plot.png", ".lock"}
    files = [path for path in out.rglob("*") if path.is_file() and path.name not in kept]
    return [path.name for path in files if path.parent != out / "models"]


def die(out: Path, *moments: tuple[str, float | str]) -> list[dict]:
    """Run the command until it dies, at each of these moments (see dying.py): its exit statuses, and the files it left."""
    script = Path(__file__).with_name("dying.py")
    plain = [str(part) for moment in moments for part in moment]
    done = subprocess.run(
        [sys.executable, str(script), *plain, *command(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
        check=False,
    )
    assert "Traceback" not in done.stdout, done.stdout
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"status"')]
    assert len(found) == len(moments), done.stdout
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory, among_few) -> list[dict]:
    """The rows of a run that nothing stops."""
    out = tmp_path_factory.mktemp("whole")
    assert main(command(out)) == 0
    assert len(results(out)) == 6
    return results(out)


@posix
@pytest.mark.slow
def test_killed_again_and_again_it_comes_to_the_same_rows_and_the_same_weights(tmp_path, whole) -> None:
    """Within a checkpoint, between two steps of an epoch, within the file of weights, and with that not in its place."""
    moments = [("bytes", 100_000), ("batch", 5), ("within", "weights"), ("rename", "models/dense")]
    within, between, weights, finished = die(tmp_path, *moments)
    assert within["status"] == weights["status"] == -signal.SIGXFSZ
    assert between["status"] == finished["status"] == -signal.SIGKILL
    # They did die there.
    checkpoint = [name for name in within["files"] if "/checkpoint-" in name]
    assert checkpoint and not [name for name in checkpoint if name.endswith("complete.json")]
    assert "runs/dense-0/checkpoint-3/complete.json" in between["files"]
    assert [name for name in weights["files"] if name.startswith("runs/dense-0/.weights.safetensors.")]
    assert "runs/dense-0/weights.safetensors" in finished["files"]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert main(command(tmp_path)) == 0
    assert results(tmp_path) == whole
    assert [row["epoch"] for row in whole if "weights" in row] == [3, 3]
    assert json.loads((tmp_path / "rows.json").read_text())[:3] == rows  # all of it: nothing was trained twice
    assert not left_over(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@posix
def test_killed_at_many_random_moments_it_goes_on_to_the_same_rows_and_weights(tmp_path, whole) -> None:
    """Before a change to the folder, between steps, in the middle of writing a file, of the weights, at any time."""
    draw = random.Random(9)
    moments: list[tuple[str, float | str]] = [("step", draw.randrange(3, 30)) for _ in range(8)]
    moments += [("batch", draw.randrange(1, 9)) for _ in range(8)]
    moments += [("bytes", draw.randrange(1_000, 4_000_000)) for _ in range(6)]
    moments += [("time", draw.uniform(0.0, 1.5)) for _ in range(8)]
    moments += [("within", "weights")] * 3 + [("rename", "models/")] * 3
    draw.shuffle(moments)
    for number in range(6):
        out = tmp_path / str(number)
        here = moments[6 * number : 6 * number + 6]
        for (kind, at), found in zip(here, die(out, *here), strict=True):
            status = found["status"]
            print(f"folder {number}: killed at {kind} {at}: exit status {status}")
            # By then a comparison may have ended: only half-written files come for certain, while there are any to write.
            assert status in (0, -signal.SIGXFSZ if kind in ("bytes", "within") else -signal.SIGKILL)
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
@pytest.mark.parametrize(
    "size", [pytest.param(250, marks=pytest.mark.slow), 3_000, pytest.param(100_000, marks=pytest.mark.slow), 3_000_000]
)
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


@pytest.mark.slow
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
        "weights.safetensors", "dense-0.safetensors", "plot.png", "report.html",
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


@pytest.mark.parametrize(
    "damage",
    [
        "cut",
        pytest.param("flipped", marks=pytest.mark.slow),
        "of another network",
        pytest.param("of an older version", marks=pytest.mark.slow),
        "without its rows",
    ],
)
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
