"""A comparison that dies at a chosen moment: `python dying.py KIND AT compare … --out FOLDER`.

KIND "step": before its AT-th change to FOLDER (a file opened for writing, renamed or removed, a folder made or removed).
KIND "bytes": in the middle of writing a file, when that has AT bytes; the rest of the process never runs, as on kill -9.
KIND "time": not by itself; it prints a line when it begins, and whoever started it kills it. AT is not read.

It knows nothing of how a comparison keeps its files: any other implementation dies at such moments as well.
"""

import os
import resource
import signal
import sys
from pathlib import Path

from strassen_tile.cli import main
from strassen_tile.experiments import commands  # noqa: F401  the seconds of importing are no part of the moments
from strassen_tile.integrations import images  # noqa: F401

CHANGES = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "shutil.rmtree": 0}  # where the path stands


def die_at_step(step: int, folder: Path) -> None:
    left = [step]

    def watch(event: str, details: tuple[object, ...]) -> None:
        if event == "open" and details and isinstance(details[2], int):
            path = details[0] if details[2] & (os.O_WRONLY | os.O_RDWR) else None
        else:
            path = details[CHANGES[event]] if event in CHANGES else None
        if isinstance(path, str | os.PathLike) and Path(path).absolute().is_relative_to(folder):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def die_at_bytes(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it; left alone, it ends the process within the write


if __name__ == "__main__":
    kind, at, *arguments = sys.argv[1:]
    if kind == "step":
        die_at_step(int(at), Path(arguments[arguments.index("--out") + 1]).absolute())
    elif kind == "bytes":
        die_at_bytes(int(at))
    print("begins", flush=True)
    sys.exit(main(arguments))
