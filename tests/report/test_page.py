"""If these fail, a page runs what a row says, reaches for the network, or shows nothing where it should."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from strassen_tile.report.page import Section, figure_svg, html_table, write_page
from strassen_tile.report.table import Column

EVIL = "<script>alert(\"1\")</script> & 'x' <img src=http://example.invalid/x>"
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Reader(HTMLParser):
    """Checks that tags nest, and keeps tags with their attributes and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def line_figure(label="a"):
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(3, 2))
    axes = figure.subplots()
    axes.plot([1, 2, 3], [1, 3, 2])
    axes.set_title(label, parse_math=False)
    return figure


@pytest.fixture
def page(tmp_path):
    columns = (Column(EVIL, "name", "left"), Column("n", "n"))
    table = html_table(columns, [{"name": EVIL, "n": 1}, {"name": "b", "n": None}])
    sections = [
        Section(EVIL, (EVIL, "second"), table=table, caption=EVIL),
        Section("Figure", figure=figure_svg(line_figure(EVIL)), caption=EVIL),
        Section("Figure again", figure=figure_svg(line_figure("b"))),
    ]
    write_page(tmp_path / "report.html", EVIL, sections, {"command": EVIL, "cores": 2})
    return tmp_path / "report.html"


def test_text_is_escaped_and_arrives_as_written(page):
    reader = read(page)
    tags = [tag for tag, _ in reader.tags]
    assert "script" not in tags
    assert "img" not in tags
    # Title, h1, two headings' worth of section, paragraph, caption, heading cell, cell, figcaption, environment.
    assert sum(EVIL in text for text in reader.text) == 9
    assert {attributes.get("aria-label") for _, attributes in reader.tags} >= {EVIL, "Figure again"}


def test_nothing_is_loaded_from_anywhere(page):
    reader = read(page)
    for tag, attributes in reader.tags:
        assert tag not in ("link", "script", "iframe")
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert value.startswith(("#", "data:")), (tag, name, value)
    text = page.read_text(encoding="utf-8")
    assert re.search(r"url\((?!#)", text) is None
    assert "@import" not in text
    policy = next(a["content"] for t, a in reader.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_a_reader_of_any_kind_can_use_it(page):
    reader = read(page)
    tags = [tag for tag, _ in reader.tags]
    assert [a["scope"] for t, a in reader.tags if t == "th"] == ["col", "col", "row", "row"]
    assert tags.count("table") == tags.count("caption") == 1
    assert tags.count("dt") == tags.count("dd") == 2
    assert all(
        a.get("role") == "img" and a["aria-label"] for t, a in reader.tags if t == "div" and a["class"] == "plot"
    )
    assert ("html", {"lang": "en"}) in reader.tags
    assert any(a.get("name") == "viewport" for _, a in reader.tags)
    assert "prefers-color-scheme: dark" in page.read_text(encoding="utf-8")


def test_names_within_figures_are_unique_on_the_page_and_resolve(page):
    attributes = [a for _, a in read(page).tags]
    ids = [a["id"] for a in attributes if "id" in a]
    assert len(ids) == len(set(ids))
    used = {a["xlink:href"][1:] for a in attributes if "xlink:href" in a}
    used |= {name for a in attributes for value in a.values() for name in re.findall(r"url\(#([^)]+)\)", value or "")}
    assert used
    assert used <= set(ids)


def test_svg_is_inline_scales_and_is_the_same_every_time():
    svg = figure_svg(line_figure())
    assert svg == figure_svg(line_figure())
    assert svg.startswith("<svg")
    root = ElementTree.fromstring(svg)
    assert "viewBox" in root.attrib
    assert "width" not in root.attrib
    assert "height" not in root.attrib
    assert "<!--" not in svg


def test_caption_goes_to_the_table_where_there_is_no_figure(tmp_path):
    table = html_table((Column("n", "n"),), [{"n": 1}])
    write_page(tmp_path / "p.html", "t", [Section("Heading", table=table, caption="says what")], {})
    reader = read(tmp_path / "p.html")
    assert reader.text[reader.text.index("says what") - 1].strip() == ""
    assert "dl" not in [tag for tag, _ in reader.tags]
    assert "<caption>named</caption>" in html_table((Column("n", "n"),), [{"n": 1}], caption="named")
