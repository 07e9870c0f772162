"""Reports show what they were given, in every format, and need no other file."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from utils.report import (
    Block,
    Code,
    Heading,
    Paragraph,
    Picture,
    Table,
    loss_curve,
    plain_table,
    render_html,
    render_markdown,
    write_report,
)

HOSTILE = "a|b \\ <script>alert(1)</script> [x](http://x.y) `c` *d* __init__ layer_index & &amp; $x$"
TABLE = Table(("set", "micro-F1"), (("full data", "80.9 ± 0.4"), (HOSTILE, "-")), "mean of 3 seeds")
VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a browser would see: balanced tags, attributes, and the texts by the tag they stand in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.append((self.open[-1], data))


@pytest.fixture
def curve(tmp_path: Path) -> Path:
    path = tmp_path / "images" / "loss_curve.png"
    loss_curve(path, {"match": [(1, 300.0), (2, 200.0)], "calib": [(2, 0.1)]}, "iteration", "loss")
    return path


@pytest.fixture
def blocks(curve: Path) -> list[Block]:
    code = Code(HOSTILE + "\n``` fence")
    return [Heading(HOSTILE, 2), Paragraph(HOSTILE), code, Picture(curve, HOSTILE), TABLE]


def unescape(cell: str) -> str:
    """Markdown's rule: a backslash before punctuation stands for the punctuation."""
    return "".join(part.replace("\\", "") or "\\" for part in split_escapes(cell))


def split_escapes(cell: str) -> list[str]:
    parts, rest = [], cell
    while rest:
        size = 2 if rest[0] == "\\" else 1
        parts.append(rest[:size])
        rest = rest[size:]
    return parts


def cells(line: str) -> list[str]:
    """The cells of a Markdown table row, split at bars that are not escaped."""
    row = [""]
    for part in split_escapes(line):
        if part == "|":
            row.append("")
        else:
            row[-1] += part
    return [unescape(cell.strip()) for cell in row[1:-1]]


def test_html_shows_every_text_unchanged(blocks: list[Block]) -> None:
    texts = Page(render_html(HOSTILE, blocks)).texts
    assert {tag for tag, text in texts if text == HOSTILE} == {"title", "h1", "h2", "p", "figcaption", "td"}
    assert ("code", HOSTILE + "\n``` fence") in texts


def test_html_needs_no_other_file_and_runs_nothing(blocks: list[Block]) -> None:
    page = Page(render_html("report", blocks))
    sources = [value for _, name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    assert not {tag for tag, _, _ in page.attributes} & {"script", "link", "iframe"}
    assert not any(name.startswith("on") for _, name, _ in page.attributes)


def test_markdown_table_reads_back_as_the_same_cells() -> None:
    lines = render_markdown("report", [TABLE], Path()).splitlines()
    rows = [cells(line) for line in lines if line.startswith("|")]
    assert rows == [list(TABLE.header), ["---", "---:"], *map(list, TABLE.rows)]


def test_markdown_fence_is_longer_than_any_inside() -> None:
    assert "\n````\na\n```\nb\n````\n" in render_markdown("report", [Code("a\n```\nb")], Path())


def test_written_markdown_links_the_picture_from_its_folder(tmp_path: Path, curve: Path) -> None:
    write_report(tmp_path, "report", [Picture(curve, "losses")])
    assert "![losses](<images/loss_curve.png>)" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "report.html", "report.md"]


def test_control_characters_do_not_reach_a_terminal_or_a_page() -> None:
    table = Table(("a",), (("x\x1b[31m\x00y\nz",),))
    for text in (plain_table(table), render_html("t", [table]), render_markdown("t", [table], Path())):
        assert "\x1b" not in text
        assert "\x00" not in text
        assert "y z" in text


def test_terminal_table_aligns_numbers_right_and_words_left() -> None:
    table = Table(("set", "F1"), (("full", "80.9 ± 0.4"), ("random real", "-"), ("syn", "7")))
    assert plain_table(table).splitlines() == [
        "set                  F1",
        "-----------  ----------",
        "full         80.9 ± 0.4",
        "random real           -",
        "syn                   7",
    ]


@pytest.mark.parametrize("cell", ["12", "-0.5", "1,234", "1e-3", "2.5e+03", "81 %", "3.2 s", "5 ± 1", "40 it/s"])
def test_a_column_of_amounts_is_numeric(cell: str) -> None:
    assert Table(("x",), ((cell,), ("-",))).numeric == (True,)


@pytest.mark.parametrize("column", [("1", "two"), ("ipc5",), ("-",), ("2026-01-02",), ()])
def test_a_column_with_anything_else_is_not(column: tuple[str, ...]) -> None:
    assert Table(("x",), tuple((cell,) for cell in column)).numeric == (False,)


def test_ragged_table_is_refused() -> None:
    with pytest.raises(ValueError, match="has 1 cells, the header has 2"):
        Table(("a", "b"), (("1",),))


def test_empty_table_still_has_its_header() -> None:
    assert plain_table(Table(("a", "bb"), ())).splitlines() == ["a  bb", "-  --"]


def test_loss_curve_is_a_png_with_one_panel_for_each_series(tmp_path: Path) -> None:
    heights = []
    for count in (1, 3):
        path = tmp_path / f"{count}.png"
        loss_curve(path, {f"${n}": [(0, n), (9, float("nan"))] for n in range(count)}, "iteration", "loss")
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        heights.append(int.from_bytes(data[20:24]))  # of the IHDR chunk
    assert heights[1] > 2 * heights[0]
