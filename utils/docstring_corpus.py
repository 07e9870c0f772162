"""The embedded corpus: docstrings of installed packages, labelled by package and subpackage. Needs no download."""

import ast
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from importlib.metadata import version
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
ALIASES = {
    "numpy": ("np",),
    "matplotlib": ("mpl", "plt", "pyplot"),
    "networkx": ("nx",),
    "torch": ("pytorch",),
}
MIN_WORDS, CAP, TEST_PERCENT = 8, 250, 20
RULE = re.compile(r"[-=~_*#^]{3,}")  # underlines of headings
log = logging.getLogger("distill_lab")


def docstring_corpus(cache_dir: Path) -> Corpus:
    """20 labels, about 3,200 documents; built once and cached. Raises ConfigError for a missing package."""
    versions = [f"{name} {version(name) if find_spec(name) else missing(name)}" for name in SUBPACKAGES]
    name = hashlib.sha256(json.dumps([versions, MIN_WORDS, CAP, SUBPACKAGES, RULE.pattern]).encode()).hexdigest()[:12]
    path = cache_dir / f"docstrings_{name}.json"
    if path.exists():
        found = read_cache(path)
        if found:
            return found
        log.warning(f"{path}: damaged cache, built again")
    corpus = build()
    parts = {
        part: {"texts": s.texts, "labels": s.labels} for part, s in (("train", corpus.train), ("test", corpus.test))
    }
    content = {"fingerprint": corpus.fingerprint, "classes": corpus.classes, **parts}
    atomic_write(path, json.dumps(content).encode())
    return corpus


def missing(name: str) -> str:
    """Refuse to go on without a package."""
    raise ConfigError(f"dataset docstrings: package {name} is not installed: pip install {name}")


def read_cache(path: Path) -> Corpus | None:
    """The cached corpus, or None if the file is damaged."""
    try:
        content = json.loads(path.read_text())
        splits = [Split(p["texts"], [tuple(row) for row in p["labels"]]) for p in (content["train"], content["test"])]
        corpus = Corpus("docstrings", tuple(content["classes"]), splits[0], None, splits[1], multilabel=True)
    except (ValueError, KeyError, TypeError):
        return None
    return corpus if corpus.fingerprint == content["fingerprint"] else None


def build() -> Corpus:
    """Read, clean, de-duplicate and split the docstrings."""
    classes = tuple([f"{p}.{s}" for p, subs in SUBPACKAGES.items() for s in subs] + list(SUBPACKAGES))
    ids = {name: i for i, name in enumerate(classes)}
    found: dict[str, tuple[str, set[int]]] = {}  # first ten words -> text, labels
    for package, subs in SUBPACKAGES.items():
        names = sorted({package, *ALIASES.get(package, ())}, key=len, reverse=True)
        own_name = re.compile(r"\b(" + "|".join(names) + r")\b\.?", re.IGNORECASE)
        for sub in subs:
            kept = 0
            for text in docstrings(package, sub):
                cleaned = " ".join(RULE.sub(" ", own_name.sub(" ", text)).split())
                if len(cleaned.split()) < MIN_WORDS:
                    continue
                start = " ".join(cleaned.split()[:10])
                if start not in found and kept >= CAP:
                    continue
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
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"dataset docstrings: package {package} is not installed: pip install {package}")
    folder = Path(spec.submodule_search_locations[0]) / sub
    files = sorted(folder.rglob("*.py"), key=lambda path: (path.name.startswith("_") and path.stem != "__init__", path))
    for file in files:
        if "tests" in file.relative_to(folder).parts:
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    yield text
