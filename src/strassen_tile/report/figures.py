"""How figures look, whatever they show: style, palette, files, and one legend.

Drawn through matplotlib's objects, never pyplot, and in one style whatever the user's matplotlibrc says; the caller's
plotting state stays as it was. matplotlib is imported when the first figure is made.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from strassen_tile.report.table import report_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which colour-blind readers can tell apart too.
COLORS = ("#24292f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Where that palette runs out: as dark as its colours, and of other hues.
MORE_COLORS = (*COLORS, "#882255", "#7f7f2a", "#8a8f98")
LINES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (2, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "os^DvPX<>*ph"
_STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 9,
    "grid.color": "#dfe3e8",
}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Around everything that makes or saves a figure, also as a decorator: matplotlib is there, in our style."""
    with report_extra():
        import matplotlib.style
    with matplotlib.style.context(["default", _STYLE]):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, whose parts make room for each other."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@drawing()
def png(figure: Figure) -> bytes:
    """A figure as a PNG file of 150 dots an inch, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def add_legend(figure: Figure, instead: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """One legend for the whole figure, below it, of what is labelled in any of its axes.

    Args:
        figure: drawn already.
        instead: by name, matplotlib's keywords for lines to show first, such as the key of a code of colours and strokes.
    """
    from matplotlib.lines import Line2D

    named = {name: Line2D([], [], **style) for name, style in (instead or {}).items()}
    named |= {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if named:
        # At this size an inch holds 11 letters or more, and line, marker and gaps take the place of 11.
        columns = max(1, min(len(named), int(11 * figure.get_figwidth()) // (11 + max(map(len, named)))))
        legend = figure.legend(
            named.values(), named, loc="outside lower center", ncols=columns, handlelength=4, frameon=False
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # a dollar in a name is a dollar


def say_if_empty(axes: Any) -> None:
    """Of axes without a point: that there is nothing yet."""
    if not any(math.isfinite(y) for line in axes.lines for y in line.get_ydata()):
        axes.text(0.5, 0.5, "nothing to show yet", transform=axes.transAxes, ha="center", va="center", color="0.4")
