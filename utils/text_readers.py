"""Readers of text data sets in the layouts that people have them in."""

import ast
import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from config import ConfigError
from utils.corpus import Corpus, Split
from utils.docstring_corpus import docstring_corpus
from utils.reuters import read_reuters_release

Labelled = tuple[str, str, Sequence[str]]  # place, text, label names
Raw = tuple[str, str, object]  # place, text, label or labels as the file has them
AG_NEWS = ("World", "Sports", "Business", "Sci/Tech")


def read_corpus(dataset: str, data_dir: Path | None, cache_dir: Path) -> Corpus:
    """The named corpus: docstrings, reuters, ag_news, sst2, trec, or the user's own files. Raises ConfigError."""
    if dataset == "docstrings":
        return docstring_corpus(cache_dir)
    if data_dir is None:
        raise ConfigError(f"dataset.data_dir: required for dataset {dataset}; name the folder with its files")
    if not data_dir.exists():
        raise ConfigError(
            f"dataset.data_dir: {data_dir} does not exist: put the {dataset} data there or name its folder"
        )
    corpus = READERS.get(dataset, read_own)(dataset, data_dir)
    for part, split in (("train", corpus.train), ("val", corpus.val), ("test", corpus.test)):
        if split is not None and not split.texts:
            raise ConfigError(f"{data_dir}: no documents in the {part} part of {dataset}: add some")
    seen = {label for own in corpus.train.labels for label in own}
    empty = [name for i, name in enumerate(corpus.classes) if i not in seen]
    if empty:
        raise ConfigError(f"{data_dir}: class {empty[0]!r} has no training document: remove it or add documents")
    return corpus


def make_corpus(
    name: str,
    parts: Mapping[str, Iterable[Labelled]],
    multilabel: bool,
    classes: Sequence[str] = (),
) -> Corpus:
    """Corpus of named parts; classes are those of train, sorted, unless given. Raises ConfigError, naming the row."""
    rows = {part: list(found) for part, found in parts.items()}
    names = tuple(classes) or tuple(sorted({label for _, _, labels in rows["train"] for label in labels}))
    ids = {label: i for i, label in enumerate(names)}
    splits = {}
    for part, found in rows.items():
        for place, _, labels in found:
            unknown = [label for label in labels if label not in ids]
            if unknown:
                raise ConfigError(f"{place}: class {unknown[0]!r} does not occur in train: mend or remove the row")
            if not labels:
                raise ConfigError(f"{place}: document without a label: remove the row")
        splits[part] = Split(
            [text for _, text, _ in found], [tuple(sorted({ids[x] for x in own})) for _, _, own in found]
        )
    return Corpus(name, names, splits["train"], splits.get("val"), splits["test"], multilabel)


def from_values(name: str, parts: dict[str, Iterable[Raw]], multilabel: bool = False) -> Corpus:
    """Corpus of rows labelled by names, ids, or 0/1 vectors (if every row of every part has one of equal length).

    A list in any row makes it multi-label. Raises ConfigError, naming the row.
    """
    rows = {part: list(found) for part, found in parts.items()}
    multilabel = multilabel or any(isinstance(value, list) for found in rows.values() for _, _, value in found)
    plain = {part: [plain_values(place, value) for place, _, value in found] for part, found in rows.items()}
    every = [values for found in plain.values() for values in found]
    width = len(every[0]) if every else 0
    if width > 1 and all(len(values) == width and set(values) <= {0, 1} for values in every):
        keys: list[int | str] = list(range(width))
        plain = {part: [[i for i in keys if v[int(i)]] for v in found] for part, found in plain.items()}
    else:
        keys = sorted({v for own in plain["train"] for v in own}, key=lambda v: (isinstance(v, str), v))
    named: dict[str, list[Labelled]] = {part: [] for part in rows}
    for part, found in rows.items():
        for (place, text, _), own in zip(found, plain[part], strict=True):
            if len(set(own)) < len(own):  # 0/1 vectors of unequal length end here
                raise ConfigError(f"{place}: a label occurs twice: give each once, or 0/1 vectors of one length")
            named[part].append((place, text, [class_name(v) for v in own]))
    return make_corpus(name, named, multilabel, [class_name(v) for v in keys])


def plain_values(place: str, value: object) -> list[int | str]:
    """A label or a list of them as names and ids from 0. Raises ConfigError for anything else."""
    values: list[int | str] = []
    for v in value if isinstance(value, list) else [value]:
        if isinstance(v, str) and v.strip():
            values.append(v.strip())
        elif (isinstance(v, int) or (isinstance(v, float) and v.is_integer())) and v >= 0:
            values.append(int(v))
        else:
            raise ConfigError(f"{place}: label {repr(v)[:60]} is neither a name nor a whole number from 0: mend it")
    return values


def class_name(value: int | str) -> str:
    """`class_7` for the id 7, a name as it is."""
    return f"class_{value}" if isinstance(value, int) else value


def part_files(folder: Path, files: dict[str, str], below: str) -> dict[str, Path]:
    """Paths of a data set's parts, in the folder or the usual one below it; only val may be absent."""
    place = folder / below if (folder / below / files["train"]).is_file() else folder
    found = {part: place / file for part, file in files.items() if (place / file).is_file()}
    for part in ("train", "test"):
        if part not in found:
            raise ConfigError(f"{place}: no {files[part]}: put it there or name its folder in dataset.data_dir")
    return found


def read_text(path: Path, encoding: str = "utf-8-sig") -> str:
    """A file's text. Raises ConfigError."""
    try:
        return path.read_text(encoding)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as {encoding} text ({error}): save it in that encoding") from error


def lines_of(path: Path, encoding: str = "utf-8-sig") -> Iterator[tuple[str, str]]:
    """(place, line) of the lines that hold something; only a newline ends one, as JSON may hold other breaks."""
    for number, line in enumerate(read_text(path, encoding).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def csv_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(place, cells) of every record of a CSV file. Raises ConfigError."""
    reader = csv.reader(io.StringIO(read_text(path)))
    try:
        for cells in reader:
            if cells:
                yield f"{path}:{reader.line_num}", cells
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: {error}: mend the quotes, or use .jsonl") from error


def read_reuters(name: str, folder: Path) -> Corpus:
    """Reuters ApteMod-90: the CSV layout, NLTK's zip or folder, or the SGML files."""
    if (folder / "training_data.csv").is_file():
        files = {"train": "training_data.csv", "val": "val_data.csv", "test": "test_data.csv"}
        found = part_files(folder, files, ".")
        return from_values(name, {part: table_rows(path, r"[\s,;]+") for part, path in found.items()}, multilabel=True)
    train, test = read_reuters_release(folder)
    return make_corpus(name, {"train": train, "test": test}, multilabel=True)


def table_rows(path: Path, separator: str) -> Iterator[Raw]:
    """Rows of a CSV file with a text (or sentence) and a label(s) column. Raises ConfigError."""
    rows = csv_rows(path)
    _, header = next(rows, ("", []))
    columns = {word.strip().lower(): i for i, word in enumerate(header)}
    text = columns.get("text", columns.get("sentence"))
    label = columns.get("labels", columns.get("label"))
    if text is None or label is None:
        raise ConfigError(f"{path}:1: columns {header}: name one text or sentence, and one label or labels")
    for place, cells in rows:
        if len(cells) != len(header):
            raise ConfigError(f"{place}: {len(cells)} cells, the header has {len(header)}: quote cells with commas")
        yield place, cells[text], cell_labels(cells[label].strip(), place, separator)


def cell_labels(cell: str, place: str, separator: str) -> object:
    """A cell's label, or list of labels: JSON, a Python literal, a printed array or plain names; never executed."""
    if not cell.startswith(("[", "(", "{")):
        words = [word.strip() for word in re.split(separator, cell) if word.strip()]
        values = [int(word) if re.fullmatch("[0-9]{1,9}", word) else word for word in words]
        return values[0] if len(values) == 1 else values
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(cell)
    if "," not in cell:  # an array as numpy prints it: [0 1 0], ['a' 'b']
        gap = r"(?<=['\"])\s+(?=['\"])" if "'" in cell or '"' in cell else r"(?<=[\d.])\s+(?=\d)"
        cell = re.sub(gap, ",", cell)
    parsed: object = None
    with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        parsed = ast.literal_eval(cell)
    if not isinstance(parsed, (list, tuple)):
        raise ConfigError(f'{place}: labels {cell[:60]!r} are not a list: write them as ["a", "b"]')
    return list(parsed)


def read_ag_news(name: str, folder: Path) -> Corpus:
    """AG News: class (1 to 4), title, description."""

    def rows(path: Path) -> Iterator[Labelled]:
        for place, cells in csv_rows(path):
            if len(cells) != 3 or cells[0] not in ("1", "2", "3", "4"):
                raise ConfigError(f"{place}: expected class 1 to 4, title, description: mend or remove the row")
            yield place, f"{cells[1]} {cells[2]}", [AG_NEWS[int(cells[0]) - 1]]

    files = part_files(folder, {"train": "train.csv", "test": "test.csv"}, "ag_news_csv")
    return make_corpus(name, {part: rows(path) for part, path in files.items()}, False, AG_NEWS)


def read_sst2(name: str, folder: Path) -> Corpus:
    """SST-2: sentence and label between tabs; dev, if there, is the validation part."""

    def rows(path: Path) -> Iterator[Labelled]:
        for place, line in lines_of(path):
            text, _, label = (word.strip() for word in line.rpartition("\t"))
            if (text, label) == ("sentence", "label"):
                continue
            if label not in ("0", "1"):
                raise ConfigError(f"{place}: expected a sentence, a tab and 0 or 1: use a file with labels")
            yield place, text, [("negative", "positive")[int(label)]]

    files = part_files(folder, {"train": "train.tsv", "val": "dev.tsv", "test": "test.tsv"}, "SST-2")
    return make_corpus(name, {part: rows(path) for part, path in files.items()}, False)


def read_trec(name: str, folder: Path) -> Corpus:
    """TREC questions, the six coarse classes."""

    def rows(path: Path) -> Iterator[Labelled]:
        for place, line in lines_of(path, "latin-1"):
            label, _, text = line.strip().partition(" ")
            if ":" not in label:
                raise ConfigError(f"{place}: expected CLASS:subclass question: mend or remove the row")
            yield place, text, [label.split(":")[0]]

    files = part_files(folder, {"train": "train_5500.label", "test": "TREC_10.label"}, "trec")
    return make_corpus(name, {part: rows(path) for part, path in files.items()}, False)


def read_own(name: str, folder: Path) -> Corpus:
    """The user's files train, test and perhaps val, as .jsonl, .json (a record a line) or .csv."""
    parts: dict[str, Iterable[Raw]] = {}
    for part in ("train", "val", "test"):
        found = [folder / f"{part}{end}" for end in (".jsonl", ".json", ".csv") if (folder / f"{part}{end}").is_file()]
        if found:
            parts[part] = table_rows(found[0], ";") if found[0].suffix == ".csv" else json_rows(found[0])
        elif part != "val":
            raise ConfigError(
                f"{folder}: no {part}.jsonl or {part}.csv: add it, or set dataset.dataset to docstrings, "
                f"{', '.join(READERS)} (now {name}, read as your own files)"
            )
    return from_values(name, parts)


def json_rows(path: Path) -> Iterator[Raw]:
    """Records with text (or sentence) and label or labels. Raises ConfigError."""
    for place, line in lines_of(path):
        try:
            record = json.loads(line)
            text = record["text"] if "text" in record else record["sentence"]
            labels = record["labels"] if "labels" in record else record["label"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"{place}: not a record with text and label(s) ({error}): mend the row") from error
        if not isinstance(text, str):
            raise ConfigError(f"{place}: text {repr(text)[:60]} is not a string: mend or remove the row")
        yield place, text, labels


READERS: dict[str, Callable[[str, Path], Corpus]] = {
    "reuters": read_reuters, "ag_news": read_ag_news, "sst2": read_sst2, "trec": read_trec,
}  # fmt: skip
