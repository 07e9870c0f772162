"""Reports show what they were given, in every format, and need no other file; any run folder makes one."""

import json
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from condenser.synthetic_set import SyntheticSet
from config import add_args_from_yaml, nested
from kd.kd_config import KdConfig
from scripts import report
from utils.ddp import process_group
from utils.report import (
    Block,
    Code,
    Columns,
    Heading,
    Paragraph,
    Picture,
    Table,
    loss_curve,
    plain_table,
    read_markdown,
    render_html,
    render_markdown,
    write_report,
)
from utils.run_folder import ENVIRONMENT, REPOSITORY, RunFolder, Start, starts_of, this_start

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
    text = (tmp_path / "report.md").read_text()
    assert "![losses](<images/loss_curve.png>)" in text
    assert Path(sys.orig_argv[-1]).name in text and f"torch | {torch.__version__.split('+')[0]}" in text
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


def test_panels_of_one_quantity_have_one_scale(tmp_path: Path) -> None:
    series, row = {"low": [(0, 1.0), (9, 2.0)], "high": [(0, 80.0), (9, 90.0)]}, []
    for same in (False, True):
        loss_curve(tmp_path / "curves.png", series, "epoch", "accuracy", same_scale=same)
        picture = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
        blue = (picture[..., 2] - picture[..., 0] > 100).nonzero()[0]  # the lines' pixels
        row.append(np.ptp(blue[blue < len(picture) // 2]))
    assert row[1] < row[0] / 10  # 1 to 2 is nearly flat beside 90


def test_markdown_reads_back_as_the_blocks_it_was_written_from(tmp_path: Path, blocks: list[Block]) -> None:
    (tmp_path / "args.log").touch()
    hostile = [
        Paragraph("- a list"),
        Paragraph("# no heading"),
        Table(("\\|", ""), (("\\\\", "|x|"),)),
        Code(""),
        Code("\n\n"),
    ]
    written = [*blocks, *hostile, Heading("last", 4)]
    title, found = read_markdown(render_markdown(HOSTILE, written, tmp_path), tmp_path)
    caption = written.index(TABLE)
    expected = [*written[:caption], Paragraph(TABLE.caption), Table(TABLE.header, TABLE.rows), *written[caption + 1 :]]
    assert (title, found) == (HOSTILE, expected)


@pytest.mark.parametrize(
    "text", ["| a |", "| a |\n| - |\n| b | c |", "```\nopen", "![x](<>)", "![](<\0>)", "|\\", "#", "]("]
)
def test_any_markdown_becomes_blocks_that_lose_no_word(tmp_path: Path, text: str) -> None:
    page = render_html(*read_markdown(text, tmp_path))
    for word in ("a", "b", "c", "open", "x"):
        assert word not in text or word in "".join(part for _, part in Page(page).texts)


def test_a_foreign_report_brings_only_pictures_of_run_folders(tmp_path: Path, curve: Path) -> None:
    text = "![mine](<../images/loss_curve.png>)\n\n![text](<../images/note.png>)\n\n![all](</dev/zero>)"
    (tmp_path / "images" / "note.png").write_text("secret")
    shown = [block for block in read_markdown(text, tmp_path / "run")[1] if isinstance(block, Picture)]
    assert shown == []
    (tmp_path / "run").mkdir()
    (tmp_path / "args.log").touch()
    shown = [block for block in read_markdown(text, tmp_path / "run")[1] if isinstance(block, Picture)]
    assert shown == [Picture(curve.resolve(), "mine")]


def test_columns_hold_every_part_and_folded_code_its_summary() -> None:
    columns = Columns(((Paragraph("left"), TABLE), (Code("a: 1", "Configuration"),)))
    page = Page(render_html("t", [columns]))
    assert {("p", "left"), ("summary", "Configuration"), ("code", "a: 1")} <= set(page.texts)
    assert [tag for tag, name, _ in page.attributes if name == "class" and tag == "div"] == ["div", "div"]
    markdown = render_markdown("t", [columns], Path())
    assert markdown.index("left") < markdown.index("80.9") < markdown.index("Configuration") < markdown.index("a: 1")


def make_run(folder: Path, finished: bool = True, **settings: object) -> Path:
    (folder / "distilled_data").mkdir(parents=True)
    (folder / "args.log").write_text(yaml.safe_dump({"condense": {"ipc": 1}, "seed": 0, "text": HOSTILE} | settings))
    lines = [json.dumps({"iteration": i, "match": 1 / i, "note": "x"}) for i in range(1, 6)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"iteration": 6, "mat')
    (folder / "print.log").write_text(f"first\n{HOSTILE}\n")
    data = SyntheticSet(torch.rand(4, 3, 8, 8), torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]))
    for name in ("0", "5"):
        data.save(folder / "distilled_data" / f"syn_data_{name}.pth")
    if finished:
        (folder / "result.json").write_text(json.dumps({"match": 0.25, "of": {"students": 3}, "all": [1, 2]}))
    return folder


def shown(words: list[Path | str], out: Path) -> Page:
    assert report.main([*map(str, words), "--out", str(out)]) == 0
    return Page(out.read_text())


def test_a_run_without_a_report_shows_numbers_curves_images_configuration_and_command(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "distill_feat" / "dc" / "digits" / "run")
    page = shown([folder], tmp_path / "page.html")
    texts = [text for _, text in page.texts]
    assert {"match", "0.25", "of.students", "3"} <= set(texts)
    assert any(text.startswith("Finished. 1 damaged") for text in texts)
    assert sum(tag == "img" and name == "src" for tag, name, _ in page.attributes) == 3
    assert report.UNKNOWN in texts and "Environment" not in texts
    configuration = next(text for tag, text in page.texts if tag == "code" and "ipc" in text)
    assert yaml.safe_load(configuration)["text"] == HOSTILE
    assert not any("log" in text for tag, text in page.texts if tag == "h2")


def test_an_unfinished_run_says_so_and_how_far_it_came(tmp_path: Path) -> None:
    page = shown([make_run(tmp_path / "run", finished=False)], tmp_path / "page.html")
    texts = [text for _, text in page.texts]
    assert any(text.startswith("UNFINISHED: last iteration written: 5. 1 damaged") for text in texts)
    assert f"first\n{HOSTILE}" in texts


def open_run(folder: Path) -> None:
    with process_group(torch.device("cpu")) as world:
        run = RunFolder(folder, {"seed": 0}, world)
        run.end_log()
        assert run.lock
        run.lock.close()


def test_a_killed_run_says_how_and_where_it_was_started_and_an_old_start_stays(tmp_path: Path) -> None:
    folder, there = tmp_path / "run", Start("cd /there\npython a.py " + HOSTILE, {"python": "3.0", "device": HOSTILE})
    open_run(folder)
    first = shown([folder], tmp_path / "page.html").texts
    assert ("code", this_start().command) in first and ("td", torch.__version__.split("+")[0]) in first
    assert ("summary", "Commands of earlier starts") not in first
    (folder / ENVIRONMENT).write_text(json.dumps([asdict(there), asdict(this_start())]))
    open_run(folder)
    assert starts_of(folder) == (there, this_start())  # each once
    (folder / ENVIRONMENT).write_text(json.dumps([asdict(this_start()), asdict(there)]))
    open_run(folder)
    assert starts_of(folder) == (there, this_start())  # the last one last
    texts = shown([folder], tmp_path / "page.html").texts
    assert {("code", f"# start 1\n{there.command}"), ("code", this_start().command), ("td", HOSTILE)} <= set(texts)
    assert [text for tag, text in texts if tag == "th"] == ["what", "start 1", "last start"]
    write_report(folder, "ended", [])
    ended = shown([folder], tmp_path / "page.html").texts
    assert ended.count(("h2", "Environment")) == 1 and {("td", HOSTILE), ("code", this_start().command)} <= {*ended}


def test_a_finished_run_that_is_asked_again_keeps_what_it_said(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    open_run(folder)
    (folder / ENVIRONMENT).write_text(json.dumps([asdict(Start("python a.py", {}))]))
    (folder / "result.json").write_text("{}")
    before = (folder / ENVIRONMENT).read_bytes()
    open_run(folder)
    assert (folder / ENVIRONMENT).read_bytes() == before


@pytest.mark.parametrize("text", ["", "{}", "5", '[{"command": 1}]', "[" * 5000, "\udcff"])
def test_a_damaged_environment_is_one_line_with_a_remedy(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run", finished=False)
    (folder / ENVIRONMENT).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert report.main([str(folder)]) == 2
    said = capsys.readouterr().err
    assert "delete it" in said and said.count("\n") == 1


def test_a_finished_report_is_shown_with_what_repeats_it(tmp_path: Path, curve: Path) -> None:
    folder = make_run(tmp_path / "run")
    drawn = folder / "images" / "curve.png"
    drawn.parent.mkdir()
    drawn.write_bytes(curve.read_bytes())
    write_report(folder, "Condensed: x", [TABLE, Picture(drawn, "losses")])
    own, again = (folder / "report.html").read_text(), tmp_path / "again.html"
    texts = shown([folder], again).texts
    missing = [part for part in Page(own).texts if part not in texts]
    assert missing == [("figcaption", TABLE.caption)] and ("p", TABLE.caption) in texts  # all else word for word


def test_a_configuration_reads_back_from_its_args_log(tmp_path: Path) -> None:
    cfg = add_args_from_yaml(
        KdConfig, REPOSITORY / "config" / "kd" / "digits" / "sdd_kd_lskd.yaml", (), tmp_path
    ).config
    folder = make_run(tmp_path / "run", finished=False)
    (folder / "args.log").write_text(yaml.safe_dump(nested(cfg)))
    assert add_args_from_yaml(KdConfig, folder / "args.log", (), tmp_path).config == cfg


def test_several_runs_stand_side_by_side_below_what_differs(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / name, seed=seed, finished=seed < 2) for seed, name in enumerate(("one", "two", "three"))
    ]
    page = shown([*runs], tmp_path / "page.html")
    texts = [text for tag, text in page.texts if tag == "td"]
    assert texts[texts.index("seed") + 1 :][:3] == ["0", "1", "2"] and "condense.ipc" not in texts
    headings = [text[:3] for tag, text in page.texts if tag == "h2"]
    assert headings[-3:] == ["A: ", "B: ", "C: "]
    assert page.attributes.count(("div", "class", "columns")) == 1


def test_what_is_no_run_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = make_run(tmp_path / "broken")
    (broken / "result.json").write_text("{")
    for folder, words in (
        (tmp_path, "not a run folder"),
        (tmp_path / "none", "not a run folder"),
        (broken, "no mapping in JSON"),
    ):
        assert report.main([str(folder)]) == 2
        said = capsys.readouterr()
        assert words in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("text", ["a: &x [1]\nb: *x", "[", "5", "\0", "a: " + "[" * 600])
def test_settings_of_a_strange_args_log_are_none(text: str) -> None:
    assert report.settings_of(text) == {}


def test_lines_of_metrics_that_are_no_numbers_are_counted() -> None:
    text = '{"epoch": 1, "a": 2}\n5\n{"a": "x"}\nnot\n{"epoch": 2, "a": NaN, "b": true}\n{"epoch": 3, "a": 1e999}\n'
    assert report.metrics_of(text + "[" * 5000) == ({"a": [(1, 2.0)]}, "epoch", 4)
