"""What a command leaves: its rows, a plot, and a page of sections, tables and figures that opens from disk.

The page holds its style and its figures, and its content security policy forbids every load: no network, now or
later. All text is escaped; only `Section.table` is HTML, made by `html_table`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from strassen_tile.files import write_bytes, write_text
from strassen_tile.records import Value, environment_of, write_rows
from strassen_tile.report.table import Column, filled, plain

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
figure { margin: 1rem 0 }
img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 4px }
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
        figure: a PNG file, from `figures.png`.
        caption: says what the figure shows, also to those who hear the page; of a section without a figure, the table.
    """

    heading: str
    paragraphs: tuple[str, ...] = ()
    table: str | None = None
    figure: bytes | None = None
    caption: str = ""


def html_table(columns: Sequence[Column], rows: Iterable[Mapping[str, Value]], caption: str = "") -> str:
    """The rows as an HTML table; the first column heads its row. Without a `caption` the page adds one."""
    shown, lines = filled(columns, rows)
    head = "".join(f'<th scope="col" class="{escape(column.justify)}">{escape(column.title)}</th>' for column in shown)
    body = []
    for line in lines:
        marked = []
        for index, (column, cell) in enumerate(zip(shown, line, strict=True)):
            tag, scope = ("td", "") if index else ("th", ' scope="row"')
            marked.append(f'<{tag}{scope} class="{escape(column.justify)}">{escape(cell)}</{tag}>')
        body.append(f"<tr>{''.join(marked)}</tr>\n")
    named = f"<caption>{escape(caption)}</caption>\n" if caption else ""
    return f"<table>\n{named}<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(body)}</tbody>\n</table>"


def write_report(
    folder: str | Path,
    rows: Sequence[Mapping[str, Value]],
    title: str,
    sections: Callable[[], Iterable[Section]],
) -> Path:
    """Write `rows.json`, `plot.png` and `report.html` into `folder`, each atomically.

    Args:
        folder: made if missing.
        rows: what was measured.
        title: of the page.
        sections: makes the page's parts; the first figure among them is the plot. Called once the rows are written:
            whatever goes wrong in tables and figures, what was measured is kept.

    Returns:
        The path of `report.html`.
    """
    folder = Path(folder)
    write_rows(folder / "rows.json", rows)
    made = list(sections())
    for figure in [section.figure for section in made if section.figure is not None][:1]:
        write_bytes(folder / "plot.png", figure)
    write_page(folder / "report.html", title, made, environment_of(rows))
    return folder / "report.html"


def write_page(path: str | Path, title: str, sections: Iterable[Section], environment: Mapping[str, Value]) -> None:
    """Write the page to `path` atomically.

    Args:
        path: the file; folders are made.
        title: of the page.
        sections: its parts, in order.
        environment: what made the rows, see `records.environment`; shown last. Empty: left out.
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
        data = base64.b64encode(section.figure).decode("ascii")
        said = f"<figcaption>{label}</figcaption>\n" if section.caption else ""
        parts.append(f'<figure>\n<img src="data:image/png;base64,{data}" alt="{label}">\n{said}</figure>\n')
    return f"<section>\n{''.join(parts)}</section>\n"
