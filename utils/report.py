"""A report is a list of blocks, written as Markdown, as one self-contained HTML file, or to the terminal.

What was written as Markdown is read back as blocks: a run folder's report.md is where its page starts from.
"""

import base64
import html
import io
import mimetypes
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Union

from utils.checkpoint import atomic_write
from utils.run_folder import Start, starts_of, this_start


@dataclass(frozen=True)
class Heading:
    """A heading below the title: level 2 for a section, 3 for a part of one."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """One paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Table:
    """Plain text cells; a column of numbers is aligned to the right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"table row {row} has {len(row)} cells, the header has {len(self.header)}")

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers (with an error, a unit, or a dash for none) and nothing else."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.header)
        numbers = [[c in NO_NUMBER or (len(c) < 64 and NUMBER.fullmatch(c)) for c in cells] for cells in columns]
        return tuple(all(found) and any(f is not True for f in found) for found in numbers)


@dataclass(frozen=True)
class Picture:
    """A picture file."""

    path: Path
    caption: str = ""


@dataclass(frozen=True)
class Code:
    """Text that keeps its lines and spaces; with a summary, HTML folds it under that."""

    text: str
    summary: str = ""


@dataclass(frozen=True)
class Columns:
    """Parts beside one another on a wide screen, one below the other on a narrow one and in Markdown."""

    parts: tuple[tuple["Block", ...], ...]


Block = Union[Heading, Paragraph, Table, Picture, Code, Columns]  # noqa: UP007 - it names itself

AMOUNT = r"[+\-−]?(\d[\d,]*\.?\d*|\.\d+)([eE][+\-]?\d+)?"
NUMBER = re.compile(rf"{AMOUNT}(\s*(±|\+-|\+/-)\s*{AMOUNT})?\s*(%|[a-zA-Zµ]{{1,4}}(/[a-z]+)?)?")
NO_NUMBER = ("", "-", "–", "—", "nan", "n/a")
REPEAT, CONFIGURATION = "To repeat", "Configuration"
PNG = b"\x89PNG\r\n\x1a\n"
# Everything that Markdown would read as its own; an underscore only where it is not inside a word.
MARKUP = re.compile(r"[\\`*<\[|~$]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])")

STYLE = """
:root { color-scheme: light dark;
  --text: #1d232b; --soft: #5b6673; --line: #d9dee4; --back: #fff; --panel: #f5f7f9 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8ec; --soft: #9aa5b1; --line: #353d47; --back: #14181d; --panel: #1d232a }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; overflow-wrap: anywhere;
  color: var(--text); background: var(--back);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 1rem }
h2 { font-size: 1.3rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line) }
h3, h4, h5, h6 { font-size: 1.05rem; margin: 1.6rem 0 .4rem }
p { margin: .6rem 0; max-width: 46rem }
figure { margin: 1rem 0 }
figcaption { color: var(--soft); font-size: .9rem; margin: .35rem 0 }
.scroll { overflow-x: auto; container-type: inline-size; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; width: max-content; min-width: 100%;
  font-size: .95rem; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .8rem; text-align: left; vertical-align: top; overflow-wrap: normal }
td { max-width: 22rem; border-top: 1px solid var(--line) }
th { background: var(--panel); white-space: nowrap }
.prose { width: 100% } .prose td { max-width: none }
th.number, td.number { text-align: right; white-space: nowrap }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px }
pre { margin: 1rem 0; padding: .8rem 1rem; white-space: pre-wrap; background: var(--panel); border-radius: 6px;
  font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace }
code { font: inherit }
summary { cursor: pointer; margin: 1rem 0; font-weight: 600 }
body:has(.columns) { max-width: 120rem }
.columns { display: grid; gap: 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
.columns > section { min-width: 0 }
.columns table:not(.prose) td { max-width: 9rem; overflow-wrap: anywhere }
@media (max-width: 30rem) { th, td { padding: .3rem .5rem } td { max-width: 40vw; overflow-wrap: anywhere } }
@container (max-width: 40rem) {
  .prose thead { display: none } .prose, .prose tr, .prose td { display: block; width: auto; overflow-wrap: anywhere }
  .prose td + td { border: 0; padding-top: 0 } .prose td:first-child { font-weight: 600 }
}
@media print { .scroll { overflow: visible } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(folder: Path, title: str, blocks: Sequence[Block]) -> None:
    """Write report.md and report.html into `folder`, each with how it (no run: this process) was started, the page with
    its args.log. FileNotFoundError: a picture is missing."""
    blocks, args = [*blocks, *repeat_blocks(starts_of(folder) or (this_start(),))], folder / "args.log"
    configuration = [Code(args.read_text("utf-8"), CONFIGURATION)] if args.exists() else []
    atomic_write(folder / "report.md", render_markdown(title, blocks, folder).encode("utf-8", "replace"))
    atomic_write(folder / "report.html", render_html(title, [*blocks, *configuration]).encode("utf-8", "replace"))


def repeat_blocks(starts: Sequence[Start]) -> list[Block]:
    """The last start's command, other ones of earlier starts folded, and a column of the environment for each start."""
    last, places = starts[-1].command, [start.environment for start in starts]
    others = [f"# start {i}\n{start.command}" for i, start in enumerate(starts, 1) if start.command != last]
    names = [f"start {i}" for i in range(1, len(starts))] + ["last start"] if len(starts) > 1 else ["value"]
    keys = dict.fromkeys(key for place in places for key in place)
    rows = tuple((key, *(place.get(key, "-") for place in places)) for key in keys)
    folded = [Code("\n".join(others), "Commands of earlier starts")] if others else []
    return [Heading(REPEAT), Code(last), *folded, Heading("Environment"), Table(("what", *names), rows)]


def read_markdown(text: str, folder: Path) -> tuple[str, list[Block]]:
    """Title and blocks of what `render_markdown` wrote for `folder`, captions of tables as paragraphs.

    Any other text gives paragraphs. A picture is taken from run folders only, and only if it is a PNG.
    """
    title, blocks, lines = "", list[Block](), text.split("\n")[::-1]
    while lines:
        line = lines.pop()
        if re.fullmatch("`{3,}", line):
            end = max((i for i, other in enumerate(lines) if other == line), default=-1)
            blocks.append(Code("\n".join(lines[end + 1 :][::-1])))
            del lines[max(end, 0) :]
        elif line.startswith("|"):
            rows = [_cells(line)]
            while lines and lines[-1].startswith("|"):
                rows.append(_cells(lines.pop()))
            rule = len(rows) > 1 and all(re.fullmatch(":?-+:?", cell) for cell in rows[1])
            if rule and len({len(row) for row in rows}) == 1:
                blocks.append(Table(rows[0], tuple(rows[2:])))
            else:
                blocks += [Paragraph(" ".join(row)) for row in rows]
        elif line.startswith("![") and line.endswith(">)"):
            caption, _, name = line[2:-2].rpartition("](<")
            place = _run_picture(folder / name)
            blocks.append(
                Picture(place, _plain(caption)) if place else Paragraph(f"{_plain(caption)}: no picture {name}")
            )
        elif found := re.fullmatch(r"(#{1,6}) (.*)", line):
            level, words = len(found[1]), _plain(found[2])
            if level == 1 and not title:
                title = words
            else:
                blocks.append(Heading(words, level))
        elif line.strip():
            blocks.append(Paragraph(_plain(line)))
    return title, blocks


def render_markdown(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """GitHub's Markdown; pictures are linked by their path from `folder`."""
    return "\n\n".join([f"# {_marked(title)}", *(_markdown(block, folder) for block in blocks)]) + "\n"


def render_html(title: str, blocks: Sequence[Block]) -> str:
    """One HTML file with style and pictures inside. FileNotFoundError: a picture is missing."""
    body = "\n".join([f"<h1>{_escaped(title)}</h1>", *map(_html, blocks)])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`81.20 ± 0.31`: mean and deviation; of one value no deviation, of none nothing."""
    dev = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{dev}" if values else ""


def gain(values: Sequence[float], base: Sequence[float], digits: int = 2) -> str:
    """Mean and standard error of the paired differences, value by value."""
    differences = [a - b for a, b in zip(values, base, strict=True)]
    error = f" ± {stdev(differences) / len(differences) ** 0.5:.{digits}f}" if len(differences) > 1 else ""
    return f"{mean(differences):+.{digits}f}{error}"


def plain_table(table: Table) -> str:
    """The table in aligned columns for a terminal, its caption above."""
    lines = [[_one_line(cell) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    shown = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, table.numeric, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([_one_line(table.caption), *shown] if table.caption else shown)


def draw_scores(path: Path, scores: Mapping[str, Sequence[float]], xlabel: str) -> None:
    """Draw values of every name as a PNG: a line each from the top, a dot a value, a bar and a number at the mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.8 + 0.4 * len(scores)), dpi=130)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)  # inches
    canvas, panel = FigureCanvasAgg(figure), figure.add_subplot()
    for line, values in enumerate(scores.values()):
        panel.plot(values, [line] * len(values), "o", color="#1f5fa8", alpha=0.6, markersize=6)
        panel.plot([mean(values)], [line], "|", color="#1d232b", markersize=16)
        panel.annotate(f"{mean(values):.1f}", (max(values), line), (8, 0), textcoords="offset points", va="center")
    panel.set_yticks(range(len(scores)), [*scores])
    panel.invert_yaxis()
    panel.margins(x=0.12, y=0.15)
    panel.grid(color="#e3e7eb", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel(xlabel)
    image = io.BytesIO()
    canvas.print_png(image)
    atomic_write(path, image.getvalue())


def loss_curve(
    path: Path, series: Mapping[str, Sequence[tuple[int, float]]], xlabel: str, ylabel: str, same_scale: bool = False
) -> None:
    """Draw (step, value) series as a PNG, a panel each over one shared step axis; of one quantity, on one scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.5, 0.6 + 1.7 * len(series)), dpi=130)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)  # inches
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(len(series), 1, sharex=True, sharey=same_scale, squeeze=False)[:, 0]
    for panel, (name, points) in zip(panels, series.items(), strict=True):
        steps, values = [step for step, _ in points], [value for _, value in points]
        panel.plot(
            steps,
            values,
            color="#1f5fa8",
            linewidth=1.3,
            marker="o" if len(points) < 30 else "",
            markersize=3,
        )
        panel.set_title(name, loc="left", fontsize=10, fontweight="bold", parse_math=False)
        if values:
            panel.set_title(f"last {values[-1]:.4g}", loc="right", fontsize=9, color="#5b6673")
        panel.grid(color="#e3e7eb", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.yaxis.set_major_locator(MaxNLocator(5))
        panel.margins(x=0.02, y=0.1)
    panels[-1].set_xlabel(xlabel, fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    image = io.BytesIO()
    canvas.print_png(image)
    atomic_write(path, image.getvalue())


def _one_line(text: str) -> str:
    """The text without line breaks, runs of spaces and control characters."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text).strip()


def _marked(text: str) -> str:
    """Plain text as Markdown that shows it unchanged."""
    text = MARKUP.sub(r"\\\g<0>", _one_line(text))
    return re.sub(r"^(?=[#+-]+ |>)", r"\\", text)


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_marked(text)}"
        case Paragraph(text):
            return _marked(text)
        case Code(text, summary):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return (f"{_marked(summary)}\n\n" if summary else "") + f"{fence}\n{text}\n{fence}"
        case Columns(parts):
            return "\n\n".join(_markdown(inner, folder) for part in parts for inner in part)
        case Picture(path, caption):
            # A relative path, so that the folder can be moved; <> because it may hold spaces.
            return f"![{_marked(caption)}](<{Path(os.path.relpath(path, folder)).as_posix()}>)"
        case Table(header, rows, caption):
            rule = ["---:" if number else "---" for number in block.numeric]
            marked = [[_marked(cell) for cell in row] for row in (header, *rows)]
            lines = [f"| {' | '.join(row)} |" for row in (marked[0], rule, *marked[1:])]
            return "\n".join([*([_marked(caption), ""] if caption else []), *lines])


def _plain(text: str) -> str:
    """What Markdown shows of `_marked` text."""
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text.strip())


def _cells(line: str) -> tuple[str, ...]:
    """The cells of a table's line, between bars that are not escaped."""
    row = [""]
    for part in re.findall(r"\||(?:\\.|[^\\|])+", line[1:]):
        if part == "|":
            row.append("")
        else:
            row[-1] = _plain(part)
    return tuple(row if row[-1] else row[:-1])


def _run_picture(path: Path) -> Path | None:
    """A run folder's PNG, links followed; None for anything else that a foreign report.md may name."""
    try:
        place = path.resolve(strict=True)
        if not place.is_file() or not (place.parents[1] / "args.log").exists():
            return None
        with place.open("rb") as file:
            return place if file.read(len(PNG)) == PNG else None
    except (OSError, RuntimeError, ValueError, IndexError):  # absent, a loop of links, no path at all
        return None


def _visible(text: str) -> str:
    """The text without control characters but tabs and line ends."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def _escaped(text: str) -> str:
    return html.escape(_one_line(text))


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_escaped(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_escaped(text)}</p>"
        case Code(text, summary):
            code = f"<pre><code>{html.escape(_visible(text))}</code></pre>"
            return f"<details><summary>{_escaped(summary)}</summary>{code}</details>" if summary else code
        case Columns(parts):
            sections = ("<section>\n" + "\n".join(map(_html, part)) + "\n</section>" for part in parts)
            return '<div class="columns">\n' + "\n".join(sections) + "\n</div>"
        case Picture(path, caption):
            kind = mimetypes.guess_type(path.name)[0]
            data = base64.b64encode(path.read_bytes()).decode()
            image = f'<img alt="{_escaped(caption)}" src="data:{kind};base64,{data}">'
            return f"<figure>{image}{_html_caption(caption)}</figure>"
        case Table(header, rows, caption):
            sides = [' class="number"' if number else "" for number in block.numeric]
            head = "".join(f"<th{side}>{_escaped(c)}</th>" for side, c in zip(sides, header, strict=True))
            body = "\n".join(
                f"<tr>{''.join(f'<td{s}>{_escaped(c)}</td>' for s, c in zip(sides, row, strict=True))}</tr>"
                for row in rows
            )
            prose = ' class="prose"' if any(len(cell) > 60 for row in rows for cell in row) else ""
            table = f"<table{prose}><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
            return f'<figure>{_html_caption(caption)}<div class="scroll" tabindex="0">{table}</div></figure>'


def _html_caption(caption: str) -> str:
    return f"<figcaption>{_escaped(caption)}</figcaption>" if caption else ""
