"""A validation part keeps the classes' shares; the built-in corpus is what the installed packages say."""

import json
import logging
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from config import ConfigError
from utils import docstring_corpus as module
from utils.corpus import Corpus, Split, stratified_split, with_validation
from utils.docstring_corpus import docstring_corpus
from utils.streams import generator

TINY = Corpus("docstrings", ("a", "b"), Split(["x", "y"], [(0,), (0, 1)]), None, Split(["z"], [(1,)]), True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def docs(cache: Path) -> Corpus:
    return docstring_corpus(cache)


def skewed_labels(count: int = 2000) -> list[tuple[int, ...]]:
    """Multi-label documents of 16 classes, from half of the documents down to one."""
    share = 0.5 ** np.arange(1, 17)
    drawn = np.random.default_rng(0).random((count, 16)) < share
    drawn[np.arange(16), np.arange(16)] = True  # every class occurs
    drawn[~drawn.any(1), 0] = True
    return [tuple(np.flatnonzero(row).tolist()) for row in drawn]


def counts(labels: list[tuple[int, ...]]) -> Counter[int]:
    return Counter(label for own in labels for label in own)


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_stratified_split_keeps_the_share_of_every_class(fraction: float) -> None:
    labels = skewed_labels()
    kept, held = stratified_split(labels, fraction, generator(0, "test"))
    assert sorted(kept + held) == list(range(len(labels)))
    whole, part = counts(labels), counts([labels[i] for i in held])
    assert all(abs(part[c] - fraction * n) <= 1 for c, n in whole.items())
    assert abs(len(held) / len(labels) - fraction) < 0.01


@pytest.mark.parametrize("fraction", [0.1, 0.49])
def test_stratified_split_leaves_every_class_a_training_document(fraction: float) -> None:
    labels = [*skewed_labels(100), (16,), (17, 0), (18, 19), (18,), (19,)]
    kept, _ = stratified_split(labels, fraction, generator(1, "test"))
    assert counts([labels[i] for i in kept]).keys() == counts(labels).keys()


def test_stratified_split_depends_on_the_stream_only() -> None:
    labels = skewed_labels(300)
    one, again, other = (stratified_split(labels, 0.2, generator(seed, "test")) for seed in (0, 0, 1))
    assert one == again
    assert one != other


def test_validation_is_cut_from_train_only_where_it_is_missing() -> None:
    labels = skewed_labels(200)
    texts = [f"document {i}" for i in range(200)]
    corpus = Corpus("c", tuple("abcdefghijklmnop"), Split(texts, labels), None, Split(["t"], [(0,)]), True)
    full = with_validation(corpus, 0.1, seed=3)
    assert full.val is not None
    assert sorted(full.train.texts + full.val.texts) == sorted(texts)
    of = dict(zip(texts, labels, strict=True))
    assert [of[text] for text in full.val.texts] == full.val.labels
    assert (full.test, full.classes) == (corpus.test, corpus.classes)
    assert with_validation(full, 0.4, seed=9) is full


def test_fingerprint_changes_with_texts_labels_classes_and_parts() -> None:
    variants = [
        TINY,
        Corpus("docstrings", ("a", "c"), TINY.train, None, TINY.test, True),
        Corpus("docstrings", TINY.classes, Split(["x", "Y"], TINY.train.labels), None, TINY.test, True),
        Corpus("docstrings", TINY.classes, Split(["x", "y"], [(0,), (1,)]), None, TINY.test, True),
        Corpus("docstrings", TINY.classes, TINY.train, TINY.test, TINY.test, True),
        Corpus("docstrings", TINY.classes, TINY.train, Split([], []), TINY.test, True),
    ]
    prints = {corpus.fingerprint for corpus in variants}
    assert len(prints) == len(variants)
    assert all(re.fullmatch("[0-9a-f]{16}", value) for value in prints)
    assert Corpus("other name", TINY.classes, TINY.train, None, TINY.test, True).fingerprint == TINY.fingerprint


def test_docstrings_have_20_labels_and_about_3100_documents(docs: Corpus) -> None:
    assert len(docs.classes) == 20
    assert 2900 < len(docs.train) + len(docs.test) < 3300
    assert len(docs.test) / (len(docs.train) + len(docs.test)) == pytest.approx(0.2, abs=0.02)
    sizes = counts(docs.train.labels + docs.test.labels)
    fine = [sizes[i] for i, name in enumerate(docs.classes) if "." in name]
    assert len(fine) == 14
    assert min(fine) > 100
    assert max(fine) <= module.CAP + 10  # merged duplicates come on top


def test_every_docstring_is_labelled_with_a_package_and_a_subpackage_of_it(docs: Corpus) -> None:
    for own in docs.train.labels + docs.test.labels:
        names = {docs.classes[i] for i in own}
        packages = {name for name in names if "." not in name}
        assert packages == {name.split(".")[0] for name in names - packages}


def test_no_docstring_names_a_label(docs: Corpus) -> None:
    for text in docs.train.texts + docs.test.texts:
        assert not [name for name in (*docs.classes, "pytorch", "pyplot") if name in text.lower()], text
        assert not re.search(r"\b(np|nx|plt|mpl)\b", text, re.IGNORECASE), text


def test_no_two_docstrings_begin_alike(docs: Corpus) -> None:
    starts = [" ".join(text.split()[:10]) for text in docs.train.texts + docs.test.texts]
    assert len(starts) == len(set(starts))
    assert min(len(text.split()) for text in docs.train.texts + docs.test.texts) >= module.MIN_WORDS


def test_docstrings_are_those_that_the_running_package_shows(docs: Corpus) -> None:
    shown = " ".join(str(np.ma.masked_where.__doc__).split("Parameters")[0].split())
    found = [i for i, text in enumerate(docs.train.texts + docs.test.texts) if text.startswith(shown)]
    assert len(found) == 1
    names = {docs.classes[i] for i in (docs.train.labels + docs.test.labels)[found[0]]}
    assert names == {"numpy", "numpy.ma"}


def test_second_call_reads_the_cache_silently(
    docs: Corpus, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "build", lambda: pytest.fail("built again"))
    assert docstring_corpus(cache) == docs
    assert capfd.readouterr() == ("", "")


def test_docstrings_are_the_same_whenever_they_are_built(docs: Corpus, tmp_path: Path) -> None:
    assert docstring_corpus(tmp_path) == docs


def tampered(content: bytes, kind: str) -> bytes:
    """A cache file that is not what was written."""
    record = json.loads(content)
    if kind == "text":
        record["train"]["texts"][0] = "changed"
    elif kind == "no fingerprint":
        del record["fingerprint"]
    elif kind == "other shape":
        record["train"] = [1, 2]
    return content[:40] if kind == "cut" else json.dumps(record).encode()


@pytest.mark.parametrize("kind", ["cut", "text", "no fingerprint", "other shape"])
def test_damaged_cache_is_rebuilt_with_one_log_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "build", lambda: TINY)
    docstring_corpus(tmp_path)
    (path,) = tmp_path.iterdir()
    written = path.read_bytes()
    path.write_bytes(tampered(written, kind))
    with caplog.at_level(logging.INFO):
        assert docstring_corpus(tmp_path) == TINY
    assert [record.getMessage() for record in caplog.records] == [f"{path}: damaged cache, built again"]
    assert path.read_bytes() == written


def test_upgraded_package_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "build", lambda: TINY)
    docstring_corpus(tmp_path)
    monkeypatch.setattr(module, "version", lambda name: "99.0")
    docstring_corpus(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("package,sub,words", [("no_such_package", "a", "pip install"), ("numpy", "no_such", "has no")])
def test_missing_package_is_named_in_one_line(
    package: str, sub: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SUBPACKAGES", {package: (sub,)})
    with pytest.raises(ConfigError, match=package) as caught:
        docstring_corpus(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
