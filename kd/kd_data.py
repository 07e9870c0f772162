"""Images of teacher and student: one view of a sample an epoch, whatever the batch, the rank or the student."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from config import ConfigError
from kd.kd_config import Dataset, KdConfig
from utils.ddp import World
from utils.downloads import ARCHIVES, fetch_dataset
from utils.image_readers import RawSplit, read_images
from utils.normaliser import Normaliser
from utils.streams import generator
from utils.utils_image import ImageDatasetConfig, ImageSet, fingerprint, in_memory, measure, stratified, take
from utils.views import check_crop, crop_flip, resized_views, view_numbers

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
    """The data set, its training part cut to PER_CLASS and VAL_FRACTION held out. Raises ConfigError."""
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
    if d.PER_CLASS:
        first = [(train.labels == c).nonzero().flatten()[: d.PER_CLASS] for c in range(len(raw.classes))]
        train = part(train, torch.cat(first).sort().values)
    held_out = None
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


class Batches:
    """The training batches of this rank: order and views are streams of (seed, epoch) and of the sample alone."""

    def __init__(self, data: KdData, cfg: KdConfig, world: World) -> None:
        """Raises ConfigError for fewer samples than ranks, or images too small for the crops."""
        d, batch, count = cfg.DATASET, cfg.SOLVER.BATCH_SIZE, len(data.train)
        if batch < world.size:
            raise ConfigError(f"SOLVER.BATCH_SIZE: {batch} is of {world.size} ranks together; raise it")
        self.data, self.batch, self.seed, self.world = data, batch, cfg.SEED, world
        self.fixed = cfg.KD.CACHE_VIEWS  # epochs take so many views in turn; 0 = every epoch its own
        # A rank without a sample, and a batch norm of one, have no statistics.
        drop = count > batch and (d.DROP_LAST or count % batch < max(2, world.size))
        self.used = count - count % batch if drop else count
        self.steps = -(-self.used // batch)
        self.train = data.train.to(world.device)
        self.labels = data.train.labels.to(world.device)
        check_crop(data.train.size, data.size, data.pad)

    def begin(self, epoch: int) -> None:
        """Draw the order and the views of epoch 0, 1, ...; they go to the device at once."""
        order = torch.randperm(len(self.train), generator=generator(self.seed, "kd order", epoch))[: self.used]
        self.parts = order.split(self.batch)
        self.own = [part[self.world.rank :: self.world.size] for part in self.parts]
        self.view = epoch % self.fixed if self.fixed else epoch
        self.on_device = torch.cat(self.own).to(self.world.device).split([len(part) for part in self.own])
        if self.data.resized:
            self.make = resized_views(self.train, self.seed, self.view, self.data.size)
            return
        numbers = view_numbers(self.seed, self.view, len(self.train)).to(self.world.device)
        if not self.data.flip:
            numbers[:, 2] = 1
        self.make = lambda which: crop_flip(
            self.train.levels(which).to(self.world.device), numbers[which], self.data.size, self.data.pad
        )

    def input(self, which: Tensor) -> Tensor:
        """Normalised views [B, C, size, size] of samples [B], which are on the device."""
        return self.train.normaliser(self.make(which).to(self.world.device).float() / 255)

    def get(self, turn: int) -> tuple[Tensor, Tensor, Tensor]:
        """Batch number `turn` of the epoch on this rank: views [B, C, H, W], class ids [B], sample ids [B]."""
        which = self.on_device[turn]
        return self.input(which), self.labels[which], which

    def share(self, turn: int) -> float:
        """What this rank's mean counts for in the mean over the whole batch, times the ranks."""
        return len(self.own[turn]) * self.world.size / len(self.parts[turn])
