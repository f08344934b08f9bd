"""A table for the terminal that leaves out what it has no room for, rather than break every cell. Needs rich."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table


@dataclass(frozen=True)
class Fitting:
    """A table that rich shows with as many of its columns as the terminal has room for, and says which it left out.

    Attributes:
        build: makes the table of the columns at these places.
        titles: of the columns.
        widths: the letters that each column needs.
        spare: for each column, 0 if it always stays; of the others the highest goes first.
    """

    build: Callable[[Sequence[int]], Table]
    titles: Sequence[str]
    widths: Sequence[int]
    spare: Sequence[int]

    def kept(self, width: int) -> list[int]:
        """The places of the columns that a terminal of `width` letters shows."""
        kept = list(range(len(self.widths)))
        # Between columns, and at both edges, there is a letter's room.
        while sum(self.widths[at] for at in kept) + len(kept) + 1 > width:
            first = max(kept, key=lambda at: self.spare[at], default=None)
            if first is None or not self.spare[first]:
                break
            kept.remove(first)
        return kept

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What rich calls to show it."""
        from rich.text import Text

        kept = self.kept(options.max_width)
        yield self.build(kept)
        if left := [title for at, title in enumerate(self.titles) if at not in kept]:
            yield Text(f"For want of width without: {'; '.join(left)}.", style="dim")
