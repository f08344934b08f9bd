"""A comparison's rows as a Markdown table, for the README and docs.

python benchmarks/compare_table.py results/digits
"""

import argparse
from pathlib import Path

from strassen_tile.records import read_rows
from strassen_tile.report.runs import summarise
from strassen_tile.report.table import count, fewer, flops


def value(row, key, form="{:.2f}"):
    found = row.get(key)
    return "–" if found is None else form.format(found)


def spread(row, key, digits=2):
    mean, sd = row.get(key), row.get(f"{key}_sd")
    return "–" if mean is None else f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def line(row):
    cells = [
        " ".join(filter(None, [row["method"], f"r={row['rank']}" if row["rank"] else "", row["variant"] or ""])),
        f"{row['lr']:g}",
        spread(row, "top1"),
        spread(row, "loss", 3),
        value(row, "difference", "{:+.2f}"),
        "<0.001" if (row["p_holm"] or 1.0) < 5e-4 else value(row, "p_holm", "{:.3f}"),
        str(row["epoch"]),
        fewer(row["run_flops_ratio"]),
        fewer(row["flop_ratio_products"]),
        fewer(row["flop_ratio_all_in"]),
        count(row["params"]),
        flops(row["flops_per_image"]),
        str(row["seeds"]),
    ]
    return "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    rows = summarise(read_rows(options.folder / "rows.json"))
    heads = (
        "method", "rate", "top-1, %", "test loss", "against dense", "p", "epochs", "training FLOPs fewer", "products", "all-in",
        "params", "FLOPs per image", "seeds",
    )  # fmt: skip
    print("| " + " | ".join(heads) + " |\n|:---|" + "---:|" * (len(heads) - 1))
    for row in rows:
        print(line(row))


if __name__ == "__main__":
    main()
