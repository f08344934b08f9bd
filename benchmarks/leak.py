"""Loss by position in the tile, with the text there and predicted alone, of the models that `--save` left.

strassen-tile pretrain --recipe leak --out out/leak
python benchmarks/leak.py out/leak --out out/leak/by-position.json

strassen-tile finetune --recipe leak --out out/leak-smollm2
python benchmarks/leak.py out/leak-smollm2 --pieces 16 --out out/leak-smollm2/by-position.json
"""

import argparse
import shlex
import sys
from pathlib import Path

from strassen_tile.experiments import leak
from strassen_tile.experiments.saved import load_run
from strassen_tile.records import environment, write_rows

PROMPT = "The default value of this argument is "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of pretrain or finetune, with --save")
    parser.add_argument("--pieces", type=int, default=64, help="of the test text")
    parser.add_argument("--tokens", type=int, default=100, help="to go on with")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file of rows")
    options = parser.parse_args()
    rows, where = [], {**environment(), "command": shlex.join(["python", "benchmarks/leak.py", *sys.argv[1:]])}
    for path in sorted((options.folder / "models").glob("*.safetensors")):
        run = load_run(path)
        told = run.told
        text = run.decode(leak.continued(run.model, run.encode(PROMPT), options.tokens))
        for row in leak.rows_of(run.model, run.splits, run.recipe.context, options.pieces):
            rows.append({**told, **row, "text": run.splits.digest, "continued": text, **where})
            print(
                {key: row[key] for key in ("position", "bits", "bits_alone", "check_mixing")},
                told["variant"],
                flush=True,
            )
        print(repr(text), flush=True)
        write_rows(options.out, rows)


if __name__ == "__main__":
    main()
