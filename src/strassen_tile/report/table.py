"""Rows as a table in the terminal (rich), and the columns and formatters that it shares with the HTML page.

A `Column` is a title and either a field's name or a function from a row to text. Only `rich_table` needs rich, and
imports it when called. A value that is not there is shown as "–", never as 0.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from strassen_tile.errors import DataError
from strassen_tile.records import Value
from strassen_tile.report.fitting import Fitting

if TYPE_CHECKING:
    from rich.table import Table

MISSING = "–"
_FOLDED = 20  # letters that a column of text needs at most: it may be folded


@contextlib.contextmanager
def report_extra(extra: str = "report", need: str = "tables and plots") -> Iterator[None]:
    """Around the import of an optional package: if it is missing, the error says what needs it and which extra brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        raise ModuleNotFoundError(
            f'{package} is not installed; {need} need it: pip install "strassen-tile[{extra}]"',
            name=error.name,
        ) from error


@dataclass(frozen=True)
class Column:
    """One column: its title, where its text comes from, and how it is aligned.

    Attributes:
        title: the heading.
        value: a field's name, shown as it is; or a function from a row to text, see `field`.
        justify: "left", "center" or "right".
        optional: left out of a table in which no row has anything in it.
        spare: 0 if it is on every screen; of the others the highest goes first from a terminal that is too narrow.
    """

    title: str
    value: str | Callable[[Mapping[str, Value]], str]
    justify: Literal["left", "center", "right"] = "right"
    optional: bool = False
    spare: int = 0

    def text(self, row: Mapping[str, Value]) -> str:
        """This column's cell for `row`."""
        return plain(row.get(self.value)) if isinstance(self.value, str) else self.value(row)


def field(key: str, form: Callable[[float | None], str]) -> Callable[[Mapping[str, Value]], str]:
    """A column's value: the number in field `key`, through a formatter such as `count` or `ratio`."""
    return lambda row: form(number(row, key))


def number(row: Mapping[str, Value], key: str) -> float | None:
    """The number in field `key`; None if absent or null. DataError if it is text."""
    value = row.get(key)
    if isinstance(value, str):
        raise DataError(f"field {key!r} should be a number, it is the text {value!r}")
    return value


def filled(columns: Sequence[Column], rows: Iterable[Mapping[str, Value]]) -> tuple[list[Column], list[list[str]]]:
    """The columns to be shown, and the text of their cells, row by row.

    Raises:
        DataError: a column names a field that no row has: a misspelt name, not an empty column.
    """
    rows = list(rows)
    shown = [
        column
        for column in columns
        if not column.optional or any(column.text(row) not in ("", MISSING) for row in rows)
    ]
    for column in shown:
        if isinstance(column.value, str) and rows and not any(column.value in row for row in rows):
            raise DataError(
                f"column {column.title!r} shows the field {column.value!r}, which no row has; "
                f"the first row has {', '.join(rows[0])}"
            )
    return shown, [[column.text(row) for column in shown] for row in rows]


def rich_table(
    title: str, columns: Sequence[Column], rows: Iterable[Mapping[str, Value]], caption: str | None = None
) -> Fitting:
    """The rows as a table for the terminal; needs rich. Nothing in it is taken for rich's markup."""
    with report_extra():
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

    shown, lines = filled(columns, rows)
    # Numbers never break, so that ten columns fit a narrow terminal; their heading breaks between words instead.
    widths = [
        max([*(len(line[at]) for line in lines), *(len(word) for word in column.title.split())], default=1)
        for at, column in enumerate(shown)
    ]

    def build(kept: Sequence[int]) -> Table:
        table = Table(
            title=Text(title, style="bold"),
            caption=Text(caption, style="dim") if caption else None,
            title_justify="left",
            caption_justify="left",
            box=SIMPLE_HEAD,
            padding=0,
            pad_edge=False,
        )
        for at in kept:
            column = shown[at]
            if column.justify == "left":
                table.add_column(Text(column.title), justify="left", overflow="fold")
                continue
            heading = textwrap.wrap(column.title, widths[at], break_long_words=False, break_on_hyphens=False)
            table.add_column(Text("\n".join(heading)), justify=column.justify, no_wrap=True)
        for line in lines:
            table.add_row(*(Text(line[at]) for at in kept))
        return table

    needed = [min(w, _FOLDED) if column.justify == "left" else w for w, column in zip(widths, shown, strict=True)]
    return Fitting(build, [column.title for column in shown], needed, [column.spare for column in shown])


def plain(value: Value) -> str:
    """Any field as text: numbers to four significant digits, booleans as yes and no."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def count(n: float | None) -> str:
    """A number of things, to one decimal: 640, 12.6 k, 4.3 M."""
    return _scaled(n, lambda scaled: f"{scaled:.1f}")


def flops(n: float | None) -> str:
    """A number of floating-point operations, to three digits: 640, 12.6 M, 1.13 G."""
    return _scaled(n, lambda scaled: f"{scaled:#.3g}".rstrip("."))


def percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction of one as per cent: 0.834 is 83.4%."""
    return MISSING if fraction is None else f"{100 * fraction:.{digits}f}%"


def ratio(x: float | None, digits: int = 2) -> str:
    """How many times: 2.67×."""
    return MISSING if x is None else f"{x:.{digits}f}×"


def fewer(fraction: float | None, digits: int = 2) -> str:
    """A fraction of dense as how many times fewer: 0.375 is 2.67×."""
    return ratio(1 / fraction if fraction else None, digits)


def rate(x: float | None) -> str:
    """A learning rate: 1e-3, 2.5e-4."""
    if x is None:
        return MISSING
    digits, _, power = f"{x:.3e}".partition("e")
    return f"{float(digits):g}e{int(power)}" if x and math.isfinite(x) else f"{x:g}"


def signed(x: float | None, digits: int = 2) -> str:
    """A difference with its sign: +0.52, −0.30, 0.00."""
    if x is None:
        return MISSING
    text = f"{x:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def p_value(p: float | None) -> str:
    """A probability: 0.34, 0.021, 0.0034, < 0.0001."""
    if p is None:
        return MISSING
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def seconds(s: float | None) -> str:
    """A duration in seconds, in the unit that suits it: 850.0 µs, 12.3 ms, 4.2 s, 3 min 20 s, 2 h 05 min."""
    if s is None:
        return MISSING
    if not math.isfinite(s) or s <= 0:
        return f"{s:g} s"
    for scale, unit, limit in ((1e6, "µs", 1000), (1e3, "ms", 1000), (1.0, "s", 60)):
        if round(s * scale, 1) < limit:
            return f"{s * scale:.1f} {unit}"
    if round(s) < 3600:
        return f"{round(s) // 60} min {round(s) % 60:02d} s"
    minutes = round(s / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plus_minus(mean: float | None, sd: float | None, digits: int = 2) -> str:
    """A mean and a standard deviation: 88.41 ± 0.12; without the ± where there is none, as of one value."""
    if mean is None:
        return MISSING
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def sample_sd(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n − 1 in the denominator); None of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def _scaled(n: float | None, form: Callable[[float], str]) -> str:
    if n is None:
        return MISSING
    if not math.isfinite(n):
        return str(n)
    if round(abs(n)) < 1000:
        return f"{n:.0f}"
    units = ["k", "M", "G", "T", "P"]
    scaled, unit = n / 1000, units.pop(0)
    # As it will be shown, not as it is: 999 960 is 1.0 M, not 1000.0 k.
    while units and abs(float(form(scaled))) >= 1000:
        scaled, unit = scaled / 1000, units.pop(0)
    return f"{form(scaled)} {unit}"
