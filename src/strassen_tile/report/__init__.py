"""Rows to a table, a plot and a stand-alone HTML page.

Every command gathers flat records (`rows`), shows them (`table`), and leaves them with a page (`page`); `compare` is
the report of `strassen-tile compare`. Importing any of it imports neither rich nor matplotlib: they come with the first
table or figure, and with `pip install "strassen-tile[report]"`.
"""

from __future__ import annotations

from strassen_tile.records import Row, Value, append_rows, environment, read_rows, write_rows
from strassen_tile.report.page import Section, figure_svg, html_table, write_page
from strassen_tile.report.table import Column, markdown_table, rich_table

__all__ = [
    "Column",
    "Row",
    "Section",
    "Value",
    "append_rows",
    "environment",
    "figure_svg",
    "html_table",
    "markdown_table",
    "read_rows",
    "rich_table",
    "write_page",
    "write_rows",
]
