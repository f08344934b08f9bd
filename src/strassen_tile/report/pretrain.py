"""The report of `strassen-tile pretrain`: loss in bits a byte, against training FLOPs, seconds, parameters and rate.

What the rows are is in `report.pretrain_runs`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strassen_tile.records import Value
from strassen_tile.report import page
from strassen_tile.report.figures import drawing, new_figure, png, say_if_empty
from strassen_tile.report.groups import Group, group_rows, without_rate
from strassen_tile.report.pretrain_runs import summarise, train_flops
from strassen_tile.report.sooner import TRAINING_OF_FORWARD
from strassen_tile.report.table import (
    Column,
    count,
    fewer,
    field,
    flops,
    number,
    p_value,
    plus_minus,
    rate,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COUNTS = (
    "Bits a byte of the test text, which is read once, after the last step; lower is better. Training FLOPs are "
    f"{TRAINING_OF_FORWARD} × those of the forward pass, whole model, everything counted (encoding, decoding, mixes, "
    "attention, head). FLOPs fewer: of the converted layers, all-in, and of the whole model. Each method is held against "
    "dense with the same mix of rows ahead of its layers, if there is one: FLOPs and seconds to where that ends, on the "
    "validation text, read off a line between epochs."
)


def columns(state: bool = False) -> tuple[Column, ...]:
    """The columns of the comparison, for records of `summarise`."""
    shown = (
        Column("Method", "method", "left"),
        Column("Variant", "variant", "left", optional=True),
        Column("LR", field("lr", rate), spare=3),
        Column("Bits a byte", _mean("bits")),
        Column("Validation bits", _mean("val_bits"), spare=6),
        Column(
            "Less dense's",
            field("difference", lambda x: "–" if x is None else f"{x:+.3f}".replace("-", "−")),
            optional=True,
        ),
        Column("p, Holm", field("p_holm", p_value), optional=True, spare=5),
        Column("Params", field("params", count), spare=4),
        Column("FLOPs fewer, layers", field("flop_ratio_all_in", fewer), spare=7),
        Column("FLOPs fewer, model", field("flop_ratio", fewer), spare=1),
        Column("Training FLOPs", field("train_flops", flops)),
        Column(
            "FLOPs to dense's end, of dense's",
            field("flops_share", lambda x: "–" if x is None else f"{x:.2f}"),
            optional=True,
        ),
        Column(
            "Seconds to it, of dense's",
            field("seconds_share", lambda x: "–" if x is None else f"{x:.2f}"),
            optional=True,
        ),
        Column("Time, s", field("train_seconds", lambda s: "–" if s is None else f"{s:.0f}"), spare=8),
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
        said = ["Of one seed: what another would change is not known."]
    if not all(record["complete"] for record in summary):
        said.append("Training has not finished: only the seeds at a method's last epoch are averaged.")
    if grids := {str(record["tuned"]) for record in summary if record.get("tuned")}:
        said.append(f"Rates were chosen on the validation text, from {'; '.join(sorted(grids))}.")
        edge = [_name(r) for r in summary if r.get("tuned") and _at_edge(r)]
        if edge:
            said.append(f"At an end of that grid, so that another might be better: {', '.join(edge)}.")
    most = max(number(record, "layers_converted") or 0 for record in summary)
    if fewer := [r for r in summary if 0 < (number(r, "layers_converted") or 0) < most]:
        some = "; ".join(f"{_name(r)} {number(r, 'layers_converted'):.0f}" for r in fewer)
        said.append(f"Not all layers could be converted: of {most:.0f} {some}; the others are dense.")
    return " ".join(said)


@drawing()
def figure(rows: Sequence[Mapping[str, Value]], tried: Sequence[Mapping[str, Value]] = ()) -> Figure:
    """Validation bits against training FLOPs and seconds; at the end, test bits against parameters, and bits by rate."""
    groups = group_rows(rows)
    made = new_figure(13, 9)
    axes = made.subplots(2, 2)
    colors = {group.label: f"C{index % 10}" for index, group in enumerate(groups)}
    for group in groups:
        _course(axes[0, 0], group, colors[group.label], lambda epoch, group=group: train_flops(group, epoch))
        _course(axes[0, 1], group, colors[group.label], lambda epoch, group=group: group.mean("train_seconds", epoch))
        last = group.epochs[-1]
        bits, params = group.mean("bits", last), number(group.shared(), "params")
        if bits is not None and params is not None:
            axes[1, 0].plot(params, bits, "o", color=colors[group.label])
    axes[0, 0].set(title="Loss against training FLOPs", xlabel="training FLOPs", ylabel="validation bits a byte")
    axes[0, 1].set(title="Loss against seconds of training", xlabel="seconds")
    axes[1, 0].set(title="At the end, against parameters", xlabel="parameters", ylabel="test bits a byte")
    by_rate: dict[str, dict[float, list[float]]] = {}
    for group in group_rows([*tried, *rows]):
        end, lr = group.mean("val_bits", group.epochs[-1]), number(group.shared(), "lr")
        if end is not None and lr is not None:
            name = group_name(group)
            by_rate.setdefault(name, {}).setdefault(lr, []).append(end)
    for index, (name, found) in enumerate(by_rate.items()):
        at = sorted(found)
        axes[1, 1].plot(at, [statistics.fmean(found[lr]) for lr in at], "o-", color=colors.get(name, f"C{index % 10}"))
    axes[1, 1].set(title="At the end, by learning rate", xlabel="peak learning rate", ylabel="validation bits a byte")
    for panel in (axes[0, 0], axes[0, 1], axes[1, 1]):
        if any(len(line.get_xdata()) for line in panel.lines):
            panel.set_xscale("log")
        else:
            say_if_empty(panel)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        made.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize="small")
    return made


def group_name(group: Group) -> str:
    """Method and variant without the rate."""
    return f"{group.method} {without_rate(group.variant)}".strip()


def write_report(
    out_dir: str | Path,
    rows: Sequence[Mapping[str, Value]],
    title: str,
    notes: Sequence[str] = (),
    tried: Sequence[Mapping[str, Value]] = (),
) -> Path:
    """Write `rows.json`, `plot.png` and `report.html` into `out_dir`, see `page.write_report`.

    Args:
        out_dir: the folder; made if missing.
        rows: the rows of the comparison, finished or not.
        title: of the page.
        notes: plain-text paragraphs above the table.
        tried: rows of the trials that chose learning rates.

    Returns:
        The path of `report.html`.
    """

    def sections() -> list[page.Section]:
        summary = summarise(rows)
        shown = columns(state=not all(record["complete"] for record in summary))
        return [
            page.Section("Result", (*notes, _COUNTS), table=page.html_table(shown, summary), caption=caption(summary)),
            page.Section("Loss, cost and rate", figure=png(figure(rows, tried))),
        ]

    return page.write_report(out_dir, rows, title, sections)


def _course(axes: Any, group: Group, color: str, cost: Any) -> None:
    epochs = [epoch for epoch in group.epochs if group.mean("val_bits", epoch) is not None and cost(epoch) is not None]
    values = [[v for v in group.values("val_bits", epoch) if v is not None] for epoch in epochs]
    at = [cost(epoch) for epoch in epochs]
    axes.plot(at, [statistics.fmean(v) for v in values], color=color, label=group.label)
    axes.fill_between(at, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2, linewidth=0)


def _mean(key: str) -> Any:
    return lambda row: plus_minus(number(row, key), number(row, f"{key}_sd"), 3)


def _name(record: Mapping[str, Value]) -> str:
    return f"{record['method']} {record['variant'] or ''}".strip()


def _at_edge(record: Mapping[str, Value]) -> bool:
    grid = [float(text) for text in str(record["tuned"]).split(",")]
    lr = number(record, "lr")
    return len(grid) > 1 and lr in (min(grid), max(grid))
