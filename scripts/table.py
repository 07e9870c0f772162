"""Make the result tables of README and RESULTS files from numbers of runs that are kept beside them.

    python -m scripts.table collect condense/results.jsonl RUN...    # keep the numbers of finished runs
    python -m scripts.table write                                    # every table anew, in its place
    python -m scripts.table check                                    # status 1 if a table is not what its numbers say

A table stands below <!-- table: NAME -->. NAME is an entry of a room's tables.yaml: rows and columns over its
results.jsonl (mean ± deviation over seeds and students), or `recorded`: numbers that no run folder holds (timings and
runs that are gone) with the command that printed them. Every table of a RESULTS file is one of results, and so is every
table with a number for a cell in a README. A translation (README.xx.md) has its own words, the same numbers.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import zip_longest
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import TypeAdapter

from config import ConfigError, Section
from config.cli import Parser
from utils.checkpoint import atomic_write
from utils.report import NUMBER, gain, spread
from utils.run_folder import REPOSITORY, RESULT

MANIFEST, RECORDS = "tables.yaml", "results.jsonl"
OUTPUTS = ("results", "pretrained_models", "models", "dataset", "save", "data", "logs")  # of runs
MARKER = re.compile(r"\s*<!-- table: (\S+) -->\s*")
RULE = re.compile(r"\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?")
OF_STUDENT = re.compile(r"(.+?)_(?:seed\d+(?:_\d+)?|order\d+_stage\d+)")
SEED = re.compile(r"_seed(\d+)_")
REDUCE = {"mean": mean, "median": median}
Lines = list[tuple[str, ...]]  # a table's cells, header and rule first


class Column(Section):
    """A column of numbers, and what its cells read unless the row says otherwise."""

    title: str
    score: str = ""  # a name in the records' values
    row: str = ""  # a training set or model, as the records name it; what the row says stands before it
    runs: str = ""  # a pattern of runs: the numbers of all that match are one sample
    against: str = ""  # a row: mean and standard error of the paired differences to it
    over: str = ""  # a pattern of runs: mean and standard error of the differences to that of the same seed
    digits: int = 1
    of: Literal["spread", "mean", "median", "count"] = "spread"  # spread: mean ± deviation; count: how many there are
    instead: list[str] = ["", ""]  # in the row's pattern of runs, and what stands there for this column


class Row(Section):
    """A row of words, then numbers; a list of runs has one for each column, one of rows makes two numbers a cell."""

    words: list[str]
    row: str | list[str] = ""
    runs: str | list[str] = ""
    given: dict[str, str] = {}  # by title: cells that are words, or empty


class Collected(Section):
    """A table over a room's records."""

    words: list[str]  # titles of the columns before the numbers
    runs: str = ""  # of rows and columns that name none
    columns: list[Column]
    rows: list[Row]


class Recorded(Section):
    """Typed numbers: one, [mean, deviation], or [median, low, high]."""

    kind: Literal["recorded"]
    command: str
    words: list[str]
    columns: list[Column]
    rows: list[list[float | list[float] | str | None]]


class Record(NamedTuple):
    """The numbers of one row of a run, one a student."""

    run: str
    row: str
    values: dict[str, list[float]]


class Place(NamedTuple):
    """A table in a Markdown file: the name in its marker, its first line (0-based)."""

    name: str | None
    start: int
    lines: Lines


def is_number(cell: str) -> bool:
    """Whether a cell is a number, perhaps with a deviation, a range or a second number behind it."""
    return NUMBER.fullmatch(re.split(r" \[|, ", cell.strip("*` "))[0]) is not None


def cells(line: str) -> tuple[str, ...]:
    """The cells of a line of a table."""
    inner = line.lstrip("> ").strip().removeprefix("|").removesuffix("|")
    return tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", inner))


def tables_of(path: Path) -> Iterator[Place]:
    """The tables of a Markdown file. Raises ConfigError for one in HTML."""
    lines, fenced, end = path.read_text("utf-8").split("\n"), False, 1
    for number, line in enumerate(lines):
        fenced ^= line.lstrip("> ").startswith("```")
        if not fenced and "<table" in line:
            raise ConfigError(f"{path}:{number + 1}: a table in HTML: write it in Markdown, below its marker")
        if not fenced and number >= end and "|" in line and RULE.fullmatch(line.lstrip("> ").rstrip()):
            start, end = number - 1, next((i for i in range(number, len(lines)) if not lines[i].strip()), len(lines))
            marker = MARKER.fullmatch(lines[start - 1]) if start else None
            yield Place(marker and marker[1], start, [*map(cells, lines[start:end])])


def records_of(path: Path) -> list[Record]:
    """A room's records. Raises ConfigError for a line that is none."""
    try:
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return [TypeAdapter(Record).validate_python(json.loads(line)) for line in lines]
    except ValueError as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}: remove it and collect its runs again") from error


def collected(folder: Path) -> list[Record]:
    """The records of a finished run of any program: its students' numbers, or its own. Raises ConfigError."""
    if not (folder / RESULT).exists():
        raise ConfigError(f"{folder}: no finished run (no {RESULT}): end it first")
    found: dict[str, dict[str, list[float]]] = {}

    def add(row: str, numbers: dict[str, Any]) -> None:
        if "classes" in numbers:  # of class-incremental learning
            numbers = {f"{numbers['classes']} classes": numbers["accuracy"]}
        for score, value in numbers.items():
            if isinstance(value, (int, float)):
                found.setdefault(row, {}).setdefault(score, []).append(round(float(value), 6))

    own = json.loads((folder / RESULT).read_text())
    files = sorted([*folder.glob("students/*.json"), *folder.glob(f"students/*/{RESULT}")])
    for file in files:
        of = OF_STUDENT.fullmatch(file.parent.name if file.name == RESULT else file.stem)
        if of:
            add(of[1], json.loads(file.read_text()))
    for row, value in [*own.items(), *([] if files else [("", own)])]:
        if isinstance(value, dict):
            add(row, value)
    run = "/".join(folder.resolve().parts[-4:])
    return [Record(run, row, values) for row, values in found.items()]


def collect(path: Path, folders: Sequence[Path]) -> None:
    """Put the runs' records into a results.jsonl, in place of those it has of them."""
    new = [record for folder in folders for record in collected(folder)]
    kept = [record for record in records_of(path) if record.run not in {r.run for r in new}]
    lines = sorted(json.dumps(record._asdict()) + "\n" for record in [*kept, *new])
    atomic_write(path, "".join(lines).encode())


def sample(records: Sequence[Record], runs: str, row: str, score: str) -> list[float]:
    """The numbers that a cell is of. Raises ConfigError where there is none."""
    found = [r.values.get(score, []) for r in records if fnmatchcase(r.run, runs) and r.row == row]
    if not any(found):
        raise ConfigError(f"no records of runs '{runs}', row '{row}', score '{score}'")
    return [value for values in found for value in values]


def by_seed(records: Sequence[Record], runs: str, row: str, score: str) -> dict[str, float]:
    """Seed -> the number of its run, as the run's name has the seed. Raises ConfigError for none, or two of a seed."""
    found: dict[str, Record] = {}
    for record in records:
        if fnmatchcase(record.run, runs) and (match := SEED.search(record.run)):
            if match[1] in found:
                raise ConfigError(f"two runs of one seed: {found[match[1]].run} and {record.run}: remove one's records")
            found[match[1]] = record
    if not found:
        raise ConfigError(f"no records of runs '{runs}' with a seed in their name")
    return {seed: sample([record], runs, row, score)[0] for seed, record in found.items()}


def cell(records: Sequence[Record], runs: str, row: str, column: Column) -> str:
    """Mean ± deviation, of one number no deviation; against another row ± standard error."""
    runs = runs.replace(column.instead[0], column.instead[1])
    if column.over:
        own, base = (by_seed(records, pattern, row, column.score) for pattern in (runs, column.over))
        if missing := own.keys() - base.keys():
            raise ConfigError(f"runs '{column.over}': none has seed {', '.join(sorted(missing))}, as '{runs}' has")
        return gain([*own.values()], [base[seed] for seed in own], column.digits)
    values = sample(records, runs, row, column.score)
    if column.against:
        return gain(values, sample(records, runs, column.against, column.score), column.digits)
    if column.of == "spread":
        return spread(values, column.digits)
    return str(len(values)) if column.of == "count" else f"{REDUCE[column.of](values):.{column.digits}f}"


def typed(value: float | list[float] | str | None, column: Column) -> str:
    """A recorded cell."""
    if value is None or isinstance(value, str):
        return value or ""
    first, *rest = [f"{v:.{column.digits}f}" for v in (value if isinstance(value, list) else [value])]
    return first + ("" if not rest else f" ± {rest[0]}" if len(rest) == 1 else f" [{rest[0]} - {rest[1]}]")


def numbers(table: Collected, row: Row, records: Sequence[Record]) -> Iterator[str]:
    """The cells of a row behind its words."""
    for place, column in enumerate(table.columns):
        runs = (row.runs[place] if isinstance(row.runs, list) else row.runs) or column.runs or table.runs
        names = row.row if isinstance(row.row, list) else [row.row]
        shown = row.given.get(column.title)
        yield ", ".join(cell(records, runs, n + column.row, column) for n in names) if shown is None else shown


def rendered(table: Collected | Recorded, records: Sequence[Record]) -> Lines:
    """The table from its numbers. Raises ConfigError."""
    before, width = len(table.words), len(table.words) + len(table.columns)
    if isinstance(table, Recorded):
        given = [[*map(str, row[:before]), *map(typed, row[before:], table.columns)] for row in table.rows]
    else:
        given = [[*row.words, *numbers(table, row, records)] for row in table.rows]
    lines = [(*line, *[""] * (width - len(line))) for line in given]
    header = (*table.words, *(column.title for column in table.columns))
    right = [
        i > 0 and (i >= before or all(not cell or is_number(cell) for cell in column))
        for i, column in enumerate(zip(*lines, strict=True))
    ]
    return [header, tuple("---:" if side else "---" for side in right), *lines]


def manifests(root: Path) -> dict[str, Lines]:
    """The table of every entry. Raises ConfigError for one that is wrong, or has no numbers."""
    found: dict[str, Lines] = {}
    for path in sorted(root.glob(f"*/{MANIFEST}")):
        try:
            tree = yaml.safe_load(path.read_text("utf-8"))
            entries = TypeAdapter(dict[str, Recorded | Collected]).validate_python(tree)
            again = [name for name in entries if name in found]
            if again:
                raise ConfigError(f"{again[0]}: another room has a table of this name")
            records = records_of(path.with_name(RECORDS))
            found |= {name: rendered(entry, records) for name, entry in entries.items()}
        except (ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: {error}") from error
    return found


def markdown(line: Sequence[str]) -> str:
    """A line of a table, a rule without spaces."""
    rule = all(re.fullmatch("-+:?", cell) for cell in line)
    return f"|{'|'.join(line)}|" if rule else "".join(f"| {cell} " if cell else "| " for cell in line) + "|"


def check(root: Path, write: bool = False) -> list[str]:
    """A line for every table that is not what its numbers say (`write` mends it) or has none, and unused entries."""
    found, complaints, used = manifests(root), list[str](), set[str]()
    for path in sorted([*root.glob("*.md"), *root.glob("[a-zA-Z]*/**/*.md")]):
        if not path.name.startswith(("README", "RESULTS")) or path.relative_to(root).parts[0] in OUTPUTS:
            continue
        text = (before := path.read_text("utf-8")).split("\n")
        for name, start, there in tables_of(path):
            where = f"{path.relative_to(root)}:{start + 1}"
            words = [word for line in there[2:] for word in line]
            results = path.name.startswith("RESULTS") or any("±" in word or is_number(word) for word in words)
            if name is None and results:
                complaints.append(f"{where}: a table of results without <!-- table: NAME --> above it")
            elif name is not None and name not in found:
                complaints.append(f"{where}: no {MANIFEST} has an entry {name}")
            elif name is not None:
                used.add(name)
                table = found[name]
                if path.name.count(".") > 1 and [*map(len, table)] == [*map(len, there)]:  # a translation
                    pairs = zip(table, there, strict=True)
                    table = [tuple(a if is_number(a) else b for a, b in zip(*pair, strict=True)) for pair in pairs]
                if write and len(table) == len(there):
                    text[start : start + len(there)] = map(markdown, table)
                elif table != there:
                    old, new = next(pair for pair in zip_longest(there, table, fillvalue=()) if pair[0] != pair[1])
                    complaints.append(f"{where}: {name}: '{markdown(old)}', but its numbers say '{markdown(new)}'")
        if before != "\n".join(text):
            atomic_write(path, "\n".join(text).encode())
    return [*complaints, *(f"{name}: no table has this marker" for name in sorted(found.keys() - used))]


def command_line() -> Parser:
    """Its options."""
    parser = Parser(__doc__)
    parser.add_argument("what", choices=("collect", "write", "check"), help="what to do")
    parser.add_argument(
        "paths", nargs="*", type=Path, metavar="PATH", help="with collect: a results.jsonl, then folders of runs"
    )
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Exit status."""
    given = command_line().parse_args(words)
    try:
        if given.what == "collect":
            if len(given.paths) < 2 or given.paths[0].suffix != ".jsonl":
                raise ConfigError(f"collect: expected a {RECORDS} and folders of runs")
            collect(given.paths[0], given.paths[1:])
            return 0
        complaints = check(REPOSITORY, given.what == "write")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    for line in complaints:
        print(line, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
