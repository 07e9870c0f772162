"""The embedded corpus: docstrings of installed packages, labelled by package and subpackage. Needs no download."""

import ast
import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from config import ConfigError
from utils.checkpoint import atomic_write
from utils.corpus import Corpus, Split

# Public subpackages only: private ones come and go between versions.
SUBPACKAGES = {
    "numpy": ("ma", "polynomial", "lib"),
    "torch": ("nn", "distributions", "distributed"),
    "torchvision": ("transforms", "models"),
    "matplotlib": ("axes", "backends"),
    "sympy": ("physics", "stats"),
    "networkx": ("algorithms", "generators"),
}
# A text must not name its label: package names go wherever they stand, short aliases only as words.
LONG_NAMES = "|".join(["torchvision", "pytorch", "pyplot", *SUBPACKAGES])  # torchvision before torch
NAMES = re.compile(rf"(?:{LONG_NAMES}|\b(?:np|nx|plt|mpl)\b)\.?", re.IGNORECASE)
MIN_WORDS, CAP, TEST_PERCENT = 8, 250, 20
RULE = re.compile(r"[-=~_*#^]{3,}")  # underlines of headings
log = logging.getLogger("distill_lab")


def docstring_corpus(cache_dir: Path) -> Corpus:
    """20 labels, about 3,100 documents; built once and cached. Raises ConfigError for a missing package."""
    recipe = [SUBPACKAGES, NAMES.pattern, RULE.pattern, MIN_WORDS, CAP, TEST_PERCENT]
    content = json.dumps([[installed(name) for name in SUBPACKAGES], recipe])
    path = cache_dir / f"docstrings_{hashlib.sha256(content.encode()).hexdigest()[:12]}.json"
    if path.exists():
        found = read_cache(path)
        if found:
            return found
        log.warning(f"{path}: damaged cache, built again")
    corpus = build()
    parts = {
        part: {"texts": s.texts, "labels": s.labels} for part, s in (("train", corpus.train), ("test", corpus.test))
    }
    atomic_write(path, json.dumps({"fingerprint": corpus.fingerprint, "classes": corpus.classes, **parts}).encode())
    return corpus


def installed(package: str) -> tuple[str, str]:
    """Name and version of a package, which is not imported. Raises ConfigError."""
    try:
        return package, version(package)
    except PackageNotFoundError as error:
        raise ConfigError(f"dataset docstrings: package {package} is not installed: pip install {package}") from error


def read_cache(path: Path) -> Corpus | None:
    """The cached corpus, or None if the file is damaged."""
    try:
        content = json.loads(path.read_text())
        splits = [Split(p["texts"], [tuple(row) for row in p["labels"]]) for p in (content["train"], content["test"])]
        corpus = Corpus("docstrings", tuple(content["classes"]), splits[0], None, splits[1], multilabel=True)
        return corpus if corpus.fingerprint == content["fingerprint"] else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def build() -> Corpus:
    """Read, clean, de-duplicate and split the docstrings."""
    classes = tuple([f"{p}.{s}" for p, subs in SUBPACKAGES.items() for s in subs] + list(SUBPACKAGES))
    ids = {name: i for i, name in enumerate(classes)}
    found: dict[str, tuple[str, set[int]]] = {}  # first ten words -> text, labels
    for package, subs in SUBPACKAGES.items():
        for sub in subs:
            kept = 0
            for text in docstrings(package, sub):
                cleaned = " ".join(RULE.sub(" ", NAMES.sub(" ", text)).split())
                if len(cleaned.split()) < MIN_WORDS:
                    continue
                start = " ".join(cleaned.split()[:10])
                if start not in found and kept >= CAP:
                    break
                kept += start not in found
                found.setdefault(start, (cleaned, set()))[1].update({ids[f"{package}.{sub}"], ids[package]})
    splits: tuple[Split, Split] = (Split([], []), Split([], []))
    for text, labels in found.values():
        part = splits[int(hashlib.md5(text.encode()).hexdigest(), 16) % 100 < TEST_PERCENT]
        part.texts.append(text)
        part.labels.append(tuple(sorted(labels)))
    return Corpus("docstrings", classes, splits[0], None, splits[1], multilabel=True)


def docstrings(package: str, sub: str) -> Iterator[str]:
    """Docstrings of a subpackage's modules, classes and functions, in file order, read without importing it."""
    spec = find_spec(package)
    places = (spec.submodule_search_locations if spec else None) or []
    folder = next((Path(place) / sub for place in places if (Path(place) / sub).is_dir()), None)
    if folder is None:
        raise ConfigError(f"dataset docstrings: {package} {version(package)} has no {sub}: install another version")
    files = sorted(folder.rglob("*.py"), key=lambda path: (path.name.startswith("_") and path.stem != "__init__", path))
    for file in files:
        if "tests" in file.relative_to(folder).parts:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer Pythons print one for an escape like "\\d"
            tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    yield text
