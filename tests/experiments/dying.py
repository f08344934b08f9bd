"""A comparison that dies at chosen moments, one after the other: `python dying.py KIND AT … compare … --out FOLDER`.

KIND "step": before its AT-th change to FOLDER (a file opened for writing, renamed or removed, a folder made or removed).
KIND "bytes": in the middle of writing a file, when that has AT bytes; the rest of the process never runs, as on kill -9.
KIND "time": AT seconds after it began.
KIND "batch": before the AT-th update of weights.
KIND "within": in the middle of writing the first file with AT in its name.
KIND "rename": before renaming a file to the first path with AT in it.

Each time a child of this process runs the command, so that only the first waits for the imports. A line of JSON for each
says how it ended and which files it left. Only "within" and "rename" are told how a comparison keeps its files: any other
implementation dies at the other moments as well.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_pre_hook

from strassen_tile.cli import main
from strassen_tile.experiments import commands  # noqa: F401  the seconds of importing are no part of the moments
from strassen_tile.integrations import images  # noqa: F401

CHANGES = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "shutil.rmtree": 0}  # where the path stands
FILE_BYTES = 1000  # "within": more than a file of rows has by then need not be written


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def opened_to_write(event: str, details: tuple[object, ...]) -> object:
    """The path, where the event is of opening a file for writing."""
    if event == "open" and details and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR):
        return details[0]
    return None


def die_at_step(step: int, folder: Path) -> None:
    left = [step]

    def watch(event: str, details: tuple[object, ...]) -> None:
        path = details[CHANGES[event]] if event in CHANGES else opened_to_write(event, details)
        if isinstance(path, str | os.PathLike) and Path(path).absolute().is_relative_to(folder):
            left[0] -= 1
            if left[0] < 0:
                die()

    sys.addaudithook(watch)


def die_at_bytes(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it; left alone, it ends the process within the write


def die_within(name: str) -> None:
    def watch(event: str, details: tuple[object, ...]) -> None:
        if name in str(opened_to_write(event, details)):
            die_at_bytes(FILE_BYTES)

    sys.addaudithook(watch)


def die_at_rename(name: str) -> None:
    sys.addaudithook(lambda event, details: die() if event == "os.rename" and name in str(details[1]) else None)


def die_at_batch(batch: int) -> None:
    left = [batch]

    def count(*_: object) -> None:
        left[0] -= 1
        if not left[0]:
            die()

    register_optimizer_step_pre_hook(count)


def prepare(kind: str, at: str, folder: Path) -> None:
    if kind == "step":
        die_at_step(int(at), folder)
    elif kind == "bytes":
        die_at_bytes(int(at))
    elif kind == "batch":
        die_at_batch(int(at))
    elif kind == "within":
        die_within(at)
    elif kind == "rename":
        die_at_rename(at)


if __name__ == "__main__":
    begin = sys.argv.index("compare")
    moments, command = sys.argv[1:begin], sys.argv[begin:]
    out = Path(command[command.index("--out") + 1]).absolute()
    for kind, at in zip(moments[::2], moments[1::2], strict=True):
        # No thread has been started by now: a fork is safe, and takes no second.
        if not (child := os.fork()):
            prepare(kind, at, out)
            sys.exit(main(command))
        if kind == "time":
            time.sleep(float(at))
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
        print("\n" + json.dumps({"status": status, "files": left}), flush=True)
