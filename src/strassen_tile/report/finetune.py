"""The report of `strassen-tile finetune`: a pretrained model before and after training, against the FLOPs that are left.

Rows are those of `report.groups`. Of a causal language model they have `loss` (nats a token) and `bits` (a byte) of the test
text, of an encoder `cosine` (to the dense model's embeddings), `recall` and `mrr` of the search; all of them under "before_"
as well, in every row, under "val_" after each epoch, and plain in a run's last row.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strassen_tile.records import Row, Value
from strassen_tile.report import page
from strassen_tile.report.figures import drawing, new_figure, png, say_if_empty
from strassen_tile.report.groups import Group, averaged, furthest_of, group_rows
from strassen_tile.report.table import Column, count, fewer, field, number, plus_minus, rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MEASURED = ("perplexity", "bits", "cosine", "recall", "mrr")
_COUNTS = (
    "Before: as the method makes it of the pretrained weights, fitted to calibration text. After: trained, all alike. Of the "
    "test text, which is read before training and after the last step. Perplexity is exp of the loss in nats a token, over "
    "pieces that are read from their beginning: it depends on their length. Cosine is to the dense model's embeddings; recall "
    "is how often the end of a passage is the first that its beginning finds among all. FLOPs fewer: of the converted layers, "
    "all-in, and of the whole model. Layers: how many are converted."
)


def summarise(rows: Sequence[Mapping[str, Value]]) -> list[Row]:
    """One record per method and variant: means over its seeds, and sd under the name with `_sd`."""
    groups = group_rows(rows)
    furthest = furthest_of(groups)
    records: list[Row] = []
    for group in groups:
        last = group.epochs[-1]
        there = [run[last] for run in group.seeds.values() if last in run]
        tested = any(_value(row, "loss") is not None for row in there)
        validated = () if tested else ("val_loss",)  # rates are chosen by it, and no test is read
        keys = (*_MEASURED, *(f"before_{key}" for key in _MEASURED), *validated, "train_seconds")
        record: Row = {
            **group.where(),
            "variant": group.shown or None,
            "complete": last == (number(group.shared(), "epochs") or furthest),
            **averaged({key: [_value(row, key) for row in there] for key in keys}),
        }
        records.append({**record, **{key: value for key, value in group.shared().items() if key not in record}})
    return records


def columns(state: bool = False) -> tuple[Column, ...]:
    """The columns of the comparison, for records of `summarise`."""

    def pair(title: str, key: str, digits: int, spare: int = 0) -> tuple[Column, Column]:
        return (
            Column(f"{title} before", _mean(f"before_{key}", digits), optional=True, spare=spare),
            Column("after", _mean(key, digits), optional=True, spare=spare),
        )

    shown = (
        Column("Method", "method", "left"),
        Column("Variant", "variant", "left", optional=True),
        Column("LR", field("lr", rate), spare=5),
        Column("Params", field("params", count), spare=4),
        Column("Layers", field("layers_converted", count), spare=2),
        Column("FLOPs fewer, layers", field("flop_ratio_all_in", fewer), spare=3),
        Column("FLOPs fewer, model", field("flop_ratio", fewer)),
        *pair("Perplexity", "perplexity", 2),
        *pair("Bits a byte", "bits", 3, spare=1),
        *pair("Cosine", "cosine", 3),
        *pair("Recall", "recall", 3),
        Column("Validation loss", _mean("val_loss", 4), optional=True),
        Column("Time, s", field("train_seconds", lambda s: "–" if s is None else f"{s:.0f}"), spare=6),
    )
    return (*shown, Column("Epoch reached", "state", "left")) if state else shown


def caption(summary: Sequence[Mapping[str, Value]]) -> str:
    """Over what the numbers of the table are, and what they do not say."""
    if not summary:
        return "No rows yet."
    seeds = sorted({int(number(record, "seeds") or 0) for record in summary})
    over = " to ".join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1])))
    said = [f"Mean ± sample standard deviation over {over} seeds."]
    if seeds == [1]:
        said = ["Of one seed: what another order of the same text would change is not known."]
    if not all(record["complete"] for record in summary):
        said.append("Training has not finished.")
    if grids := {str(record["tuned"]) for record in summary if record.get("tuned")}:
        said.append(f"Rates were chosen on the validation text, from {'; '.join(sorted(grids))}.")
    return " ".join(said)


@drawing()
def figure(rows: Sequence[Mapping[str, Value]]) -> Figure:
    """What a model is worth against the FLOPs it is left with, before and after; and the validation text as it trains."""
    groups, summary = group_rows(rows), summarise(rows)
    key, label = ("cosine", "cosine to dense") if any(r["cosine"] or r["before_cosine"] for r in summary) else (
        "perplexity", "perplexity")  # fmt: skip
    made = new_figure(12, 5)
    left, right = made.subplots(1, 2)
    for index, (group, record) in enumerate(zip(groups, summary, strict=True)):
        color, ratio = f"C{index % 10}", number(record, "flop_ratio")
        for name, filled in ((f"before_{key}", False), (key, True)):
            value = number(record, name)
            if value is not None and ratio is not None:
                left.plot(ratio, value, "o", color=color, fillstyle="full" if filled else "none")
        epochs = [epoch for epoch in group.epochs if _course(group, epoch, key) is not None]
        right.plot(epochs, [_course(group, epoch, key) for epoch in epochs], "o-", color=color, label=group.label)
    left.set(title="Before (open) and after training", xlabel="FLOPs of the whole model, of dense's", ylabel=label)
    right.set(title="On the validation text", xlabel="epoch", ylabel=label)
    for panel in (left, right):
        if key == "perplexity" and any(len(line.get_xdata()) for line in panel.lines):
            panel.set_yscale("log")
        say_if_empty(panel)
    handles, labels = right.get_legend_handles_labels()
    if handles:
        made.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize="small")
    return made


def write_report(
    out_dir: str | Path, rows: Sequence[Mapping[str, Value]], title: str, notes: Sequence[str] = ()
) -> Path:
    """Write `rows.json`, `plot.png` and `report.html` into `out_dir`, see `page.write_report`.

    Args:
        out_dir: the folder; made if missing.
        rows: the rows of the comparison, finished or not.
        title: of the page.
        notes: plain-text paragraphs above the table.

    Returns:
        The path of `report.html`.
    """

    def sections() -> list[page.Section]:
        summary = summarise(rows)
        shown = columns(state=not all(record["complete"] for record in summary))
        return [
            page.Section("Result", (*notes, _COUNTS), table=page.html_table(shown, summary), caption=caption(summary)),
            page.Section("Quality and cost", figure=png(figure(rows))),
        ]

    return page.write_report(out_dir, rows, title, sections)


def _value(row: Mapping[str, Value], key: str) -> float | None:
    """A row's field; a perplexity is of its loss, where there are bits (a loss of something else has none)."""
    if not key.endswith("perplexity"):
        return number(row, key)
    prefix = key.removesuffix("perplexity")
    loss = number(row, f"{prefix}loss")
    if loss is None or row.get(f"{prefix}bits") is None:
        return None
    return math.exp(loss) if loss < 700 else math.inf


def _course(group: Group, epoch: int, key: str) -> float | None:
    values = [_value(run.get(epoch, {}), f"val_{key}") for run in group.seeds.values()]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _mean(key: str, digits: int) -> Callable[[Mapping[str, Value]], str]:
    def shown(row: Mapping[str, Value]) -> str:
        value: Any = number(row, key)
        return plus_minus(value, number(row, f"{key}_sd"), digits if value is None or value < 1000 else 0)

    return shown
