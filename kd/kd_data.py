"""Images of teacher and student, as their settings name them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from config import ConfigError
from kd.kd_config import Dataset
from utils.downloads import ARCHIVES, fetch_dataset
from utils.image_readers import RawSplit, read_images
from utils.normaliser import Normaliser
from utils.utils_image import ImageDatasetConfig, ImageSet, fingerprint, in_memory, measure, stratified, take

# Side of the input, side of what crops are taken from, padding, as in the papers; any other set has LARGE.
SIZES = {name: (32, 32, 4) for name in ("cifar10", "cifar100", "digits", "mnist", "fashionmnist", "svhn")} | {
    "tinyimagenet": (64, 64, 8)
}
LARGE = (224, 256, 0)
# What public teachers were trained with; other sets are measured.
IMAGENET = Normaliser(torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))
CONSTANTS = {
    "cifar100": Normaliser(torch.tensor([0.5071, 0.4867, 0.4408]), torch.tensor([0.2675, 0.2565, 0.2761])),
    "imagenet": IMAGENET,
    "cub200": IMAGENET,
}


@dataclass(frozen=True)
class KdData:
    """A data set for teacher and student; images are of `load_size`, networks see `size` pixels a side."""

    classes: tuple[str, ...]
    train: ImageSet
    held_out: ImageSet | None
    test: ImageSet
    size: int
    pad: int
    flip: bool
    resized: bool  # crops of any size and shape, from the files
    fingerprint: str

    def test_input(self, part: ImageSet, which: Tensor, device: torch.device) -> Tensor:
        """The centres [B, C, size, size] of test images, normalised."""
        x, edge = part.input(which, device), (part.size - self.size) // 2
        return x[..., edge : edge + self.size, edge : edge + self.size]


def load_kd_data(d: Dataset) -> KdData:
    """The data set, its training part cut to PER_CLASS, the rest of it or VAL_FRACTION held out. Raises ConfigError."""
    usual, load, pad = SIZES.get(d.TYPE, LARGE)
    size, pad = d.SIZE or usual, pad if d.PAD is None else d.PAD
    load = d.LOAD_SIZE or load * size // usual
    if load < size:
        raise ConfigError(f"DATASET.LOAD_SIZE: {load} is less than the input's {size} pixels; raise it")
    folder = data_folder(d)
    raw = read_images(d.TYPE, folder)
    settings = ImageDatasetConfig(
        dataset=d.TYPE, nclass=len(raw.classes), data_dir=folder, size=load, load_memory=d.IN_MEMORY
    )
    train, test = in_memory(raw.train, settings), in_memory(raw.test, settings)
    normaliser = CONSTANTS.get(d.TYPE) or measure(train.images, load)  # of all images, as the teacher's
    held_out = None
    if d.PER_CLASS:
        first = torch.zeros(len(train.labels), dtype=torch.bool)
        for c in range(len(raw.classes)):
            first[(train.labels == c).nonzero().flatten()[: d.PER_CLASS]] = True
        held_out = part(train, (~first).nonzero().flatten()) if d.VAL_REST and not first.all() else None
        train = part(train, first.nonzero().flatten())
    if d.VAL_FRACTION:
        kept, held = stratified(train.labels, d.VAL_FRACTION)
        train, held_out = part(train, kept), part(train, held)
    sets = [
        ImageSet(p.images, one_hot(p.labels, len(raw.classes)).float(), load, normaliser)
        for p in (train, test, held_out)
        if p is not None
    ]
    return KdData(
        raw.classes, sets[0], sets[2] if held_out else None, sets[1], size, pad, d.FLIP, d.resized,
        fingerprint(tuple(sets)),
    )  # fmt: skip


def data_folder(d: Dataset) -> Path | None:
    """Where the data set lies, fetched first where that is allowed; None for digits. Raises ConfigError."""
    if d.TYPE == "digits":
        return None
    if d.TYPE in ARCHIVES:
        return fetch_dataset(d.TYPE, d.ROOT)
    found = next((p for p in (d.ROOT / d.TYPE, d.ROOT) if p.is_dir()), None)
    if found is None:
        raise ConfigError(f"{d.ROOT / d.TYPE}: no such folder: put {d.TYPE} there, or set DATASET.ROOT")
    return found


def part(split: RawSplit, which: Tensor) -> RawSplit:
    """Some of the samples."""
    return RawSplit(take(split.images, which), split.labels[which])
