"""Add a bench's rows to a device's file, and draw the README's plot and table from that file.

    python benchmarks/publish.py --file benchmarks/results/cpu-amd-epyc-2-cores.json out/bench …

Rows are only ever added. The folder a run wrote to means nothing elsewhere: the recorded command says `--out DIR`.
"""

import argparse
import re
from pathlib import Path

from strassen_tile.records import read_rows, write_rows
from strassen_tile.report import bench

ROOT = Path(__file__).parent


def latest(rows):
    """The last row of each measurement; dense is measured anew beside every other."""
    keys = ("device", "dtype", "n", "k", "m", "tile", "pass", "method", "rank")
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def table(rows, ranks=(16, 24, 32)):
    """Speed-ups in Markdown: a line a shape, dtype and pass; the spread is of 20 to 80 % of the pairs."""
    lines = [
        "| N×K×M | dtype, pass | " + " | ".join(f"r = {rank}" for rank in ranks) + " |",
        "|---|---|" + "---|" * len(ranks),
    ]
    cells = {}
    for row in rows:
        if row["method"] == "stl":
            size = f"{row['n']}³" if row["n"] == row["k"] == row["m"] else f"{row['n']}×{row['k']}×{row['m']}"
            kind = {"float32": "fp32", "bfloat16": "bf16"}.get(row["dtype"], row["dtype"])
            cells.setdefault((size, f"{kind} {row['pass']}"), {})[row["rank"]] = (
                f"{row['speedup']:.2f} ({row['speedup_q20']:.2f}–{row['speedup_q80']:.2f})"
            )
    for (size, kind), found in cells.items():
        lines.append(f"| {size} | {kind} | " + " | ".join(found.get(rank, "") for rank in ranks) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="of finished `strassen-tile bench` runs")
    parser.add_argument("--file", type=Path, required=True, help="one a device, under benchmarks/results")
    options = parser.parse_args()
    rows = read_rows(options.file) if options.file.exists() else []
    for folder in options.folders:
        for row in read_rows(folder / "rows.json"):
            rows.append({**row, "command": re.sub(r"--out \S+", "--out DIR", str(row["command"]))})
    write_rows(options.file, rows)
    shown = [row for row in latest(rows) if row["method"] == "stl" and row["rank"] in (16, 24, 32)]
    squares = [row for row in shown if row["n"] == row["k"] == row["m"]]
    plot = options.file.with_suffix(".png")
    figure = bench.figure(squares)
    figure.savefig(plot, dpi=110)
    print(table(shown))
    print(plot)


if __name__ == "__main__":
    main()
