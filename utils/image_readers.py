"""Image data sets as they lie on disk, read into uint8 tensors [N, channels, height, width] or lists of files."""

import gzip
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import ConfigError
from utils.foreign_files import LARGEST, mat_arrays, plain, reading, unpickle

# WordNet ids of the ImageNet subsets, in the class order of Cazenavette et al. (2022).
SUBSETS = {
    "imagenette": "n01440764 n02102040 n02979186 n03000684 n03028079 "
    "n03394916 n03417042 n03425413 n03445777 n03888257",
    "imagewoof": "n02096294 n02093754 n02111889 n02088364 n02086240 "
    "n02089973 n02087394 n02115641 n02099601 n02105641",
    "imagefruit": "n07753275 n07753592 n07745940 n07747607 n07749582 "
    "n07768694 n07753113 n07720875 n07718472 n07742313",
    "imagemeow": "n02123045 n02123159 n02123394 n02123597 n02124075 "
    "n02129165 n02129604 n02128925 n02128757 n02127052",
    "imagesquawk": "n01806143 n02007558 n01818515 n02051845 n02056570 "
    "n01614925 n01843383 n01518878 n01860187 n01819313",
    "imageyellow": "n02206856 n12057211 n07753592 n07749582 n12144580 "
    "n04146614 n03530642 n02129165 n01773157 n01531178",
}  # fmt: skip
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")  # by content; others of Pillow's run programs (EPS)
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class RawSplit:
    """Samples of a part: images in memory [N, C, H, W], or their files; labels [N]."""

    images: Tensor | tuple[Path, ...]
    labels: Tensor


@dataclass(frozen=True)
class RawImages:
    """A data set as it was read; `val` where it has one of its own."""

    classes: tuple[str, ...]
    train: RawSplit
    test: RawSplit
    val: RawSplit | None = None


def read_images(name: str, folder: Path | None) -> RawImages:
    """The data set `name` in `folder`; digits needs none. Raises ConfigError for what is absent or damaged."""
    if name == "digits":
        return read_digits()
    if folder is None:
        raise ConfigError(f"dataset.data_dir: required for {name}; only digits needs no files")
    if not folder.is_dir():
        raise ConfigError(f"dataset.data_dir: no folder {folder}: put {name} there, or set dataset.data_dir")
    readers: dict[str, Callable[[Path], RawImages]] = {
        "cifar10": read_cifar10, "cifar100": read_cifar100, "mnist": read_idx, "fashionmnist": read_idx,
        "svhn": read_svhn, "tinyimagenet": read_tiny, "cub200": read_cub,
    }  # fmt: skip
    if name in readers:
        found = readers[name](folder)
    else:
        found = read_folders(folder, SUBSETS[name].split() if name in SUBSETS else None)
    if not len(found.test.labels):
        raise ConfigError(f"dataset.data_dir: {folder} holds no test images of {name}")
    return found


def read_digits() -> RawImages:
    """scikit-learn's 1,797 digits of 8 x 8 pixels and 17 grey levels; the last 30 of each class are for testing."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(found.target).long()
    test = torch.cat([(labels == c).nonzero().flatten()[-30:] for c in range(10)]).sort().values
    train = torch.ones(len(labels), dtype=torch.bool)
    train[test] = False
    return RawImages(
        tuple(map(str, range(10))), RawSplit(images[train], labels[train]), RawSplit(images[test], labels[test])
    )


def find(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of those names in `folder` or in a folder below it. Raises ConfigError naming those absent."""
    places = (folder, *sorted(p for p in folder.iterdir() if p.is_dir()))
    absent = {place: [name for name in names if not (place / name).is_file()] for place in places}
    best = min(places, key=lambda place: len(absent[place]))
    if absent[best]:
        raise ConfigError(f"dataset.data_dir: {best} holds no {', '.join(absent[best])}: name the folder of the files")
    return [best / name for name in names]


def fitting(images: Tensor, labels: Tensor, nclass: int) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] uint8 with labels [N] of `nclass` classes. Raises ValueError if they are not that."""
    if images.dtype != torch.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(f"images {images.dtype} {list(images.shape)} with labels {list(labels.shape)}")
    if labels.dtype != torch.long or any(not 0 <= label < nclass for label in labels.unique().tolist()):
        raise ValueError(f"labels other than 0 ... {nclass - 1}")
    return images, labels


def read_cifar10(folder: Path) -> RawImages:
    """CIFAR-10's official pickles."""
    meta, test, *train = find(folder, ["batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))])
    return read_cifar(meta, train, test, "label_names", "labels")


def read_cifar100(folder: Path) -> RawImages:
    """CIFAR-100's official pickles, fine labels."""
    meta, test, train = find(folder, ["meta", "test", "train"])
    return read_cifar(meta, [train], test, "fine_label_names", "fine_labels")


def read_cifar(meta: Path, train: Sequence[Path], test: Path, names: str, key: str) -> RawImages:
    """Files of either CIFAR, with the keys of its class names and of its labels."""

    def split(path: Path) -> tuple[Tensor, Tensor]:
        with reading(path, "a file of CIFAR"):
            part = unpickle(path)
            images, labels = torch.tensor(part["data"].found).reshape(-1, 3, 32, 32), plain(part[key], int)
            return fitting(images, torch.tensor(labels), len(classes))

    with reading(meta, "a file of CIFAR"):
        classes = tuple(plain(unpickle(meta)[names], str))
    images, labels = (torch.cat(parts) for parts in zip(*map(split, train), strict=True))
    return RawImages(classes, RawSplit(images, labels), RawSplit(*split(test)))


def read_idx(folder: Path) -> RawImages:
    """MNIST or Fashion-MNIST."""

    def split(part: str) -> RawSplit:
        images = idx_array(folder, f"{part}-images-idx3-ubyte", 3)[:, None]
        labels = idx_array(folder, f"{part}-labels-idx1-ubyte", 1).long()
        with reading(folder, f"a fitting pair of {part} images and labels"):
            return RawSplit(*fitting(images, labels, 10))

    return RawImages(tuple(map(str, range(10))), split("train"), split("t10k"))


def idx_array(folder: Path, stem: str, ndim: int) -> Tensor:
    """A uint8 tensor of `ndim` dimensions in MNIST's IDX format, gzipped or not. Raises ConfigError."""
    found = [p for p in (folder / stem, folder / f"{stem}.gz", *folder.glob(f"*/{stem}*")) if p.is_file()]
    if not found:
        raise ConfigError(f"dataset.data_dir: {folder} holds no {stem} or {stem}.gz")
    with (
        reading(found[0], "an IDX file"),
        gzip.open(found[0]) if found[0].suffix == ".gz" else found[0].open("rb") as file,
    ):
        head = file.read(4 + 4 * ndim)
        if head[:4] != bytes((0, 0, 8, ndim)):  # 8: unsigned bytes
            raise ValueError(f"begins with {head[:4].hex()}")
        shape = struct.unpack(f">{ndim}I", head[4:])
        if math.prod(shape) > LARGEST:
            raise ValueError(f"images of {math.prod(shape)} bytes; {LARGEST} are the most")
        raw = file.read(math.prod(shape) + 1)
        return torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(shape).copy())


def read_svhn(folder: Path) -> RawImages:
    """SVHN's cropped digits, whose label 10 is the digit 0."""

    def split(path: Path) -> RawSplit:
        with reading(path, "a file of SVHN"):
            found = dict(mat_arrays(path.read_bytes(), ("X", "y")))
            labels = torch.from_numpy(found["y"].astype(np.int64)).flatten()
            images = torch.from_numpy(found["X"].transpose(3, 2, 0, 1).copy())
            return RawSplit(*fitting(images, labels.where(labels != 10, 0), 10))

    train, test = find(folder, ["train_32x32.mat", "test_32x32.mat"])
    return RawImages(tuple(map(str, range(10))), split(train), split(test))


def read_tiny(folder: Path) -> RawImages:
    """Tiny-ImageNet, with its validation part as test; classes are those of wnids.txt that have images."""
    listed, words, notes = find(folder, ["wnids.txt", "words.txt", "val/val_annotations.txt"])
    files: dict[str, list[Path]] = {}
    with reading(listed, "a list of classes"):
        for wnid in listed.read_text("utf-8").split():
            files[wnid] = pictures(listed.parent / "train" / wnid / "images")
    wnids = [wnid for wnid in files if files[wnid]]
    if not wnids:
        raise ConfigError(f"dataset.data_dir: {listed.parent}/train holds no images of the classes of {listed.name}")
    with reading(words, "a list of names"):
        names = dict(line.split("\t", 1) for line in words.read_text("utf-8").splitlines() if line)
    with reading(notes, "a list of images and classes"):
        rows = [line.split("\t") for line in notes.read_text("utf-8").splitlines() if line]
        test = [(notes.parent / "images" / row[0], wnids.index(row[1])) for row in rows if row[1] in wnids]
    for path, _ in test:
        if not path.is_file():
            raise ConfigError(f"{path}: absent, but {notes.name} lists it: fetch it again or remove its line")
    train = [(path, c) for c, wnid in enumerate(wnids) for path in files[wnid]]
    classes = tuple(names.get(wnid, wnid).split(",")[0] for wnid in wnids)
    return RawImages(classes, listed_split(train), listed_split(test))


def read_cub(folder: Path) -> RawImages:
    """CUB-200-2011 in its official split; its classes are those whose folders are there, in the order of their ids."""
    lists = find(folder, ["images.txt", "image_class_labels.txt", "train_test_split.txt"])
    top = lists[0].parent
    with reading(top, "CUB-200-2011"):
        paths, numbers, first = (dict(line.split() for line in p.read_text("utf-8").splitlines()) for p in lists)
        names = {int(numbers[i]): path.split("/")[0] for i, path in paths.items()}
        there = {c: set(pictures(top / "images" / names[c])) for c in sorted(names)}
        classes = [c for c in there if there[c]]
        parts: dict[str, list[tuple[Path, int]]] = {"1": [], "0": []}
        for i, path in paths.items():
            if there[int(numbers[i])]:
                parts[first[i]].append((top / "images" / path, classes.index(int(numbers[i]))))
    for file, c in (*parts["1"], *parts["0"]):
        if file not in there[classes[c]]:
            raise ConfigError(f"{file}: absent, but images.txt lists it: fetch it again or remove its line")
    return RawImages(tuple(names[c] for c in classes), listed_split(parts["1"]), listed_split(parts["0"]))


def read_folders(folder: Path, wanted: Sequence[str] | None) -> RawImages:
    """One folder a class under train/ and under val/ or test/ (with both, val/ is for validation).

    `wanted` names the classes, else all are taken.
    """
    inside = {part: class_folders(folder / part) for part in ("train", "val", "test")}
    held_out = [part for part in ("test", "val") if inside[part]]  # ImageNet's own test/ has no classes
    for part in ("train", *(held_out[:1] or ["val"])):
        if not inside[part]:
            raise ConfigError(f"dataset.data_dir: {folder} holds no {part}/ with a folder of images a class")
    names = list(wanted or inside["train"])
    splits = {}
    for part in ("train", *held_out):
        files = {name: pictures(folder / part / name) for name in names}
        for name in names:
            if not files[name]:
                raise ConfigError(f"dataset.data_dir: {folder / part} holds no images of class {name}")
        unknown = [name for name in inside[part] if name not in names]
        if unknown and not wanted:
            raise ConfigError(f"dataset.data_dir: {folder / part} holds class {unknown[0]}, which train/ does not")
        splits[part] = listed_split([(path, c) for c, name in enumerate(names) for path in files[name]])
    return RawImages(tuple(names), splits["train"], splits[held_out[0]], splits["val"] if len(held_out) > 1 else None)


def class_folders(part: Path) -> list[str]:
    """Names of the folders in a part's folder, sorted; hidden ones are not classes."""
    return sorted(p.name for p in part.glob("[!.]*") if p.is_dir())


def pictures(folder: Path) -> list[Path]:
    """The image files in a folder, sorted."""
    return sorted(p for p in folder.glob("[!.]*") if p.suffix.lower() in IMAGES)


def listed_split(items: Sequence[tuple[Path, int]]) -> RawSplit:
    """Files and their labels."""
    return RawSplit(tuple(path for path, _ in items), torch.tensor([label for _, label in items], dtype=torch.long))
