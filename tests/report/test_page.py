"""If these fail, a page runs what a row says, reaches for the network, or shows nothing where it should."""

import base64
import re
from html.parser import HTMLParser

import pytest

from strassen_tile.errors import DataError
from strassen_tile.records import read_rows
from strassen_tile.report.figures import drawing, new_figure, png
from strassen_tile.report.page import Section, html_table, write_page, write_report
from strassen_tile.report.table import Column

EVIL = "<script>alert(\"1\")</script> & 'x' <img src=http://example.invalid/x>"
VOID = {"meta", "br", "hr", "img", "link", "input"}
PICTURE = b"\x89PNG, as far as a page is concerned"


class Reader(HTMLParser):
    """Checks that tags nest, and keeps tags with their attributes, and the text of each tag."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else None, data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def page(tmp_path):
    columns = (Column(EVIL, "name", "left"), Column("n", "n"))
    table = html_table(columns, [{"name": EVIL, "n": 1}, {"name": "b", "n": None}])
    sections = [
        Section(EVIL, (EVIL, "second"), table=table, caption=EVIL),
        Section("Figure", figure=PICTURE, caption=EVIL),
        Section("Figure again", figure=PICTURE),
    ]
    write_page(tmp_path / "report.html", EVIL, sections, {"command": EVIL, "cores": 2})
    return tmp_path / "report.html"


def test_text_is_escaped_and_arrives_as_written(page):
    reader = read(page)
    assert "script" not in [tag for tag, _ in reader.tags]
    where = [tag for tag, text in reader.text if EVIL in text]
    assert where == ["title", "h1", "h2", "p", "caption", "th", "th", "figcaption", "dd"]
    assert [image["alt"] for image in reader.all("img")] == [EVIL, "Figure again"]
    assert [region["aria-label"] for region in reader.all("div")] == [EVIL]


def test_nothing_is_loaded_from_anywhere(page):
    reader = read(page)
    assert not {tag for tag, _ in reader.tags} & {"link", "script", "iframe", "object", "embed"}
    loading = ("src", "href", "srcset", "data", "action", "poster", "background")
    loaded = [value for _, attributes in reader.tags for name, value in attributes.items() if name in loading]
    assert loaded == ["data:image/png;base64," + base64.b64encode(PICTURE).decode()] * 2
    text = page.read_text(encoding="utf-8")
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = [meta["content"] for meta in reader.all("meta") if "http-equiv" in meta]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_a_reader_of_any_kind_can_use_it(page):
    reader = read(page)
    assert [cell["scope"] for cell in reader.all("th")] == ["col", "col", "row", "row"]
    assert len(reader.all("table")) == len(reader.all("caption")) == 1
    assert [text for tag, text in reader.text if tag == "dt"] == ["command", "cores"]
    assert [region.get("tabindex") for region in reader.all("div")] == ["0"]
    assert reader.all("html") == [{"lang": "en"}]
    assert any(meta.get("name") == "viewport" for meta in reader.all("meta"))
    assert "prefers-color-scheme: dark" in page.read_text(encoding="utf-8")


def test_caption_goes_to_the_figure_or_else_to_the_table(tmp_path):
    table = html_table((Column("n", "n"),), [{"n": 1}])
    sections = [Section("A", table=table, caption="of A"), Section("B", (), table, PICTURE, caption="of B")]
    write_page(tmp_path / "p.html", "t", sections, {})
    reader = read(tmp_path / "p.html")
    said = [(tag, text) for tag, text in reader.text if tag in ("caption", "figcaption")]
    assert said == [("caption", "of A"), ("caption", "B"), ("figcaption", "of B")]
    assert not reader.all("dl")
    assert "<caption>named</caption>" in html_table((Column("n", "n"),), [{"n": 1}], caption="named")


def test_report_leaves_rows_the_first_figure_and_a_page(tmp_path):
    rows = [{"n": 1, "machine": "a machine", "date": f"2026-01-0{day}T00:00:00Z"} for day in (1, 2)]
    sections = [Section("none"), Section("a", figure=PICTURE), Section("b", figure=b"another")]
    page = write_report(tmp_path / "new" / "out", rows, "A title", lambda: sections)
    assert sorted(path.name for path in page.parent.iterdir()) == ["plot.png", "report.html", "rows.json"]
    assert read_rows(page.parent / "rows.json") == rows
    assert (page.parent / "plot.png").read_bytes() == PICTURE
    text = page.read_text(encoding="utf-8")
    assert "<dd>2026-01-01T00:00:00Z to 2026-01-02T00:00:00Z</dd>" in text
    assert base64.b64encode(b"another").decode() in text


def test_rows_are_kept_when_the_page_cannot_be_made(tmp_path):
    def sections():
        raise DataError("these rows make no table")

    with pytest.raises(DataError):
        write_report(tmp_path, [{"n": 1}], "t", sections)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
    assert read_rows(tmp_path / "rows.json") == [{"n": 1}]


@drawing()
def a_figure():
    figure = new_figure(3, 2)
    figure.subplots().plot([1, 2, 3], [1, 3, 2], label="a")
    return figure


def test_a_figure_does_not_depend_on_the_reader_s_settings():
    matplotlib = pytest.importorskip("matplotlib")
    usual = png(a_figure())
    assert re.match(rb"\x89PNG\r\n\x1a\n", usual)
    dark = {"text.color": "white", "axes.facecolor": "black", "figure.facecolor": "black", "xtick.color": "white"}
    with matplotlib.rc_context({**dark, "savefig.facecolor": "black", "savefig.dpi": 30, "lines.linewidth": 9}):
        changed = matplotlib.rcParams.copy()
        assert png(a_figure()) == usual
        assert matplotlib.rcParams.copy() == changed
