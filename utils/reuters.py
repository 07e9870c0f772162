"""Reuters-21578, ApteMod split: NLTK's zip or folder, or the SGML release."""

import html
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from config import ConfigError

Labelled = tuple[str, str, list[str]]
DOCUMENT = re.compile(r"<REUTERS(?P<head>[^>]*)>(?P<body>.*?)</REUTERS>", re.DOTALL)
TOPIC = re.compile(r"<D>(.*?)</D>")


def read_reuters_release(folder: Path) -> tuple[list[Labelled], list[Labelled]]:
    """Train and test documents with topic names, of the topics with documents in both. Raises ConfigError."""
    if folder.is_dir():
        places = [folder, folder / "corpora", folder / "nltk_data" / "corpora"]
        for place in places:
            if (place / "cats.txt").is_file():
                return nltk_folder(place)
            if (place / "reuters" / "cats.txt").is_file():
                return nltk_folder(place / "reuters")
            if (place / "reuters.zip").is_file():
                return nltk_zip(place / "reuters.zip")
        sgml = sorted(folder.glob("reut2-*.sgm"))
        if sgml:
            return sgml_release([path.read_bytes() for path in sgml])
        archives = sorted(folder.glob("reuters21578.tar*"))
        if archives:
            return sgml_archive(archives[0])
    elif folder.suffix == ".zip":
        return nltk_zip(folder)
    elif ".tar" in folder.name:
        return sgml_archive(folder)
    raise ConfigError(
        f"{folder}: no Reuters data found (training_data.csv, reuters.zip, cats.txt, reut2-*.sgm or reuters21578.tar.xz)"
    )


def nltk_zip(path: Path) -> tuple[list[Labelled], list[Labelled]]:
    """NLTK's corpora/reuters.zip, read without unpacking."""
    try:
        with zipfile.ZipFile(path) as archive:
            cats = archive.read("reuters/cats.txt").decode("latin-1")
            return nltk_parts(cats, lambda name: archive.read(f"reuters/{name}").decode("latin-1"), str(path))
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise ConfigError(f"{path}: not NLTK's reuters.zip ({error})") from error


def nltk_folder(folder: Path) -> tuple[list[Labelled], list[Labelled]]:
    """NLTK's unpacked corpus."""
    cats = (folder / "cats.txt").read_text("latin-1")
    return nltk_parts(cats, lambda name: (folder / name).read_text("latin-1"), str(folder))


def nltk_parts(cats: str, read, where: str) -> tuple[list[Labelled], list[Labelled]]:  # type: ignore[no-untyped-def]
    """Documents of cats.txt (`training/1 cocoa ...`)."""
    parts: dict[str, list[Labelled]] = {"training": [], "test": []}
    for line in cats.splitlines():
        name, *topics = line.split()
        parts[name.split("/")[0]].append((f"{where}:{name}", clean(read(name)), topics))
    return parts["training"], parts["test"]


def sgml_archive(path: Path) -> tuple[list[Labelled], list[Labelled]]:
    """The SGML files inside a tar archive, read without unpacking."""
    try:
        with tarfile.open(path) as archive:
            members = sorted((m for m in archive.getmembers() if m.name.endswith(".sgm")), key=lambda m: m.name)
            return sgml_release([file.read() for m in members if (file := archive.extractfile(m))])
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ConfigError(f"{path}: not a readable archive ({error})") from error


def sgml_release(files: list[bytes]) -> tuple[list[Labelled], list[Labelled]]:
    """ModApte documents of the SGML files, of topics with at least one train and one test document."""
    parts: dict[str, list[Labelled]] = {"TRAIN": [], "TEST": []}
    for split, found in sgml_documents(files):
        parts[split].append(found)
    counts = [Counter(topic for _, _, topics in part for topic in topics) for part in parts.values()]
    both = counts[0].keys() & counts[1].keys()
    train, test = (
        [(place, text, kept) for place, text, topics in part if (kept := [t for t in topics if t in both])]
        for part in parts.values()
    )
    return train, test


def sgml_documents(files: list[bytes]) -> Iterator[tuple[str, Labelled]]:
    """(TRAIN or TEST, document) of the ModApte split."""
    for content in files:
        for match in DOCUMENT.finditer(content.decode("latin-1")):
            head, body = match["head"], match["body"]
            split = re.search(r'LEWISSPLIT="(\w+)"', head)
            number = re.search(r'NEWID="(\d+)"', head)
            if split is None or split[1] not in ("TRAIN", "TEST") or 'TOPICS="YES"' not in head:
                continue
            topics = TOPIC.findall(tag(body, "TOPICS"))
            text = clean(f"{tag(body, 'TITLE')} {tag(body, 'BODY')}") or clean(tag(body, "TEXT"))
            yield split[1], (f"NEWID {number[1] if number else '?'}", text, topics)


def tag(text: str, name: str) -> str:
    """What stands between <NAME ...> and </NAME>, or nothing."""
    found = re.search(rf"<{name}[^>]*>(.*?)</{name}>", text, re.DOTALL)
    return found[1] if found else ""


def clean(text: str) -> str:
    """Entities resolved, white space and control characters to single blanks."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", html.unescape(text)).split())
