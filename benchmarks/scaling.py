"""Loss against compute over the runs of several budgets: a table, a law for each method, what one saves, and a figure.

    python benchmarks/scaling.py results/language-2e13 results/language-2e14 --against "dense mix causal" --out results/language

Rows are those of `strassen-tile pretrain`. Each run counts with its end alone, and a method with its best size at each budget:
of runs at several rates the one with the lowest validation loss counts.
"""

import argparse
import statistics
from pathlib import Path

from strassen_tile.errors import DataError
from strassen_tile.files import write_bytes
from strassen_tile.records import read_rows
from strassen_tile.report import scaling
from strassen_tile.report.figures import drawing, new_figure, png
from strassen_tile.report.groups import group_rows, run_of, without_rate
from strassen_tile.report.pretrain_runs import train_flops
from strassen_tile.report.table import plus_minus, sample_sd


def finished(folders):
    """Of the rows of each folder those of runs that came to their end, of each method and budget those at its best rate.

    Folder by folder: a variant says nothing of the steps of its recipe.
    """
    best = {}
    for number, rows in enumerate(folders):
        diverged = {run_of(row)[:2] for row in rows if row.get("diverged")}
        for group in group_rows([row for row in rows if row.get("bits") is not None]):
            if (group.method, group.variant) in diverged:
                continue  # the mean over its seeds is unknown
            if lacking := [key for key in ("val_bits", "lr", "params") if None in group.values(key, group.epochs[-1])]:
                raise DataError(f"{group.label}: rows without {', '.join(lacking)}")
            spent = {train_flops(group, epoch) for epoch in group.epochs}
            if len(spent) > 1 or None in spent:
                raise DataError(f"{group.label}: its runs are of different budgets or models; publish them apart")
            key = (group.method, without_rate(group.variant), *spent)
            if key in best and best[key][0] != number:
                raise DataError(f"{group.label}: two folders have runs of this budget; publish them into one")
            if key not in best or better(group, best[key][1]):
                best[key] = number, group
    return [group for _, group in best.values()]


def better(one, other):
    """Whether `one` ends at a lower validation loss: on the seeds that both have, where they share any: seeds differ, too."""
    mine, theirs = (group.at("val_bits", group.epochs[-1]) for group in (one, other))
    shared = mine.keys() & theirs.keys()
    mean = [statistics.fmean(bits[seed] for seed in shared or bits) for bits in (mine, theirs)]
    return mean[0] < mean[1]


def table(groups):
    lines = [
        "| method | rate | training FLOPs | bits a byte | validation | params | seconds | seeds |",
        "|:---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for group in sorted(groups, key=lambda group: train_flops(group, group.epochs[-1])):
        end, shared = group.epochs[-1], group.shared()

        def cell(key, digits, group=group, end=end):
            values = group.values(key, end)
            if None in values:  # seconds of runs that shared their cores are not kept
                return "–"
            return plus_minus(statistics.fmean(values), sample_sd(values), digits)

        cells = [
            f"{group.method} {without_rate(group.variant)}", f"{shared['lr']:g}", f"{train_flops(group, end):.2e}",
            cell("bits", 3), cell("val_bits", 3), f"{shared['params'] / 1e6:.2f} M", cell("train_seconds", 0),
            str(len(group.seeds)),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def laws(found, against):
    """Sentences on the law of each method, and what it needs of the FLOPs of `against` at the loss where that ends."""
    dense = scaling.best_of_each(found[against])
    level = statistics.fmean(run.bits for run in dense[-1])
    for key, budgets in found.items():
        best = scaling.best_of_each(budgets)
        name = " ".join(filter(None, key))
        try:
            law = scaling.fit([run for runs in best for run in runs])
            yield f"{name}: bits = {law.bits(1e14):.3f} (C / 1e14)^−{law.beta:.3f}, {len(best)} budgets"
            if key != against:
                saved = scaling.saving(best, dense, level)
                yield f"    at {level:.3f} bits {saved.ratio:.2f} of the FLOPs ({saved.low:.2f} to {saved.high:.2f})"
        except DataError as error:
            yield f"{name}: {error}"


@drawing()
def figure(found):
    made = new_figure(7.5, 5)
    axes = made.subplots()
    for index, (key, budgets) in enumerate(found.items()):
        points = [run for runs in budgets for run in runs]
        axes.plot(*zip(*points, strict=True), "o", color=f"C{index}", label=" ".join(filter(None, key)))
        best = scaling.best_of_each(budgets)
        if len(best) > 1:
            law, ends = scaling.fit([run for runs in best for run in runs]), (best[0][0].flops, best[-1][0].flops)
            axes.plot(ends, [law.bits(end) for end in ends], color=f"C{index}", alpha=0.5)
    axes.set(xscale="log", xlabel="training FLOPs, all-in", ylabel="test bits a byte")
    axes.legend(fontsize="small")
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument(
        "--against", default="dense mix causal", help="method and variant that the others are held against"
    )
    parser.add_argument("--out", type=Path, help="folder for scaling.png")
    options = parser.parse_args()
    try:
        groups = finished([read_rows(folder / "rows.json") for folder in options.folders])
    except DataError as error:
        parser.error(str(error))
    found = scaling.ends(row for group in groups for run in group.seeds.values() for row in run.values())
    against = {" ".join(filter(None, key)): key for key in found}.get(options.against)
    if against is None:
        parser.error(f"no rows of {options.against!r}; there are {', '.join(' '.join(key) for key in found)}")
    print(table(groups))
    print("\n".join(laws(found, against)))
    if options.out:
        write_bytes(options.out / "scaling.png", png(figure(found)))


if __name__ == "__main__":
    main()
