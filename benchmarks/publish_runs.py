"""Put the rows of `strassen-tile pretrain` or `finetune` runs into a folder of results, with their page and plot.

    python benchmarks/publish_runs.py out/dense out/stl --out results/language-2e14

Rows of several folders make one comparison, if they trained the same model on the same text by the same recipe, but for its
methods, seeds and rates, and no run is there twice. Of a method that was trained at
several rates, those that are not its first folder's stand in the variant, as where an entry names one. The folder a run wrote
to means nothing elsewhere: the recorded command says `--out DIR`.
"""

import argparse
import json
import shlex
from pathlib import Path

from strassen_tile.experiments.settings import shortest
from strassen_tile.files import write_text
from strassen_tile.records import read_rows, write_rows
from strassen_tile.report import finetune, pretrain
from strassen_tile.report.groups import without_rate

SECONDS = {"seconds", "train_seconds"}
SAME = ("text", "tokenizer", "precision", "train_bytes", "val_bytes", "test_bytes")
TOLD_APART = {"seeds", "methods", "lr", "lr_grid", "save", "jobs", "workers"}  # by what rows say, or of no consequence


def rows_of(folder):
    path = folder / "rows.json"
    rows = read_rows(path) if path.exists() else []
    for row in rows:
        if lacking := {"command", "lr", "method", "variant", "model", "context"} - row.keys():
            raise SystemExit(f"{path}: a row without {', '.join(sorted(lacking))} is none of pretrain or finetune")
    return [{**row, "command": without_folder(str(row["command"]))} for row in rows]


def without_folder(command):
    """The command with DIR for the folder it wrote to."""
    words, said = shlex.split(command), []
    for before, word in zip(["", *words], words, strict=False):
        said.append("--out=DIR" if word.startswith("--out=") else "DIR" if before == "--out" else word)
    return shlex.join(said)


def one_recipe(folders):
    """What the recipes of these folders have in common. Raises SystemExit where they differ in what rows do not say."""
    found = [json.loads(path.read_text()) for folder in folders if (path := folder / "recipe.json").exists()]
    for other in found[1:]:
        apart = {key for key in {*found[0], *other} - TOLD_APART if found[0].get(key) != other.get(key)}
        if apart:
            raise SystemExit(f"these are of recipes with different {', '.join(sorted(apart))}: publish them apart")
    return {key: value for key, value in found[0].items() if key not in TOLD_APART} if found else None


def told_apart(rows):
    """The same rows; a rate that is not the first of its method and variant is said in the variant."""
    usual = {}
    found = []
    for row in rows:
        key = row["method"], without_rate(row["variant"])
        rate = usual.setdefault(key, row["lr"])
        said = key[1] if row["lr"] == rate else ", ".join(filter(None, [key[1], f"lr {shortest(row['lr'])}"]))
        found.append({**row, "variant": said})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--no-seconds", action="store_true", help="of runs that were stopped, or shared their cores")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if missing := [folder for folder in options.folders if not (folder / "rows.json").exists()]:
        parser.error(f"there are no rows in {', '.join(map(str, missing))}")
    recipe = one_recipe(options.folders)
    rows = told_apart([row for folder in options.folders for row in rows_of(folder)])
    tried = [row for folder in options.folders for row in rows_of(folder / "tuning")]
    if options.no_seconds:
        for row in (*rows, *tried):
            row |= dict.fromkeys(SECONDS & row.keys())
    if not rows:
        parser.error("there are no rows to publish")
    for key in ("model", "context", *SAME):
        if len(said := {str(row.get(key)) for row in (*rows, *tried)}) > 1:
            parser.error(f"these are of different {key}: {', '.join(sorted(said))}; publish them apart")
    keys = [tuple(row.get(key) for key in ("method", "variant", "seed", "epoch")) for row in rows]
    if twice := {key for key in keys if keys.count(key) > 1}:
        parser.error(f"these are there twice: {sorted(twice)[:3]} …")
    if recipe is not None:
        write_text(options.out / "recipe.json", json.dumps(recipe, indent=1) + "\n")
    if tried:
        write_rows(options.out / "tuning/rows.json", tried)
    title = f"{rows[0]['model']}, {rows[0]['context']} tokens of context"
    if "calibration" in rows[0]:
        print(finetune.write_report(options.out, rows, title))
    else:
        print(pretrain.write_report(options.out, rows, title, tried=tried))


if __name__ == "__main__":
    main()
