"""Readers of text data sets in the layouts that people have them in."""

import ast
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from config import ConfigError
from utils.corpus import Corpus, Split
from utils.docstring_corpus import docstring_corpus
from utils.reuters import read_reuters_release

Labelled = tuple[str, str, Sequence[str]]  # place, text, label names
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
    readers: dict[str, Callable[[str, Path], Corpus]] = {
        "reuters": read_reuters, "ag_news": read_ag_news, "sst2": read_sst2, "trec": read_trec,
    }  # fmt: skip
    corpus = readers.get(dataset, read_own)(dataset, data_dir)
    seen = {label for own in corpus.train.labels for label in own}
    empty = [name for i, name in enumerate(corpus.classes) if i not in seen]
    if empty:
        raise ConfigError(f"{data_dir}: class {empty[0]!r} has no training document: remove it or add documents")
    return corpus


def make_corpus(
    name: str,
    parts: dict[str, Iterable[Labelled]],
    multilabel: bool | None = None,
    classes: Sequence[str] = (),
) -> Corpus:
    """Corpus of named parts; class names are those of train, sorted, unless given. Raises ConfigError, naming the row."""
    rows = {part: list(found) for part, found in parts.items()}
    names = tuple(classes) or tuple(sorted({label for _, _, labels in rows["train"] for label in labels}))
    ids = {label: i for i, label in enumerate(names)}
    splits = {}
    for part, found in rows.items():
        for place, _, labels in found:
            unknown = [label for label in labels if label not in ids]
            if unknown:
                raise ConfigError(f"{place}: class {unknown[0]!r} does not occur in train")
            if not labels:
                raise ConfigError(f"{place}: document without a label: remove the row")
        splits[part] = Split(
            [text for _, text, _ in found], [tuple(sorted({ids[x] for x in own})) for _, _, own in found]
        )
    if multilabel is None:
        multilabel = any(len(own) > 1 for split in splits.values() for own in split.labels)
    return Corpus(name, names, splits["train"], splits.get("val"), splits["test"], multilabel)


def find_file(folder: Path, *names: str) -> Path:
    """The first file of these names in the folder or below it. Raises ConfigError."""
    for name in names:
        for path in (folder / name, *sorted(folder.glob(f"*/{name}"))):
            if path.is_file():
                return path
    raise ConfigError(f"{folder}: no {' or '.join(names)} in it or in a folder below it")


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """A file's text. Raises ConfigError."""
    try:
        return path.read_text(encoding)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as {encoding} text ({error})") from error


def csv_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(place, cells) of every record of a CSV file."""
    reader = csv.reader(io.StringIO(read_text(path)))
    for cells in reader:
        if cells:
            yield f"{path}:{reader.line_num}", cells


def read_reuters(name: str, folder: Path) -> Corpus:
    """Reuters ApteMod-90: the CSV layout, NLTK's zip or folder, or the SGML files."""
    if folder.is_dir() and (folder / "training_data.csv").exists():
        files = {"train": "training_data.csv", "val": "val_data.csv", "test": "test_data.csv"}
        found = {part: folder / file for part, file in files.items() if (folder / file).exists()}
        if "test" not in found:
            raise ConfigError(f"{folder}: no test_data.csv beside training_data.csv")
        return make_corpus(name, {part: table_rows(path, "sentence") for part, path in found.items()}, multilabel=True)
    train, test = read_reuters_release(folder)
    return make_corpus(name, {"train": train, "test": test}, multilabel=True)


def table_rows(path: Path, text_column: str = "text") -> Iterator[Labelled]:
    """Rows of a CSV file with a text (or sentence) and a label(s) column."""
    rows = csv_rows(path)
    _, header = next(rows, ("", []))
    columns = {word.strip().lower(): i for i, word in enumerate(header)}
    text = columns.get(text_column, columns.get("text", columns.get("sentence")))
    label = columns.get("labels", columns.get("label"))
    if text is None or label is None:
        raise ConfigError(f"{path}:1: columns {header}; a {text_column} and a labels column are needed")
    for place, cells in rows:
        if len(cells) != len(header):
            raise ConfigError(f"{place}: {len(cells)} cells, the header has {len(header)}")
        yield place, cells[text], label_names(cells[label], place)


def label_names(cell: str, place: str) -> list[str]:
    """Names in a cell: a list of names or ids, a 0/1 vector, or names between `;`. Nothing in it is executed."""
    cell = cell.strip()
    if not cell.startswith(("[", "(")):
        return [word.strip() for word in cell.split(";") if word.strip()]
    try:
        values = ast.literal_eval(cell if "," in cell else ", ".join(cell.split()))
    except (ValueError, SyntaxError) as error:
        raise ConfigError(f"{place}: labels {cell[:60]!r} are not a list") from error
    return names_of(values)


def names_of(values: object) -> list[str]:
    """Class names of a label, a list of labels, or a 0/1 vector (longer than two, nothing else in it)."""
    if not isinstance(values, (list, tuple)):
        return [class_name(values)]
    if len(values) > 2 and all(v in (0, 1) and not isinstance(v, str) for v in values):
        return [class_name(i) for i, v in enumerate(values) if v]
    return [class_name(v) for v in values]


def class_name(value: object) -> str:
    """`class_007` for a number, so that names sort as numbers do; else the text."""
    return f"class_{int(value):03d}" if isinstance(value, (int, float)) else str(value)


def read_ag_news(name: str, folder: Path) -> Corpus:
    """AG News: class (1 to 4), title, description."""

    def rows(path: Path) -> Iterator[Labelled]:
        for place, cells in csv_rows(path):
            if len(cells) != 3 or cells[0] not in "1234":
                raise ConfigError(f"{place}: expected class 1 to 4, title, description")
            yield place, f"{cells[1]} {cells[2]}", [AG_NEWS[int(cells[0]) - 1]]

    return make_corpus(
        name, {part: rows(find_file(folder, f"{part}.csv")) for part in ("train", "test")}, False, AG_NEWS
    )


def read_sst2(name: str, folder: Path) -> Corpus:
    """SST-2: sentence and label between tabs; dev is the validation part."""

    def rows(path: Path) -> Iterator[Labelled]:
        for number, line in enumerate(read_text(path).splitlines(), 1):
            text, _, label = line.rpartition("\t")
            if number == 1 and label.strip() == "label":
                continue
            if label.strip() not in ("0", "1"):
                raise ConfigError(f"{path}:{number}: expected a sentence, a tab and 0 or 1")
            yield f"{path}:{number}", text.strip(), [("negative", "positive")[int(label)]]

    files = {"train": "train.tsv", "val": "dev.tsv", "test": "test.tsv"}
    return make_corpus(name, {part: rows(find_file(folder, file)) for part, file in files.items()}, False)


def read_trec(name: str, folder: Path) -> Corpus:
    """TREC questions, the six coarse classes."""

    def rows(path: Path) -> Iterator[Labelled]:
        for number, line in enumerate(read_text(path, "latin-1").splitlines(), 1):
            label, _, text = line.partition(" ")
            if ":" not in label:
                raise ConfigError(f"{path}:{number}: expected CLASS:subclass question")
            yield f"{path}:{number}", text, [label.split(":")[0]]

    files = {"train": "train_5500.label", "test": "TREC_10.label"}
    return make_corpus(name, {part: rows(find_file(folder, file)) for part, file in files.items()}, False)


def read_own(name: str, folder: Path) -> Corpus:
    """The user's files train, test and perhaps val, as .jsonl, .json (a record a line) or .csv."""
    parts: dict[str, Iterable[Labelled]] = {}
    for part in ("train", "val", "test"):
        found = [folder / f"{part}{end}" for end in (".jsonl", ".json", ".csv") if (folder / f"{part}{end}").is_file()]
        if found:
            parts[part] = table_rows(found[0]) if found[0].suffix == ".csv" else json_rows(found[0])
        elif part != "val":
            raise ConfigError(f"{folder}: no {part}.jsonl or {part}.csv; dataset {name} is not a built-in one")
    return make_corpus(name, parts)


def json_rows(path: Path) -> Iterator[Labelled]:
    """Records with text (or sentence) and label or labels."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text = record["text"] if "text" in record else record["sentence"]
            labels = record["labels"] if "labels" in record else record["label"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}:{number}: not a record with text and label(s): {error}") from error
        yield f"{path}:{number}", str(text), names_of(labels)
