"""Readers agree with the published counts of the real data sets, and say in one line what is wrong with a file."""

import csv
import io
import json
import random
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from config import ConfigError
from utils.corpus import Corpus, Split
from utils.text_readers import read_corpus

Labels = list[str]


@pytest.fixture(scope="module")
def nltk(shared_data: Path) -> Corpus:
    return read_corpus("reuters", shared_data / "reuters", Path("unused"))


@pytest.fixture(scope="module")
def sgml(shared_data: Path) -> Corpus:
    return read_corpus("reuters", shared_data / "reuters" / "reuters21578.tar.xz", Path("unused"))


def read(folder: Path, files: dict[str, str | bytes], dataset: str = "mine") -> Corpus:
    """Corpus of these files, written to a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_corpus(dataset, folder, folder)


def both(content: str | bytes, end: str = "jsonl") -> dict[str, str | bytes]:
    """The same content as train and test."""
    return {f"train.{end}": content, f"test.{end}": content}


def names(corpus: Corpus, split: Split) -> list[set[str]]:
    """Class names of every document."""
    return [{corpus.classes[i] for i in own} for own in split.labels]


def test_reuters_has_the_published_counts(nltk: Corpus) -> None:
    assert (len(nltk.classes), len(nltk.train), nltk.val, len(nltk.test)) == (90, 7769, None, 3019)
    assert nltk.multilabel
    labels = nltk.train.labels + nltk.test.labels
    assert sum(map(len, labels)) / len(labels) == pytest.approx(1.235, abs=1e-3)
    sizes = Counter(nltk.classes[i] for own in nltk.train.labels for i in own)
    assert (sizes["earn"], sizes["acq"], sizes["wheat"]) == (2877, 1650, 212)
    assert sum(size == 1 for size in sizes.values()) == 7
    assert all(own == tuple(sorted(set(own))) for own in labels)


def test_reuters_sgml_is_the_same_corpus(nltk: Corpus, sgml: Corpus) -> None:
    assert sgml.classes == nltk.classes
    assert (len(sgml.train), len(sgml.test)) == (7770, 3019)

    def documents(split: Split) -> dict[str, tuple[int, ...]]:
        """Labels by text, without the agency's closing word, which NLTK's copy left out."""
        return {
            re.sub(r"\s*reuter$", "", text, flags=re.IGNORECASE): own
            for text, own in zip(split.texts, split.labels, strict=True)
        }

    for mine, theirs in ((sgml.train, nltk.train), (sgml.test, nltk.test)):
        ours, other = documents(mine), documents(theirs)
        shared = ours.keys() & other.keys()
        assert len(shared) > 0.85 * len(other)
        assert sum(ours[text] == other[text] for text in shared) > 0.999 * len(shared)
    assert not any("&lt;" in text or "\n" in text or "\x03" in text for text in sgml.train.texts)


@pytest.mark.parametrize("place", ["nltk_data", "nltk_data/corpora", "nltk_data/corpora/reuters.zip"])
def test_reuters_is_found_wherever_data_dir_points(place: str, shared_data: Path, nltk: Corpus) -> None:
    assert read_corpus("reuters", shared_data / "reuters" / place, Path("unused")) == nltk


def test_unpacked_reuters_equals_the_archives(tmp_path: Path, shared_data: Path, nltk: Corpus, sgml: Corpus) -> None:
    with zipfile.ZipFile(shared_data / "reuters/nltk_data/corpora/reuters.zip") as archive:
        archive.extractall(tmp_path / "nltk")
    with tarfile.open(shared_data / "reuters" / "reuters21578.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    release = next(tmp_path.rglob("reut2-000.sgm")).parent
    assert read_corpus("reuters", tmp_path / "nltk", tmp_path) == nltk
    assert read_corpus("reuters", tmp_path / "nltk" / "reuters", tmp_path) == nltk
    assert read_corpus("reuters", release, tmp_path) == sgml


def vector(labels: Labels, known: Labels) -> list[int]:
    return [int(name in labels) for name in known]


WRITTEN: dict[str, Callable[[Labels, Labels], str]] = {
    "json names": lambda labels, known: json.dumps(labels),
    "python names": lambda labels, known: repr(labels),
    "numpy names": lambda labels, known: repr(labels).replace(",", ""),
    "names with blanks": lambda labels, known: " ".join(labels),
    "names with commas": lambda labels, known: ", ".join(labels),
    "json ids": lambda labels, known: json.dumps([known.index(name) for name in labels]),
    "json vector": lambda labels, known: json.dumps(vector(labels, known)),
    "float vector": lambda labels, known: json.dumps([float(v) for v in vector(labels, known)]),
    "numpy vector": lambda labels, known: repr(vector(labels, known)).replace(",", ""),
    "numpy float vector": lambda labels, known: "[" + " ".join(f"{v}." for v in vector(labels, known)) + "]",
}


@pytest.mark.parametrize("form", WRITTEN)
def test_reuters_csv_gives_back_what_was_written(form: str, tmp_path: Path, nltk: Corpus) -> None:
    own = names(nltk, nltk.train)[:60]
    known = sorted(set[str]().union(*own))
    parts = {"training_data": range(60), "val_data": range(20, 30), "test_data": range(30, 60)}
    for part, which in parts.items():
        with (tmp_path / f"{part}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence", "labels"])
            writer.writerows([nltk.train.texts[i], WRITTEN[form](sorted(own[i]), known)] for i in which)
    corpus = read_corpus("reuters", tmp_path, tmp_path)
    numbered = "ids" in form or "vector" in form
    assert corpus.classes == (tuple(f"class_{i}" for i in range(len(known))) if numbered else tuple(known))
    assert corpus.multilabel
    assert corpus.val is not None
    for split, which in zip((corpus.train, corpus.val, corpus.test), parts.values(), strict=True):
        assert split.texts == [nltk.train.texts[i] for i in which]
        assert [{known[c] for c in row} for row in split.labels] == [own[i] for i in which]


def test_vectors_of_two_classes_are_not_ids(tmp_path: Path) -> None:
    rows = 'sentence,labels\na,"[1, 0]"\nb,"[0, 1]"\n'
    corpus = read(tmp_path, {"training_data.csv": rows, "test_data.csv": rows}, "reuters")
    assert corpus.train.labels == [(0,), (1,)]


@pytest.mark.parametrize(
    "dataset,sizes,classes",
    [
        ("ag_news", (12000, None, 7600), ("World", "Sports", "Business", "Sci/Tech")),
        ("sst2", (67349, 872, 1821), ("negative", "positive")),
        ("trec", (5452, None, 500), ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")),
    ],
)
def test_single_label_sets_have_the_published_counts(
    dataset: str, sizes: tuple[int | None, ...], classes: tuple[str, ...], shared_data: Path
) -> None:
    corpus = read_corpus(dataset, shared_data / dataset, Path("unused"))
    parts = (corpus.train, corpus.val, corpus.test)
    assert tuple(None if part is None else len(part) for part in parts) == sizes
    assert corpus.classes == classes
    assert not corpus.multilabel
    assert all(len(own) == 1 for part in parts if part for own in part.labels)


def test_known_rows_carry_their_labels(shared_data: Path) -> None:
    trec = read_corpus("trec", shared_data / "trec", Path("unused"))
    assert trec.test.texts[0] == "How far is it from Denver to Aspen ?"
    assert names(trec, trec.test)[0] == {"NUM"}
    sst2 = read_corpus("sst2", shared_data / "sst2" / "SST-2", Path("unused"))
    assert sst2.train.texts[1] == "contains no wit , only labored gags"
    assert names(sst2, sst2.train)[1] == {"negative"}
    news = read_corpus("ag_news", shared_data / "ag_news", Path("unused"))
    assert news.test.texts[0].startswith("Fears for T N pension after talks Unions representing")
    assert names(news, news.test)[0] == {"Business"}


def test_own_jsonl_takes_names_ids_and_lists(tmp_path: Path) -> None:
    corpus = read(
        tmp_path,
        both('{"text": "a\u2028b", "label": "x y"}\n\n{"sentence": "c", "label": 10}\n{"text": "d", "label": 9}'),
    )
    assert corpus.classes == ("class_9", "class_10", "x y")
    assert (corpus.train.texts, corpus.train.labels) == (["a\u2028b", "c", "d"], [(2,), (1,), (0,)])
    assert (corpus.multilabel, corpus.val) == (False, None)
    rows = '{"text": "a", "labels": ["x", "y"]}\n{"text": "b", "labels": ["y"]}'
    corpus = read(tmp_path / "lists", {**both(rows, "json"), "val.json": rows})
    assert (corpus.train.labels, corpus.multilabel) == ([(0, 1), (1,)], True)
    assert corpus.val == corpus.train


def test_own_csv_takes_names_with_blanks_and_several_labels(tmp_path: Path) -> None:
    corpus = read(tmp_path, both(b'\xef\xbb\xbftext,label\n"a, b",New York\nc,Rome\n', "csv"))
    assert (corpus.classes, corpus.train.texts, corpus.multilabel) == (("New York", "Rome"), ["a, b", "c"], False)
    corpus = read(tmp_path / "s", both('labels,text\nNew York; Rome,a\n"[""New York""]",b\n', "csv"))
    assert (corpus.classes, corpus.train.labels, corpus.multilabel) == (("New York", "Rome"), [(0, 1), (0,)], True)


def tables(rows: str) -> dict[str, str | bytes]:
    """The same rows as Reuters training and test table."""
    return {f"{part}_data.csv": f"sentence,labels\n{rows}\n" for part in ("training", "test")}


def damaged_archive() -> bytes:
    """A compressed archive with a hole in the middle of its one file."""
    whole, member = io.BytesIO(), tarfile.TarInfo("reut2-000.sgm")
    member.size = 100_000
    with tarfile.open(fileobj=whole, mode="w:xz") as archive:
        archive.addfile(member, io.BytesIO(random.Random(0).randbytes(member.size)))
    return whole.getvalue()[:50_000] + bytes(400) + whole.getvalue()[50_400:]


GOOD = '{"text": "a", "label": "x"}\n'
BROKEN: dict[str, tuple[str, dict[str, str | bytes], str]] = {
    "no test": ("mine", {"train.jsonl": GOOD}, r"folder: no test.jsonl or test.csv"),
    "no train": ("mine", {"test.jsonl": GOOD}, r"folder: no train.jsonl or train.csv"),
    "unknown class": ("mine", {"train.jsonl": GOOD, "test.jsonl": '{"text":"b","label":"z"}'}, r"test.jsonl:1.*'z'"),
    "no label": ("mine", both(GOOD + '{"text": "b", "labels": []}'), r"train.jsonl:2.*without a label"),
    "null label": ("mine", both('{"text": "b", "label": null}'), r"train.jsonl:1.*None"),
    "not a number": ("mine", both('{"text": "b", "label": NaN}'), r"train.jsonl:1.*nan"),
    "nested label": ("mine", both('{"text": "b", "label": [["x"]]}'), r"train.jsonl:1.*\['x'\]"),
    "text missing": ("mine", both('{"label": "x"}'), r"train.jsonl:1"),
    "text not a string": ("mine", both('{"text": null, "label": "x"}'), r"train.jsonl:1.*None"),
    "not json": ("mine", both(GOOD + "{"), r"train.jsonl:2"),
    "not utf-8": ("mine", both(b"\xff\xfe"), r"train.jsonl: cannot be read as utf-8"),
    "no documents": ("mine", {"train.jsonl": GOOD, "test.jsonl": ""}, r"folder: no documents in the test part"),
    "no columns": ("mine", both("a,b\n1,2\n", "csv"), r"train.csv:1.*'a', 'b'"),
    "short row": ("mine", both("text,label\na\n", "csv"), r"train.csv:2: 1 cells"),
    "giant cell": ("mine", both("text,label\n" + "a" * 200_000 + ",x\n", "csv"), r"train.csv:2.*limit"),
    "code in a cell": ("reuters", tables('a,"[__import__(1)]"'), r"training_data.csv:2"),
    "string in brackets": ("reuters", tables("a,('abc')"), r"training_data.csv:2"),
    "deep cell": ("reuters", tables(f"a,{'[' * 90_000}"), r"training_data.csv:2"),
    "vectors of two lengths": ("reuters", tables('a,"[0,1,1]"\nb,"[0,1,0,0]"'), r"training_data.csv:2.*one length"),
    "vector of zeros": ("reuters", tables('a,"[1,1]"\nb,"[0,0]"'), r"training_data.csv:3.*without a label"),
    "empty class": ("reuters", tables('a,"[1,0,1]"\nb,"[0,0,1]"'), r"folder: class 'class_1'"),
    "no test table": ("reuters", {"training_data.csv": "sentence,labels\na,x\n"}, r"folder: no test_data.csv"),
    "no reuters": ("reuters", {"other.txt": ""}, r"folder: no Reuters data"),
    "document missing": ("reuters", {"cats.txt": "training/1 a\n"}, r"folder/training/1: missing"),
    "path in cats": ("reuters", {"cats.txt": "training/../../x a\n"}, r"cats.txt:1"),
    "broken zip": ("reuters", {"reuters.zip": b"PK"}, r"reuters.zip"),
    "broken archive": ("reuters", {"reuters21578.tar.xz": damaged_archive()}, r"reuters21578.tar.xz"),
    "no topic": ("reuters", {"reut2-000.sgm": "<REUTERS></REUTERS>"}, r"folder: no documents in the train part"),
    "news class 12": ("ag_news", both('"12","a","b"\n', "csv"), r"train.csv:1"),
    "news class empty": ("ag_news", both('"","a","b"\n', "csv"), r"train.csv:1"),
    "no news": ("ag_news", {"train.csv": '"1","a","b"\n'}, r"folder: no test.csv"),
    "review without label": ("sst2", both("sentence\tlabel\na\t1\n0\tb c\n", "tsv"), r"train.tsv:3"),
    "question without label": ("trec", {"train_5500.label": "Who ?\n", "TREC_10.label": ""}, r"train_5500.label:1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said_in_one_line_with_its_place(case: str, tmp_path: Path) -> None:
    dataset, files, message = BROKEN[case]
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path / "folder", files, dataset)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("dataset", ["reuters", "ag_news", "sst2", "trec", "mine"])
def test_missing_folder_is_named(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="required"):
        read_corpus(dataset, None, tmp_path)
    with pytest.raises(ConfigError, match="absent does not exist"):
        read_corpus(dataset, tmp_path / "absent", tmp_path)
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        read_corpus(dataset, tmp_path, tmp_path)
