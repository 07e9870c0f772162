"""Image data sets as they lie on disk, read into uint8 tensors [N, channels, height, width] or lists of files."""

import gzip
import io
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import ConfigError

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
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class RawSplit:
    """Samples of a part: images in memory [N, C, H, W], or their files; labels [N]."""

    images: Tensor | tuple[Path, ...]
    labels: Tensor


@dataclass(frozen=True)
class RawImages:
    """A data set as it was read."""

    classes: tuple[str, ...]
    train: RawSplit
    test: RawSplit


class SafeUnpickler(pickle.Unpickler):
    """Reads numpy arrays and plain values, and runs nothing else."""

    ALLOWED = frozenset({
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
        ("numpy", "dtype"), ("_codecs", "encode"),
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        """Only what rebuilds an array."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return super().find_class(module, name)


def read_images(name: str, folder: Path | None, size: int) -> RawImages:
    """The data set `name` in `folder`; digits needs none. Raises ConfigError for what is absent or damaged."""
    if name == "digits":
        return read_digits()
    if folder is None:
        raise ConfigError(f"dataset.data_dir: required for {name}; only digits needs no files")
    if not folder.is_dir():
        raise ConfigError(f"dataset.data_dir: no folder {folder}: put {name} there, or set dataset.data_dir")
    readers: dict[str, Callable[[Path], RawImages]] = {
        "cifar10": read_cifar10, "cifar100": read_cifar100, "mnist": read_idx, "fashionmnist": read_idx,
        "svhn": read_svhn, "tinyimagenet": read_tiny,
    }  # fmt: skip
    if name in readers:
        return readers[name](folder)
    return read_folders(folder, SUBSETS[name].split() if name in SUBSETS else None)


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
    """The files of those names in `folder` or in a folder below it. Raises ConfigError naming the absent one."""
    for place in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
        if all((place / name).is_file() for name in names):
            return [place / name for name in names]
    raise ConfigError(f"dataset.data_dir: {folder} holds no {names[0]}" + f" to {names[-1]}" * (len(names) > 1))


def unpickle(path: Path) -> dict[str, Any]:
    """One of CIFAR's files."""
    try:
        value = SafeUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise ConfigError(f"{path}: not a file of CIFAR ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: not a file of CIFAR: fetch it again")
    return value


def cifar_split(paths: Sequence[Path], key: str) -> RawSplit:
    """Images and labels of CIFAR's files."""
    parts = [unpickle(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if not {"data", key} <= part.keys() or np.shape(part["data"])[1:] != (3072,):
            raise ConfigError(f"{path}: holds no data of 3072 bytes an image with {key}: fetch it again")
    images = torch.from_numpy(np.concatenate([part["data"] for part in parts])).view(-1, 3, 32, 32)
    return RawSplit(images, torch.tensor([label for part in parts for label in part[key]]))


def read_cifar10(folder: Path) -> RawImages:
    """CIFAR-10's official pickles."""
    train = find(folder, [f"data_batch_{i}" for i in range(1, 6)])
    names = unpickle(train[0].with_name("batches.meta"))["label_names"]
    return RawImages(
        tuple(names), cifar_split(train, "labels"), cifar_split([train[0].with_name("test_batch")], "labels")
    )


def read_cifar100(folder: Path) -> RawImages:
    """CIFAR-100's official pickles, fine labels."""
    train, test, meta = find(folder, ["train", "test", "meta"])
    names = tuple(unpickle(meta)["fine_label_names"])
    return RawImages(names, cifar_split([train], "fine_labels"), cifar_split([test], "fine_labels"))


def idx_array(folder: Path, stem: str) -> Tensor:
    """A tensor in MNIST's IDX format, gzipped or not."""
    plain = [p for p in (folder / stem, folder / f"{stem}.gz", *folder.glob(f"*/{stem}*")) if p.is_file()]
    if not plain:
        raise ConfigError(f"dataset.data_dir: {folder} holds no {stem} or {stem}.gz")
    path = plain[0]
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy())
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise ConfigError(f"{path}: not an IDX file ({error}): fetch it again") from error


def read_idx(folder: Path) -> RawImages:
    """MNIST or Fashion-MNIST."""
    parts = [
        RawSplit(
            idx_array(folder, f"{p}-images-idx3-ubyte")[:, None], idx_array(folder, f"{p}-labels-idx1-ubyte").long()
        )
        for p in ("train", "t10k")
    ]
    return RawImages(tuple(map(str, range(10))), *parts)


def read_svhn(folder: Path) -> RawImages:
    """SVHN's cropped digits, whose label 10 is the digit 0."""
    from scipy.io import loadmat

    parts = []
    for path in find(folder, ["train_32x32.mat", "test_32x32.mat"]):
        found = loadmat(path)
        images = torch.from_numpy(found["X"].transpose(3, 2, 0, 1).copy())
        parts.append(RawSplit(images, torch.from_numpy(found["y"][:, 0].astype(np.int64)) % 10))
    return RawImages(tuple(map(str, range(10))), *parts)


def read_tiny(folder: Path) -> RawImages:
    """Tiny-ImageNet, with its validation part as test; classes are those of wnids.txt that have images."""
    (listed,) = find(folder, ["wnids.txt"])
    root = listed.parent
    wnids = [w for w in listed.read_text().split() if (root / "train" / w).is_dir()]
    if not wnids:
        raise ConfigError(f"{listed}: none of its classes has a folder in {root / 'train'}")
    words = dict(line.split("\t", 1) for line in (root / "words.txt").read_text().splitlines() if "\t" in line)
    notes = [line.split("\t")[:2] for line in (root / "val" / "val_annotations.txt").read_text().splitlines() if line]
    test = [(root / "val" / "images" / file, wnids.index(wnid)) for file, wnid in notes if wnid in wnids]
    train = [(path, c) for c, w in enumerate(wnids) for path in sorted((root / "train" / w / "images").iterdir())]
    names = tuple(words.get(w, w).split(",")[0] for w in wnids)
    return RawImages(names, listed_split(train), listed_split(test))


def read_folders(folder: Path, wanted: Sequence[str] | None) -> RawImages:
    """One folder a class under train/ and under val/ or test/; `wanted` names the classes, else all are taken."""
    train = folder / "train"
    held_out = folder / ("test" if (folder / "test").is_dir() else "val")
    for part in (train, held_out):
        if not part.is_dir():
            raise ConfigError(f"dataset.data_dir: {folder} holds no {part.name}/ with a folder of images a class")
    names = list(wanted or sorted(p.name for p in train.iterdir() if p.is_dir()))
    absent = [name for name in names if not (train / name).is_dir()]
    if absent or not names:
        raise ConfigError(f"dataset.data_dir: {train} holds no folder {absent[0] if absent else 'of a class'}")
    parts = [
        [(p, c) for c, n in enumerate(names) for p in sorted((part / n).glob("*")) if p.suffix.lower() in IMAGES]
        for part in (train, held_out)
    ]
    return RawImages(tuple(names), listed_split(parts[0]), listed_split(parts[1]))


def listed_split(items: Sequence[tuple[Path, int]]) -> RawSplit:
    """Files and their labels."""
    return RawSplit(tuple(path for path, _ in items), torch.tensor([label for _, label in items], dtype=torch.long))


def decode_files(paths: Sequence[Path], size: int) -> Tensor:
    """Colour images [N, 3, size, size] uint8: the shorter side brought to `size`, the centre cut out."""

    def one(path: Path) -> Tensor:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ConfigError(f"{path}: cannot be read as an image: remove it or fetch it again") from error
        return fit_size(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None], size)[0]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, paths))
    return torch.stack(found) if found else torch.zeros(0, 3, size, size, dtype=torch.uint8)


def fit_size(images: Tensor, size: int) -> Tensor:
    """Images [N, C, H, W] uint8 with the shorter side resized (antialiased) to `size` and the centre cut out."""
    height, width = images.shape[-2:]
    if min(height, width) != size:
        scale = size / min(height, width)
        target = (max(size, round(height * scale)), max(size, round(width * scale)))
        images = torch.nn.functional.interpolate(
            images.float(), target, mode="bilinear", antialias=True, align_corners=False
        ).round().clamp(0, 255).to(torch.uint8)  # fmt: skip
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]
