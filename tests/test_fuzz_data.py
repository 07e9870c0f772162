"""Data sets that are damaged, lie or carry code: one line each, nothing run, no gigabytes."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import at_most, damaged, deeds, examples, hold, read_or_refused, wrapped
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from config import ConfigError
from utils import reuters
from utils.docstring_corpus import read_cache
from utils.foreign_files import LARGEST
from utils.image_readers import read_images
from utils.text_readers import read_corpus
from utils.utils_image import decode

CLASSES = {"fine_label_names": ["a", "b"]}
PART = {"data": np.arange(4 * 3072, dtype=np.uint8).reshape(4, 3072), "fine_labels": [0, 1, 1, 0]}


def cifar(folder: Path, train: bytes) -> Callable[[], object]:
    """A reader of CIFAR-100 whose train file holds that."""
    for name, content in (("meta", pickle.dumps(CLASSES)), ("test", pickle.dumps(PART, 2)), ("train", train)):
        (folder / name).write_bytes(content)
    return lambda: read_images("cifar100", folder)


@pytest.mark.parametrize("protocol", range(5))
def test_stand_ins_read_arrays_as_numpy_does(tmp_path: Path, protocol: int) -> None:
    columns = {"data": np.asfortranarray(PART["data"]), "fine_labels": PART["fine_labels"]}
    for part in (PART, columns):
        cifar(tmp_path, pickle.dumps(part, protocol))
        images = read_images("cifar100", tmp_path).train.images
        assert isinstance(images, torch.Tensor)
        assert np.array_equal(images.numpy().reshape(4, 3072), pickle.loads(pickle.dumps(part))["data"])


@examples(150)
def test_a_damaged_cifar_is_read_or_refused(tmp_path: Path, count: int) -> None:
    good = [pickle.dumps(PART, protocol) for protocol in (0, 2, 4)]
    # Most of the damage where the pickle is more than pixels.
    short = [pickle.dumps({"data": np.zeros((0, 3072), np.uint8), "fine_labels": []}, p) for p in (0, 2, 4)]
    with at_most(200):
        hold(
            count, lambda content: read_or_refused(cifar(tmp_path, content)),
            st.sampled_from([*good, *short, *short]).flatmap(damaged),
        )  # fmt: skip


@examples(60)
def test_code_in_cifar_does_not_run(tmp_path: Path, count: int) -> None:
    mark = tmp_path / "ran"

    def claim(case: tuple[Any, int, str]) -> None:
        value, protocol, key = case
        with pytest.raises(ConfigError, match="not a file of CIFAR"):
            cifar(tmp_path, pickle.dumps(PART | {key: value}, protocol))()
        assert not mark.exists()

    hold(count, claim, st.tuples(wrapped(deeds(mark)), st.integers(0, 5), st.sampled_from(["data", "more"])))


def calls(name: str, *words: Any) -> bytes:
    """A pickle of {"data": name(*words), "fine_labels": [0]}."""
    module, function = name.rsplit(".", 1)
    inner = b"".join(pickle.dumps(word, 2)[2:-1] for word in words)
    head = b"\x80\x02}(X\x04\0\0\0datac" + f"{module}\n{function}\n".encode()
    return head + b"(" + inner + b"tRX\x0b\0\0\0fine_labels]K\0au."


def nested(depth: int) -> Any:
    """A list of 2^depth numbers in a file of some bytes."""
    found: Any = [0, 1]
    for _ in range(depth):
        found = [found, found]
    return found


class Pretends:
    """Pickles as an array with a state of one's own."""

    def __init__(self, kind: object, state: tuple[Any, ...]) -> None:
        self.kind, self.state = kind, state

    def __reduce__(self) -> Any:
        made = PART["data"].__reduce__()
        return made[0], made[1], self.state


BIG = {
    "an empty array of 40 GB": calls("numpy.ndarray", (200_000, 200_000)),
    "40 GB to begin from": calls("numpy.core.multiarray._reconstruct", "ndarray", (200_000, 200_000), b"b"),
    "a place in memory": b"\x80\x02}r" + struct.pack("<I", 2**30) + b".",
    "a place in words": b"}p1073741824\n.",
    "bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "lists in lists": pickle.dumps({"data": nested(30), "fine_labels": [0]}),
    "labels in lists": pickle.dumps(PART | {"fine_labels": nested(30)}),
    "text in hexadecimal": calls("_codecs.encode", "a", "hex"),
    "objects": pickle.dumps(PART | {"data": np.array([[None]] * 4)}),
    "a shape of more": pickle.dumps(PART | {"data": Pretends(0, (1, (10**6, 3072), np.dtype("u1"), False, b"12"))}),
    "a type of more": pickle.dumps(PART | {"data": Pretends(0, (1, (1,), np.dtype("V1000000000"), False, b"12"))}),
}


@pytest.mark.parametrize("kind", BIG)
def test_a_cifar_that_lies_of_its_size_is_refused_and_takes_no_memory(tmp_path: Path, kind: str) -> None:
    with at_most(200), pytest.raises(ConfigError, match="not a file of CIFAR"):
        cifar(tmp_path, BIG[kind])()


def test_names_of_classes_are_a_list_of_texts(tmp_path: Path) -> None:
    read = cifar(tmp_path, pickle.dumps(PART))
    (tmp_path / "meta").write_bytes(pickle.dumps({"fine_label_names": nested(30)}))
    with at_most(200), pytest.raises(ConfigError, match="holds no list of str"):
        read()


def idx(array: np.ndarray[Any, Any], shape: tuple[int, ...] | None = None) -> bytes:
    shape = array.shape if shape is None else shape
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + array.tobytes()


def mnist(folder: Path, images: bytes, ending: str = "") -> Callable[[], object]:
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(np.zeros((2, 8, 8), np.uint8)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.array([0, 9], np.uint8)))
    (folder / "t10k-images-idx3-ubyte").unlink()
    (folder / f"t10k-images-idx3-ubyte{ending}").write_bytes(images)
    return lambda: read_images("mnist", folder)


@examples(120)
def test_a_damaged_idx_file_is_read_or_refused(tmp_path: Path, count: int) -> None:
    good = idx(np.zeros((2, 8, 8), np.uint8))
    for ending, whole in (("", good), (".gz", gzip.compress(good))):
        folder = tmp_path / f"idx{ending}"
        folder.mkdir()
        mnist(folder, whole, ending)()
        with at_most(200):
            hold(
                count // 2,
                lambda content, folder=folder, ending=ending: read_or_refused(mnist(folder, content, ending)),
                damaged(whole),
            )


@pytest.mark.parametrize("shape", [(2**31, 8, 8), (2**32 - 1,) * 3, (LARGEST // 64, 8, 8), (2, 8, 9), (2, 8, 7)])
def test_an_idx_file_that_lies_of_its_size_is_refused_and_takes_no_memory(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    lying = idx(np.zeros((2, 8, 8), np.uint8), shape)
    for ending, content in (("", lying), (".gz", gzip.compress(lying))):
        (tmp_path / f"x{ending}").mkdir()
        with at_most(200), pytest.raises(ConfigError, match="not an IDX file"):
            mnist(tmp_path / f"x{ending}", content, ending)()


def test_an_idx_file_is_unpacked_no_further_than_it_says(tmp_path: Path) -> None:
    bomb = gzip.compress(idx(np.zeros((2, 8, 8), np.uint8)) + bytes(2**28), 1)
    with at_most(200), pytest.raises(ConfigError, match="not an IDX file"):
        mnist(tmp_path, bomb, ".gz")()


def svhn(folder: Path, test: bytes) -> Callable[[], object]:
    (folder / "train_32x32.mat").write_bytes(mat(np.zeros((32, 32, 3, 2), np.uint8)))
    (folder / "test_32x32.mat").write_bytes(test)
    return lambda: read_images("svhn", folder)


def mat(images: object, packed: bool = False, form: str = "5") -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, {"X": images, "y": np.array([[10], [1]], np.uint8)}, do_compression=packed, format=form)  # type: ignore[arg-type]
    return buffer.getvalue()


@examples(120)
def test_a_damaged_svhn_is_read_or_refused(tmp_path: Path, count: int) -> None:
    small = np.zeros((2, 2, 3, 2), np.uint8)
    good = [mat(small), mat(small, True), mat(np.zeros((2, 2), np.uint8), form="4")]
    svhn(tmp_path, good[0])()
    with at_most(300):
        hold(count, lambda content: read_or_refused(svhn(tmp_path, content)), st.sampled_from(good).flatmap(damaged))


def test_an_svhn_of_cells_is_refused_and_takes_no_memory(tmp_path: Path) -> None:
    cells = mat(np.array([[{"a": 1}, 2]], object))
    lying = cells.replace(struct.pack("<ii", 1, 2), struct.pack("<ii", 2**15, 2**15), 1)
    assert lying != cells
    for content in (cells, lying):
        with at_most(200), pytest.raises(ConfigError, match="not a file of SVHN"):
            svhn(tmp_path, content)()


def picture(kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, kind, **how)
    return buffer.getvalue()


@examples(120)
def test_a_damaged_picture_is_read_or_refused(tmp_path: Path, count: int) -> None:
    path, good = tmp_path / "x.png", [picture(kind) for kind in ("PNG", "JPEG", "BMP", "WEBP", "GIF")]

    def claim(content: bytes) -> None:
        path.write_bytes(content)
        read_or_refused(lambda: decode(path))

    for content in good:
        path.write_bytes(content)
        assert decode(path).shape == (3, 8, 8)
    hold(count, claim, st.sampled_from(good).flatmap(damaged))


def test_a_picture_that_another_program_would_draw_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")  # Pillow draws PostScript with it
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "x.png").write_bytes(picture("EPS"))
    with pytest.raises(ConfigError, match="not an image"):
        decode(tmp_path / "x.png")
    assert not (tmp_path / "ran").exists()


def test_a_picture_of_gigabytes_is_refused(tmp_path: Path) -> None:
    png = picture("PNG")
    where = png.index(b"IHDR") + 4
    (tmp_path / "x.png").write_bytes(png[:where] + struct.pack(">II", 2**16, 2**16) + png[where + 8 :])
    with at_most(200), pytest.raises(ConfigError, match="not an image"):
        decode(tmp_path / "x.png")


def folder_of(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


ROW = json.dumps({"text": "a b", "labels": ["x", "y"]}).encode() + b"\n"
TEXTS: dict[str, tuple[str, dict[str, bytes]]] = {
    "own": ("mine", {"train.jsonl": ROW * 2, "test.jsonl": ROW}),
    "table": ("mine", {"train.csv": b'text,label\n"a, b",x;y\nc,"[1, 0]"\n', "test.csv": b"text,label\na,x\n"}),
    "reuters table": ("reuters", {
        "training_data.csv": b"text,labels\na,\"['x']\"\nb,[0 1]\n", "test_data.csv": b"text,labels\na,['x']\n",
    }),
    "ag_news": ("ag_news", {
        "train.csv": b"".join(b'"%d","a","b"\n' % c for c in (1, 2, 3, 4)), "test.csv": b'"1","a","b"\n',
    }),
    "sst2": ("sst2", {"train.tsv": b"sentence\tlabel\na\t0\nb\t1\n", "test.tsv": b"a\t0\n"}),
    "trec": ("trec", {"train_5500.label": b"NUM:x how\nLOC:y where\n", "TREC_10.label": b"NUM:x how\n"}),
    "nltk": ("reuters", {
        "cats.txt": b"training/1 a b\ntest/2 a\n", "training/1": b"one &lt;two", "test/2": b"three",
    }),
    "sgml": ("reuters", {"reut2-000.sgm": b"".join(
        b'<REUTERS TOPICS="YES" LEWISSPLIT="%b" NEWID="1"><TOPICS><D>a</D></TOPICS><TEXT>b</TEXT></REUTERS>'
        % split for split in (b"TRAIN", b"TEST")
    )}),
    "tiny": ("tinyimagenet", {
        "wnids.txt": b"n01\nn02\n", "words.txt": b"n01\tcat\nn02\tdog\n", "train/n01/images/a.png": b"",
        "train/n02/images/b.png": b"", "val/val_annotations.txt": b"a.png\tn01\t0\t0\n", "val/images/a.png": b"",
    }),
    "cub": ("cub200", {
        "images.txt": b"1 001.a/a.png\n2 001.a/b.png\n", "image_class_labels.txt": b"1 1\n2 1\n",
        "train_test_split.txt": b"1 1\n2 0\n", "images/001.a/a.png": b"", "images/001.a/b.png": b"",
    }),
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXTS)
@examples(40)
def test_damaged_texts_are_read_or_refused(tmp_path: Path, kind: str, count: int) -> None:
    name, files = TEXTS[kind]
    folder = folder_of(files, tmp_path)

    def read() -> object:
        return read_images(name, folder) if kind in ("tiny", "cub") else read_corpus(name, folder, folder)

    def claim(case: tuple[str, bytes]) -> None:
        (folder / case[0]).write_bytes(case[1])
        read_or_refused(read)
        (folder / case[0]).write_bytes(files[case[0]])

    read()
    listed = [file for file, content in files.items() if content]
    hold(count, claim, st.sampled_from(listed).flatmap(lambda file: st.tuples(st.just(file), damaged(files[file]))))


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just(10**400)),
    lambda part: st.one_of(st.lists(part, max_size=3), st.dictionaries(st.text(max_size=2), part, max_size=2)),
    max_leaves=5,
)
cells = st.one_of(st.text("[](){}'\"0129,; eE-+.ax\\\n", max_size=12), st.text(max_size=8))


@examples(120)
def test_rows_of_any_values_are_read_or_refused(tmp_path: Path, count: int) -> None:
    record = st.one_of(
        json_values,
        st.fixed_dictionaries(
            {"text": st.one_of(json_values, st.just("a"))}, optional={"labels": json_values, "label": json_values}
        ),
    )
    tables = st.lists(st.tuples(st.sampled_from(["a", ""]), cells), max_size=3)
    (tmp_path / "r").mkdir()

    def claim(case: tuple[list[Any], list[tuple[str, str]]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in case[0])
        for part in ("train", "test"):
            (tmp_path / f"{part}.jsonl").write_text(text)
            rows = "".join(f'{a},"{b}"\n' for a, b in case[1])
            name = {"train": "training_data.csv", "test": "test_data.csv"}[part]
            (tmp_path / "r" / name).write_text("text,labels\n" + rows, errors="surrogatepass")
        read_or_refused(lambda: read_corpus("mine", tmp_path, tmp_path))
        read_or_refused(lambda: read_corpus("reuters", tmp_path / "r", tmp_path))

    hold(count, claim, st.tuples(st.lists(record, min_size=1, max_size=3), tables))


DEEP = {
    "lists": b'{"text": "a", "labels": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n",
    "digits": b'{"text": "a", "labels": ' + b"9" * 10**5 + b"}\n",
}


@pytest.mark.parametrize("kind", DEEP)
def test_rows_too_deep_or_too_long_are_refused(tmp_path: Path, kind: str) -> None:
    folder_of({"train.jsonl": DEEP[kind], "test.jsonl": ROW}, tmp_path)
    read_or_refused(lambda: read_corpus("mine", tmp_path, tmp_path))
    label = DEEP[kind].split(b": ")[-1].strip(b"}\n")
    for cell in (label, b"[" + b"-" * 10**5 + b"1]", b"[" + b"(" * 10**4 + b"1"):
        folder_of({"x/train.csv": b'text,label\na,"' + cell + b'"\n', "x/test.csv": b"text,label\na,x\n"}, tmp_path)
        read_or_refused(lambda: read_corpus("mine", tmp_path / "x", tmp_path))


def reuters_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in TEXTS["nltk"][1].items():
            archive.writestr(f"reuters/{name}", content)
    return buffer.getvalue()


def reuters_tar(kind: str, content: bytes | None = None) -> bytes:
    buffer, content = io.BytesIO(), content or TEXTS["sgml"][1]["reut2-000.sgm"]
    with tarfile.open(fileobj=buffer, mode=f"w:{kind}") as archive:  # type: ignore[call-overload]
        member = tarfile.TarInfo("reut2-000.sgm")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["reuters.zip", "reuters21578.tar", "reuters21578.tar.gz", "reuters21578.tar.xz"])
@examples(60)
def test_a_damaged_archive_is_read_or_refused(tmp_path: Path, name: str, count: int) -> None:
    good = reuters_zip() if name.endswith("zip") else reuters_tar(name.split(".tar")[1].lstrip("."))

    def claim(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        read_or_refused(lambda: read_corpus("reuters", tmp_path, tmp_path))

    (tmp_path / name).write_bytes(good)
    assert read_corpus("reuters", tmp_path, tmp_path).classes[0] == "a"
    with at_most(200):
        hold(count, claim, damaged(good))


@pytest.mark.parametrize("kind", ["sparse", "packed", "zip"])
def test_an_archive_of_gigabytes_is_refused_and_takes_no_memory(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "zip":
        raw = bytearray(reuters_zip())
        whole = TEXTS["nltk"][1]["cats.txt"]
        place = raw.index(b"PK\1\2")  # the directory's first entry, of cats.txt
        assert raw[place + 24 : place + 28] == struct.pack("<I", len(whole))
        raw[place + 24 : place + 28] = struct.pack("<I", 2**31)
        (tmp_path / "reuters.zip").write_bytes(raw)
    elif kind == "packed":
        (tmp_path / "reuters21578.tar.xz").write_bytes(reuters_tar("xz", bytes(2000)))
        monkeypatch.setattr(reuters, "LARGEST", 1999)
    else:  # holes, which take no room in the file
        header = tarfile.TarInfo("reut2-000.sgm")
        header.type, header.size = tarfile.GNUTYPE_SPARSE, 0
        block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
        block[483:495] = b"%011o\0" % 2**36  # the size with its holes
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block[:512])
        (tmp_path / "reuters21578.tar").write_bytes(bytes(block) + bytes(1024))
    with at_most(200), pytest.raises(ConfigError, match="more than"):
        read_corpus("reuters", tmp_path, tmp_path)


@examples(80)
def test_a_damaged_cache_is_built_again(tmp_path: Path, count: int) -> None:
    path = tmp_path / "docstrings.json"
    good = json.dumps(
        {"fingerprint": "x", "classes": ["a"], **{p: {"texts": ["b"], "labels": [[0]]} for p in ("train", "test")}}
    )

    def claim(content: bytes) -> None:
        path.write_bytes(content)
        assert read_cache(path) is None

    hold(count, claim, st.one_of(damaged(good.encode()), json_values.map(lambda v: json.dumps(v).encode())))
    claim(b"[" * 10**5)
