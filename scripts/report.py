"""Write one page of run folders, side by side if there are several, that needs no other file.

    python -m scripts.report results/distill_feat/mtt/digits/ipc1/table_real_noF_seed0_397d7481
    python -m scripts.report RUN RUN RUN --out compare.html            # what differs, then a column each

Any run of any program, finished or not: what it reported, else its curves and images so far; its configuration, its
command, and the environment that it was started in. What stands in the folders is shown as text, whoever wrote it.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from condenser.synthetic_image import image_grid
from condenser.synthetic_set import load_synthetic
from config import ConfigError
from config.cli import Parser
from utils.checkpoint import atomic_write
from utils.report import (
    CONFIGURATION,
    REPEAT,
    Block,
    Code,
    Columns,
    Heading,
    Paragraph,
    Picture,
    Table,
    loss_curve,
    read_markdown,
    render_html,
    repeat_blocks,
)
from utils.run_folder import ENVIRONMENT, RESULT, starts_of

Points = dict[str, list[tuple[int, float]]]
STEPS = ("epoch", "iteration", "step")  # what a curve is drawn over: the first that is there
PANELS = 12
UNKNOWN = (
    f"The command and the environment are not known: the folder has no {ENVIRONMENT}. "
    "The program that wrote it reads its configuration again with --config_path=args.log."
)


@dataclass(frozen=True)
class Run:
    """What a run folder says of itself."""

    folder: Path
    args: str  # args.log
    settings: Mapping[str, str]  # by dotted key; empty where args.log is no mapping of plain values
    result: dict[str, Any] | None  # None: not finished
    metrics: Points
    step: str  # what the metrics are over
    damaged: int  # lines of metrics.jsonl that are not whole

    @property
    def name(self) -> str:
        """The end of its place, which says what it is of."""
        return "/".join(self.folder.resolve().parts[-3:])

    @property
    def state(self) -> str:
        """One sentence: finished, or how far it came."""
        last = max((point[-1][0] for point in self.metrics.values()), default=None)
        experts = len([*self.folder.glob("expert_*.safetensors")])
        if self.result is not None:
            text = "Finished."
        elif experts:
            text = f"{experts} experts; their program keeps no other result."
        else:
            text = "UNFINISHED: " + (f"last {self.step} written: {last}." if last is not None else "no metrics yet.")
        return text + (f" {self.damaged} damaged lines of metrics.jsonl left out." if self.damaged else "")


def text_of(path: Path) -> str:
    """A file as text, whatever its bytes. ConfigError: it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def settings_of(text: str) -> dict[str, str]:
    """Values of an args.log by dotted key; none of a text that is not a mapping, or has aliases, which may explode."""
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            return {}
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return {key: str(value) for key, value in leaves(tree).items()} if isinstance(tree, dict) else {}


def leaves(tree: dict[str, Any]) -> dict[str, Any]:
    """What a mapping of mappings holds, by dotted key."""
    flat = dict[str, Any]()
    todo = [(str(key), value) for key, value in reversed(tree.items())]
    while todo:
        name, value = todo.pop()
        if isinstance(value, dict):
            todo += [(f"{name}.{key}", inner) for key, inner in reversed(value.items())]
        else:
            flat[name] = value
    return flat


def metrics_of(text: str) -> tuple[Points, str, int]:
    """Series of a metrics.jsonl, over what, and how many lines are damaged (an unfinished last one, for instance)."""
    lines, damaged = list[dict[str, Any]](), 0
    for text_line in filter(str.strip, text.split("\n")):
        try:
            found = json.loads(text_line)
        except (ValueError, RecursionError):
            found = None
        numbers = {name: value for name, value in found.items() if amount(value)} if isinstance(found, dict) else {}
        damaged += not numbers
        lines += [numbers] if numbers else []
    step = next((name for name in STEPS if lines and all(name in line for line in lines)), "line")
    series: Points = {}
    for number, line in enumerate(lines, 1):
        for name in line.keys() - set(STEPS):
            series.setdefault(name, []).append((int(line.get(step, number)), float(line[name])))
    return dict(sorted(series.items())), step, damaged


def amount(value: object) -> bool:
    """Whether it is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def read_run(folder: Path) -> Run:
    """Raises ConfigError for what is no run folder, and for a result that is not JSON."""
    args, result, metrics = folder / "args.log", folder / RESULT, folder / "metrics.jsonl"
    if not args.is_file():
        raise ConfigError(f"{folder}: not a run folder (no args.log): name the folder that a program says it wrote")
    found: dict[str, Any] | None = None
    if result.exists():
        try:
            found = dict(json.loads(text_of(result)))
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"{result}: no mapping in JSON: run the same command again with --overwrite") from error
    text = text_of(args)
    series = metrics_of(text_of(metrics) if metrics.exists() else "")
    return Run(folder, text, settings_of(text), found, *series)


def numbers_of(run: Run) -> dict[str, str]:
    """The single numbers of its result by dotted key."""
    found = {key: value for key, value in leaves(run.result or {}).items() if amount(value)}
    return {key: str(value) if isinstance(value, int) else f"{value:.4g}" for key, value in found.items()}


def own_blocks(run: Run, scratch: Path) -> list[Block]:
    """Curves and images of a run that has no report; files go into `scratch`."""
    blocks: list[Block] = []
    if numbers := numbers_of(run):
        blocks += [Heading("Result"), Table(("number", "value"), tuple(numbers.items()))]
    if run.metrics:
        shown = dict([*run.metrics.items()][:PANELS])
        loss_curve(scratch / "curves.png", shown, run.step, "value")
        left = ", ".join([*run.metrics][PANELS:])
        caption = f"by {run.step}" + (f"; not drawn: {left}" if left else "")
        blocks += [Heading("Curves"), Picture(scratch / "curves.png", caption)]
    files = run.folder / "distilled_data"
    last = max((f for f in files.glob("syn_data_*.pth")), key=lambda file: file.stat().st_mtime, default=None)
    for file in dict.fromkeys(file for file in (files / "syn_data_0.pth", last) if file is not None and file.exists()):
        try:
            found = load_synthetic(file)
        except ConfigError as error:
            blocks.append(Paragraph(str(error)))
            continue
        if found.data.ndim == 4 and found.data.shape[1] in (1, 3):
            image_grid(found, scratch / f"{file.stem}.png")
            blocks += [Heading(f"Images of {file.name}, a row a class"), Picture(scratch / f"{file.stem}.png")]
        else:
            note = "what text they are nearest to stands in the report that its program writes at the end"
            blocks.append(Paragraph(f"{file.name}: {len(found.data)} learned samples; {note}."))
    return blocks


def run_blocks(run: Run, scratch: Path) -> tuple[str, list[Block]]:
    """Title and blocks of one run; pictures that are drawn for it go into `scratch`."""
    scratch.mkdir()
    report, log = run.folder / "report.md", run.folder / "print.log"
    title, blocks = read_markdown(text_of(report), run.folder) if report.exists() else ("", own_blocks(run, scratch))
    blocks.insert(0, Paragraph(f"{run.state} Folder: {run.folder}"))
    if not any(isinstance(block, Heading) and block.text == REPEAT for block in blocks):
        starts = starts_of(run.folder)
        blocks += repeat_blocks(starts) if starts else [Heading(REPEAT), Paragraph(UNKNOWN)]
    if run.result is None and log.exists() and (lines := text_of(log).splitlines()[-12:]):
        blocks += [Heading("Last lines of its log"), Code("\n".join(lines))]
    return title or run.name, [*blocks, Code(run.args, CONFIGURATION)]


def differences(runs: Sequence[Run]) -> list[Block]:
    """Tables of what the runs ended with and of the settings that they do not share."""
    letters = [chr(ord("A") + i) for i in range(len(runs))]

    def lines(found: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
        return [
            (key, *(one.get(key, "-") for one in found)) for key in dict.fromkeys(key for one in found for key in one)
        ]

    rows = tuple(lines([numbers_of(run) for run in runs]))
    settings, sections = [run.settings for run in runs], [{key.split(".")[0] for key in run.settings} for run in runs]
    apart = tuple(
        line
        for line in lines(settings)
        if len({*line[1:]}) > 1
        # Runs of one program: all of that; of different ones: what all of them have.
        and (all(sections[0] == other for other in sections) or all(line[0] in found for found in settings))
    )
    states = tuple((letter, run.name, run.state) for letter, run in zip(letters, runs, strict=True))
    blocks: list[Block] = [Table(("", "run", "state"), states)]
    if rows:
        blocks += [Heading("Results"), Table(("number", *letters), rows)]
    if apart:
        blocks += [Heading("Settings that differ"), Table(("setting", *letters), apart)]
    return blocks


def page(runs: Sequence[Run], scratch: Path) -> str:
    """The page as HTML."""
    parts = [run_blocks(run, scratch / str(number)) for number, run in enumerate(runs)]
    if len(runs) == 1:
        return render_html(*parts[0])
    columns = Columns(tuple(
        (Heading(f"{chr(ord('A') + i)}: {title}"), *map(lowered, blocks)) for i, (title, blocks) in enumerate(parts)
    ))  # fmt: skip
    return render_html(f"{len(runs)} runs", [*differences(runs), columns])


def lowered(block: Block) -> Block:
    """A heading one level lower, anything else as it is."""
    return Heading(block.text, min(6, block.level + 1)) if isinstance(block, Heading) else block


def command_line() -> Parser:
    """Its options."""
    parser = Parser(__doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folder of a run")
    text = "the page (default: RUN/report.html, of several report.html)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=text)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Exit status."""
    given = command_line().parse_args(words)
    out = given.out or (given.runs[0] if len(given.runs) == 1 else Path()) / "report.html"
    try:
        if len(given.runs) > 26:
            raise ConfigError(f"{len(given.runs)} runs: a page takes 26")
        runs = [read_run(folder) for folder in given.runs]
        with TemporaryDirectory() as scratch:
            atomic_write(out, page(runs, Path(scratch)).encode("utf-8", "replace"))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"report: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
