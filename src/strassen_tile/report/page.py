"""Sections, tables and figures as one HTML page that opens from disk.

The page holds its style and its figures, and its content security policy forbids every load: no network, now or
later. All text is escaped; only `Section.table` and `Section.figure` are HTML, made by `html_table` and `figure_svg`.
Figures keep a white ground in the dark scheme, for their ink is dark.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from strassen_tile.files import write_text
from strassen_tile.records import Value
from strassen_tile.report.table import Column, cells, plain, report_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --ground: #ffffff; --line: #d0d7de; --head: #f3f5f7 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a0a8b0; --ground: #16191d; --line: #3a4149; --head: #20252b }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; color: var(--ink); background: var(--ground);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.6rem; line-height: 1.2 } h2 { font-size: 1.2rem; margin-top: 2rem }
p { max-width: 45rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
caption { caption-side: bottom; text-align: left; padding-top: .5rem }
caption, figcaption, dt { color: var(--soft) }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; white-space: nowrap }
thead th { background: var(--head); white-space: normal; vertical-align: bottom }
tbody th { font-weight: 600 }
.left { text-align: left } .center { text-align: center } .right { text-align: right }
figure { margin: 1rem 0; max-width: 50rem }
.plot { background: #ffffff; border: 1px solid var(--line); border-radius: 4px; padding: .25rem }
.plot svg { display: block; width: 100%; height: auto }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; font-size: .9rem }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        heading: its title.
        paragraphs: plain text, escaped by the page.
        table: HTML from `html_table`.
        figure: SVG from `figure_svg`.
        caption: says what the figure shows; of a section without a figure, the table.
    """

    heading: str
    paragraphs: tuple[str, ...] = ()
    table: str | None = None
    figure: str | None = None
    caption: str = ""


def html_table(columns: Sequence[Column], rows: Iterable[Mapping[str, Value]], caption: str = "") -> str:
    """The rows as an HTML table; the first column heads its row. Without a `caption` the page adds one."""
    head = "".join(
        f'<th scope="col" class="{escape(column.justify)}">{escape(column.title)}</th>' for column in columns
    )
    body = []
    for line in cells(columns, rows):
        marked = []
        for index, (column, cell) in enumerate(zip(columns, line, strict=True)):
            tag, scope = ("td", "") if index else ("th", ' scope="row"')
            marked.append(f'<{tag}{scope} class="{escape(column.justify)}">{escape(cell)}</{tag}>')
        body.append(f"<tr>{''.join(marked)}</tr>\n")
    named = f"<caption>{escape(caption)}</caption>\n" if caption else ""
    return f"<table>\n{named}<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(body)}</tbody>\n</table>"


def figure_svg(figure: Figure) -> str:
    """A matplotlib figure as inline SVG: no prolog, no fixed size, the same text for the same figure."""
    with report_extra():
        import matplotlib

    buffer = io.StringIO()
    # Letters as outlines: the labels were placed by this font's widths, which the reader may not have.
    with matplotlib.rc_context({"svg.hashsalt": "strassen-tile", "svg.fonttype": "path"}):
        # No metadata: it carries the date and addresses that this page has no use for.
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    text: str = buffer.getvalue()
    text = re.sub(r"<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    opening, rest = text.split(">", 1)
    opening = re.sub(r'\s(?:width|height)="[^"]*"', "", opening)
    # Every figure numbers its parts from one; on a page with several the names must differ.
    prefix = "f" + hashlib.sha256(rest.encode()).hexdigest()[:8] + "-"
    rest = re.sub(r'(\bid="|href="#|url\(#)', lambda match: match[1] + prefix, rest)
    return f"{opening}>{rest}".strip()


def write_page(path: str | Path, title: str, sections: Iterable[Section], environment: Mapping[str, Value]) -> None:
    """Write the page to `path` atomically.

    Args:
        path: the file; folders are made.
        title: of the page.
        sections: its parts, in order.
        environment: what made the rows, see `rows.environment`; shown last. Empty: left out.
    """
    parts = [_section(section) for section in sections]
    if environment:
        terms = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(plain(value))}</dd>\n" for name, value in environment.items()
        )
        parts.append(f"<section>\n<h2>Environment</h2>\n<dl>\n{terms}</dl>\n</section>\n")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    write_text(
        path,
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(title)}</h1>\n{''.join(parts)}</main>\n</body>\n</html>\n",
    )


def _section(section: Section) -> str:
    label = escape(section.caption or section.heading)
    parts = [f"<h2>{escape(section.heading)}</h2>\n"]
    parts += [f"<p>{escape(paragraph)}</p>\n" for paragraph in section.paragraphs]
    if section.table is not None:
        table = section.table
        if "<caption>" not in table:
            named = escape(section.heading) if section.figure is not None else label
            table = table.replace("<table>", f"<table>\n<caption>{named}</caption>", 1)
        # Focusable, so that a table wider than the screen can be scrolled from the keyboard.
        name = escape(section.heading)
        parts.append(f'<div class="wide" role="region" aria-label="{name}" tabindex="0">\n{table}\n</div>\n')
    if section.figure is not None:
        parts.append(f'<figure>\n<div class="plot" role="img" aria-label="{label}">\n{section.figure}\n</div>\n')
        if section.caption:
            parts.append(f"<figcaption>{label}</figcaption>\n")
        parts.append("</figure>\n")
    return f"<section>\n{''.join(parts)}</section>\n"
