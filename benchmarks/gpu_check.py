"""Everything that only a GPU can say, in one run that ends in time: are the kernels right, and how fast are they.

    make gpu-check                     needs an NVIDIA GPU, torch ≥ 2.11 and triton ≥ 3.6, nothing else
    make gpu-check ARGUMENTS=--dry-run the same on a CPU: tiny shapes, Triton's interpreter; its times mean nothing

Writes into OUT as it goes: checks.json (a row a check), choices.json (the fastest block sizes), parts.json (encode,
products, decode beside dense and a copy), rows.json (as `strassen-tile bench`, and one a block), report.html and, where
matplotlib is there, plot.png. Stops before the time is up; what was measured until then is there. The exit status is 1 if
a check failed. Look first at checks.json.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from gpu import blocks, checks, page, parts

from strassen_tile.experiments import speed
from strassen_tile.ops.cuda import passes
from strassen_tile.records import environment, write_rows

RANKS = (16, 24, 32)
# In the order of what is wanted most, should time run out.
SHAPES = ("8192x8192x8192", "16384x4096x16384", "16384x4096x4096", "vit-b-gpu", "vit-l-gpu", "llama-7b-gpu")
speed.NAMED["vit-b-gpu"], speed.NAMED["vit-l-gpu"] = (  # 128 images of 197 tokens
    tuple((25216, k, m) for k, m in ((wide, 3 * wide), (wide, wide), (wide, 4 * wide), (4 * wide, wide)))
    for wide in (768, 1024)
)
speed.NAMED["llama-7b-gpu"] = tuple(
    (n, k, m) for n in (8192, 65536) for k, m in ((4096, 4096), (4096, 11008), (11008, 4096))
)
CHECK_SECONDS, TUNE_SECONDS, RESERVE = 170, 60, 25
TUNED = (16, 32, 49)  # as powers of two: 24 is tuned as 32
SANITIZER = "compute-sanitizer"


class Run:
    """What there is to know everywhere: where to write, when to stop, how large to be."""

    def __init__(self, options):
        self.out, self.tiny = options.out, options.dry_run
        self.device = "cpu" if options.dry_run else "cuda"
        self.end = time.monotonic() + options.seconds
        self.seconds = 0.0 if self.tiny else 0.4
        self.where = environment("benchmarks/gpu_check.py " + " ".join(sys.argv[1:]))
        if self.device == "cuda":
            self.where["machine"] = torch.cuda.get_device_name()

    @property
    def over(self):
        return time.monotonic() > self.end - RESERVE

    def keep(self, file, kept, rows):
        """Append each row to `kept`, and to the file at once, until the time is up."""
        for row in rows:
            kept.append({**row, **self.where})
            write_rows(self.out / file, kept)
            if "speedup" in row:
                what = row.get("block") or f"{row['n']}x{row['k']}x{row['m']}"
                print(
                    f"{what} {row['dtype']} {row['pass']} {row['method']} {row['rank']}: {row['speedup']:.2f}x",
                    flush=True,
                )
            if self.over:
                return


def shard(options):
    """One part of the checks, and of what tuning will need compiled; each result is on disk at once."""
    index, of = map(int, options.shard.split("/"))
    device = "cpu" if options.dry_run else "cuda"
    tiny = options.dry_run or options.small
    sizes, dtypes = ([(5, 63)], [torch.float32]) if tiny else ([(5, 63), (64, 512), (1023, 1030)], list(checks.ALLOWED))
    kept, file = [], options.out / f"shard-{index}.json"
    for number, case in enumerate(itertools.islice(checks.cases(device, sizes, dtypes, not tiny), index, None, of)):
        try:
            kept += [{"check": name, "error": error, "allowed": allowed} for name, error, allowed in case()]
        except Exception:
            traceback.print_exc()
            kept.append({"check": f"shard {index} case {number} raised, see its log", "error": 1.0, "allowed": 0.5})
        file.write_text(json.dumps(kept))
    file.write_text(json.dumps([*kept, {"check": f"shard {index} went through", "error": 0.0, "allowed": 0.5}]))
    if not tiny:
        checks.warm(index, of, TUNED)


def checked(run, of):
    """All checks, in processes of their own: compiling is what takes long, and a crash ends only a part."""
    command = [sys.executable, __file__, "--out", str(run.out)]
    started = []
    for index in range(of):
        part = [*command, "--shard", f"{index}/{of}", *(["--dry-run"] if run.tiny else [])]
        started.append((f"shard {index}", start(run.out / f"shard-{index}.log", part)))
    tool = shutil.which("compute-sanitizer") if run.device == "cuda" else None
    if tool is not None:
        (run.out / "sanitizer").mkdir(exist_ok=True)
        part = [sys.executable, __file__, "--out", str(run.out / "sanitizer"), "--small", "--shard", "0/1"]
        started.append((SANITIZER, start(run.out / "sanitizer.log", [tool, "--error-exitcode", "9", *part])))
    end, rows = time.monotonic() + CHECK_SECONDS, []
    for name, process in started:
        try:
            code = process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with all it has started: nothing may run beside what is timed
            process.wait()
            code = None
        if name != SANITIZER and code:
            rows.append({"check": f"{name} ended with {code}", "error": 1.0, "allowed": 0.5})
        elif name == SANITIZER and code in (0, 9):
            rows.append({"check": f"{name} finds nothing", "error": float(code), "allowed": 0.5})
        elif code != 0:
            print(f"{name} {'did not end in time' if code is None else f'could not run here ({code})'}", flush=True)
    for index in range(of):
        file = run.out / f"shard-{index}.json"
        found = json.loads(file.read_text()) if file.exists() else []
        file.unlink(missing_ok=True)
        if not any("went through" in row["check"] for row in found):
            what = f"shard {index} did not go through, see {run.out}/shard-{index}.log"
            found.append({"check": what, "error": 1.0, "allowed": 0.5})
        rows += found
    return [{**row, "ok": row["error"] < row["allowed"], **run.where} for row in rows]


def start(log, command):
    """A process in a session of its own, so that it can be ended with its children."""
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)


def tuned(run):
    """The fastest block sizes, which everything after uses."""
    from strassen_tile.ops.cuda import choices, tune

    name, file, found = run.where["machine"], run.out / "choices.json", {}
    if run.tiny:
        among = list(choices.candidates(16))[:2]
        sizes = {"n": 8, "k": 32, "dtype": torch.float32, "device": "cpu"}
        results = tune.tune((16,), **sizes, among=among, clock=lambda call: float(call() is None))
    else:
        results = tune.tune(TUNED)
    end = time.monotonic() + TUNE_SECONDS
    for result in results:
        found[result.key] = result.choice
        choices.write(file, name, found)
        print(f"{result.key}: {list(result.choice)} {result.took:.4f} ms, guessed {result.guessed:.4f} ms", flush=True)
        sizes = "x".join(map(str, result.choice))
        yield {"part": "tuned", "kernel": result.key, "choice": sizes, "ms": result.took, "guess_ms": result.guessed}
        if time.monotonic() > end:
            print("tuning takes too long: the rest stays as guessed", flush=True)
            break
    os.environ["STRASSEN_TILE_CHOICES"] = str(file)
    choices.forget()


def split(run):
    """The parts of the largest shapes."""
    copied = parts.copy_rate(run.device, 2**12 if run.tiny else 2**30)
    dtype = "float32" if run.tiny else "bfloat16"
    for shape in [(64, 64, 64)] if run.tiny else [speed.shapes_of(name)[0] for name in SHAPES[:3]]:
        for rank in RANKS:
            yield parts.split(shape, rank, dtype, run.device, copied)
    for rank in RANKS if run.tiny or torch.cuda.get_device_capability() >= (8, 9) else ():
        yield parts.eight_bits((64, 64, 64) if run.tiny else (8192, 8192, 8192), rank, run.device)


def measured(run, kept):
    """Pairs with dense: the first shapes, then the blocks, then the rest."""
    shapes = [(64, 64, 64)] if run.tiny else [shape for name in SHAPES for shape in speed.shapes_of(name)]
    dtypes = ("float32",) if run.tiny else ("bfloat16", "float16")
    settings = [(shape, name, dtype) for dtype in dtypes for shape in shapes for name in ("forward", "step")]
    for index, (shape, name, dtype) in enumerate(settings):
        if index == (1 if run.tiny else 4):
            kind = torch.float32 if run.tiny else torch.bfloat16
            attempt(run.keep, "rows.json", kept, blocks.measure(run.device, kind, run.seconds, run.tiny, {}))
        methods = ("stl",) if run.tiny or name == "step" else ("stl", "2:4")
        options = {"device": run.device, "dtype": dtype, "passes": (name,), "seconds": run.seconds}
        for method in methods:  # apart, so that one that cannot run here does not take the other with it
            attempt(run.keep, "rows.json", kept, speed.bench([shape], RANKS, methods=(method,), **options))
        if run.over:
            print(f"time is up: {index + 1} of {len(settings)} settings measured", flush=True)
            return


def attempt(function, *arguments):
    """What fails is said, and the rest goes on; in a dry run, it ends."""
    try:
        function(*arguments)
    except Exception as error:  # Triton's and the compiler's errors have no base but this
        if "--dry-run" in sys.argv:
            raise
        print(f"{type(error).__name__}: {error}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu-check"))
    parser.add_argument("--seconds", type=float, default=480, help="to end within")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny, by Triton's interpreter")
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry-run goes through the same steps on the CPU")
    if passes.launcher() is None:
        parser.error("triton is not installed")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.shard:
        shard(options)
        return
    run = Run(options)
    results = checked(run, 2 if run.tiny else min(12, max(1, (os.cpu_count() or 1) - 2)))
    write_rows(options.out / "checks.json", results)
    wrong = [row["check"] for row in results if not row["ok"]]
    print(f"{len(results) - len(wrong)} of {len(results)} checks passed", *wrong, sep="\n  ", flush=True)
    kept, rows = [], []
    if not options.checks_only:
        attempt(run.keep, "parts.json", kept, tuned(run))
        attempt(run.keep, "parts.json", kept, split(run))
        measured(run, rows)
    attempt(page.write, options.out, results, kept, rows)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
