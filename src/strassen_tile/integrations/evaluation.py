"""lm-evaluation-harness on folders of converted models: its command line, in a process that knows STL layers.

    python -m strassen_tile.integrations.evaluation --model hf --model_args pretrained=FOLDER --tasks wikitext

Arguments are those of `lm_eval`. That this package is imported is all that is needed: transformers finds the layers that a
folder names then. In Python, import it ahead of `lm_eval.simple_evaluate`.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run `lm_eval` with this process's arguments."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f'strassen-tile: this needs lm_eval ({error}): pip install "strassen-tile[eval]"')
    cli_evaluate()


if __name__ == "__main__":
    main()
