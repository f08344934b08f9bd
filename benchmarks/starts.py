"""Where bases trained on data begin, and where they end: random starts against those that theory gives.

    python benchmarks/starts.py --out benchmarks/results/starts

Adam on E, F and D over batches, all starts with the same number of steps, each at its best rate of one grid (found with a seed
that no other run has), five seeds. Batches are Gaussian, or parts of a layer of MiniLM reading prose of Python's library. What
counts on Gaussian matrices is the error of the basis, which is known exactly; on the layer that on rows not trained on.
Writes OUT.json and OUT.png.
"""

import argparse
import shlex
import statistics
import sys
from pathlib import Path

from strassen_tile import bases, reference
from strassen_tile.bases import training
from strassen_tile.experiments.real_layers import minilm
from strassen_tile.files import write_bytes
from strassen_tile.records import environment, write_rows
from strassen_tile.report.figures import drawing, new_figure, png

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
STARTS = {
    "random": lambda rank, seed: bases.random(4, rank, seed=seed),
    "Strassen's best terms": lambda rank, seed: bases.truncated(2, rank),
    "searched": lambda rank, seed: bases.approximate(4, rank),
    "group": lambda rank, seed: bases.group({22: "D4xZ2", 44: "D4xZ2^2"}[rank], tile=4),
}
EVERY = 100  # steps between points of a curve


def measure(problem, basis):
    """The error of a basis: known on Gaussian matrices, on a layer that of rows it was not trained on."""
    if problem is None:
        return basis.error
    exact = problem.x.double() @ problem.w.double()
    found = reference.stl_matmul(problem.x.double(), problem.w.double(), basis)
    return float((found - exact).square().sum() / exact.square().sum())


def run(problem, rank, start, lr, seed, steps):
    begin = STARTS[start](rank, seed)
    batches = (
        training.gaussian(begin, seed) if problem is None else training.drawn(begin, problem.rows, problem.w, seed=seed)
    )
    done = training.train(begin, batches, steps=steps, lr=lr, every=EVERY)
    return {
        "data": "gaussian" if problem is None else problem.name, "rank": rank, "start": start, "lr": lr, "seed": seed,
        "steps": steps, "error_before": measure(problem, begin), "error": measure(problem, done.basis),
        "kappa": done.basis.kappa, **{f"loss_{step}": loss for step, loss in done.history},
    }  # fmt: skip


def curve(row):
    """(step, mean loss since the point before) of a run."""
    return [(int(key.removeprefix("loss_")), value) for key, value in row.items() if key.startswith("loss_")]


@drawing()
def figure(rows):
    panels = list(dict.fromkeys((row["data"], row["rank"]) for row in rows))
    made = new_figure(5 * len(panels), 4)
    axes = made.subplots(1, len(panels), squeeze=False)[0]
    for panel, (data, rank) in zip(axes, panels, strict=True):
        for number, start in enumerate(STARTS):
            runs = [row for row in rows if (row["data"], row["rank"], row["start"]) == (data, rank, start)]
            for at, row in enumerate(runs):
                panel.plot(
                    *zip(*curve(row), strict=True),
                    color=f"C{number}",
                    linewidth=1,
                    label=start if at == 0 else None,
                )
        panel.set(title=f"{data}, r = {rank}", xlabel="steps", ylabel="relative squared error of batches", yscale="log")
        panel.legend()
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="without an ending: .json and .png are written")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    rows, where = [], environment(shlex.join(["python", "benchmarks/starts.py", *sys.argv[1:]]))
    layer = minilm(("0.attention.self.query",), 8192, 320)[0]
    for problem, rank, steps in ((None, 22, options.steps), (None, 44, options.steps), (layer, 44, options.steps // 4)):
        for start in STARTS:
            tried = {}
            for lr in RATES:
                tried[lr] = run(problem, rank, start, lr, options.seeds, steps)["error"]
            best = min(tried, key=tried.get)
            for seed in range(options.seeds):
                rows.append(
                    {
                        **run(problem, rank, start, best, seed, steps),
                        **{f"error_at_{one:g}": error for one, error in tried.items()},
                        **where,
                    }
                )
                write_rows(options.out.with_suffix(".json"), rows)
            ends = [row["error"] for row in rows[-options.seeds :]]
            print(f"{rows[-1]['data']}, r={rank}, {start}: {rows[-1]['error_before']:.3f} → {statistics.fmean(ends):.4f} "
                  f"± {statistics.stdev(ends):.4f} at {best:g}, kappa {rows[-1]['kappa']:.3g}", flush=True)  # fmt: skip
    write_bytes(options.out.with_suffix(".png"), png(figure(rows)))


if __name__ == "__main__":
    main()
