"""Reuters-21578, ApteMod split: NLTK's zip or folder, or the SGML release."""

import html
import lzma
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from config import ConfigError
from utils.foreign_files import reading

LARGEST = 2**28  # bytes of texts in an archive
Labelled = tuple[str, str, list[str]]
DOCUMENT = re.compile(r"<REUTERS(?P<head>[^>]*)>(?P<body>.*?)</REUTERS>", re.DOTALL)
TOPIC = re.compile(r"<D>(.*?)</D>")
CATS_ROW = re.compile(r"(training|test)/(\w+)((?: \S+)+)")


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
            return sgml_release((str(path), path.read_bytes()) for path in sgml)
        archives = sorted(folder.glob("reuters21578.tar*"))
        if archives:
            return sgml_archive(archives[0])
    elif folder.suffix == ".zip":
        return nltk_zip(folder)
    elif ".tar" in folder.name:
        return sgml_archive(folder)
    raise ConfigError(
        f"{folder}: no Reuters data found: put training_data.csv, reuters.zip, cats.txt, reut2-*.sgm or "
        "reuters21578.tar.xz there, or name their folder in dataset.data_dir"
    )


def nltk_zip(path: Path) -> tuple[list[Labelled], list[Labelled]]:
    """NLTK's corpora/reuters.zip, read without unpacking."""
    with reading(path, "a readable zip file", zipfile.BadZipFile, lzma.LZMAError), zipfile.ZipFile(path) as archive:
        left = LARGEST

        def read(name: str) -> bytes:
            nonlocal left
            left -= archive.getinfo(f"reuters/{name}").file_size
            if left < 0:
                raise ValueError(f"holds more than {LARGEST} bytes")
            return archive.read(f"reuters/{name}")

        return nltk_parts(read, path)


def nltk_folder(folder: Path) -> tuple[list[Labelled], list[Labelled]]:
    """NLTK's unpacked corpus."""
    return nltk_parts(lambda name: (folder / name).read_bytes(), folder)


def nltk_parts(read: Callable[[str], bytes], where: Path) -> tuple[list[Labelled], list[Labelled]]:
    """Train and test documents of cats.txt (`training/1 cocoa ...`)."""

    def text(name: str) -> str:
        try:
            return read(name).decode("latin-1")
        except (FileNotFoundError, KeyError) as error:
            raise ConfigError(f"{where}/{name}: missing from NLTK's Reuters corpus: fetch the corpus again") from error

    parts: dict[str, list[Labelled]] = {"training": [], "test": []}
    for number, line in enumerate(text("cats.txt").splitlines(), 1):
        row = CATS_ROW.fullmatch(line.strip())
        if row is None:
            raise ConfigError(f"{where}/cats.txt:{number}: expected training/ID or test/ID and topics: mend the row")
        name = f"{row[1]}/{row[2]}"
        parts[row[1]].append((f"{where}/{name}", clean(text(name)), row[3].split()))
    return parts["training"], parts["test"]


def sgml_archive(path: Path) -> tuple[list[Labelled], list[Labelled]]:
    """The SGML files inside a tar archive, read without unpacking."""
    with reading(path, "a readable archive", tarfile.TarError, lzma.LZMAError), tarfile.open(path) as archive:
        members = sorted((m for m in archive.getmembers() if m.name.endswith(".sgm")), key=lambda m: m.name)
        if sum(m.size for m in members) > LARGEST:
            raise ValueError(f"holds more than {LARGEST} bytes")
        return sgml_release((f"{path}/{m.name}", f.read()) for m in members if (f := archive.extractfile(m)))


def sgml_release(files: Iterable[tuple[str, bytes]]) -> tuple[list[Labelled], list[Labelled]]:
    """ModApte documents of the SGML files (place, content), of topics with at least one train and one test document."""
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


def sgml_documents(files: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, Labelled]]:
    """(TRAIN or TEST, document) of the ModApte split."""
    for place, content in files:
        for match in DOCUMENT.finditer(content.decode("latin-1")):
            head, body = match["head"], match["body"]
            split = re.search(r'LEWISSPLIT="(\w+)"', head)
            number = re.search(r'NEWID="(\d+)"', head)
            if split is None or split[1] not in ("TRAIN", "TEST") or 'TOPICS="YES"' not in head:
                continue
            topics = TOPIC.findall(tag(body, "TOPICS"))
            text = clean(f"{tag(body, 'TITLE')} {tag(body, 'BODY')}") or clean(tag(body, "TEXT"))
            yield split[1], (f"{place}:NEWID {number[1] if number else '?'}", text, topics)


def tag(text: str, name: str) -> str:
    """What stands between <NAME ...> and </NAME>, or nothing."""
    found = re.search(rf"<{name}[^>]*>(.*?)</{name}>", text, re.DOTALL)
    return found[1] if found else ""


def clean(text: str) -> str:
    """Entities resolved, white space and control characters to single blanks."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", html.unescape(text)).split())
