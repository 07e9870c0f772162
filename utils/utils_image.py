"""Image data as tensors: bytes in memory (or files), read by sample id as normalised batches."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

from config import ConfigError
from utils.data_config import DataConfig
from utils.foreign_files import reading
from utils.image_readers import FORMATS, RawSplit, read_images
from utils.normaliser import Normaliser
from utils.streams import generator

GREY = ("digits", "mnist", "fashionmnist")


class ImageDatasetConfig(DataConfig):
    """Which images."""

    size: int = Field(ge=8)  # pixels of a side

    @property
    def channels(self) -> int:
        """Of its images, known without them."""
        return 1 if self.dataset in GREY else 3

    @property
    def absent(self) -> bool:
        """Whether it is not there to be read."""
        return self.dataset != "digits" and (self.data_dir is None or not self.data_dir.exists())


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one size."""

    images: Tensor | tuple[Path, ...]  # uint8 [N, C, H, W], or files
    targets: Tensor  # [N, classes] one-hot or soft
    size: int
    normaliser: Normaliser

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def labels(self) -> Tensor:
        """Class ids [N]."""
        return self.targets.argmax(1)

    @property
    def lengths(self) -> Tensor:
        """All alike [N]: batches are drawn as for text, whose samples differ in length."""
        return torch.ones(len(self), dtype=torch.long)

    def levels(self, samples: Tensor) -> Tensor:
        """Images [B, C, H, W] uint8."""
        if isinstance(self.images, Tensor):
            return self.images[samples.to(self.images.device)]
        return decode_files([self.images[i] for i in samples.tolist()], self.size)

    def pixels(self, samples: Tensor) -> Tensor:
        """Images [B, C, H, W] in 0 ... 1."""
        return self.levels(samples).float() / 255

    def input(self, samples: Tensor, device: torch.device) -> Tensor:
        """Normalised images [B, C, H, W]."""
        return self.normaliser(self.pixels(samples).to(device))

    def batch(self, samples: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Normalised images [B, C, H, W] with their targets [B, classes]."""
        return self.input(samples, device), self.targets[samples].to(device)

    def subset(self, samples: Tensor) -> "ImageSet":
        """These images only."""
        if isinstance(self.images, Tensor):
            images: Tensor | tuple[Path, ...] = self.images[samples.to(self.images.device)]
        else:
            images = tuple(self.images[i] for i in samples.tolist())
        return ImageSet(images, self.targets[samples], self.size, self.normaliser)

    def members(self) -> list[Tensor]:
        """Sample ids of every class."""
        labels = self.labels
        return [(labels == c).nonzero().flatten() for c in range(self.targets.shape[1])]

    def to(self, device: torch.device) -> "ImageSet":
        """The same images on `device`, where they are in memory."""
        images = self.images.to(device) if isinstance(self.images, Tensor) else self.images
        return ImageSet(images, self.targets, self.size, self.normaliser.to(device))

    @property
    def channels(self) -> int:
        """Colour channels."""
        return len(self.normaliser.mean)

    @property
    def data_bytes(self) -> int:
        """Bytes of the images, one a value."""
        return len(self) * self.channels * self.size**2

    @property
    def nbytes(self) -> int:
        """Bytes of the images and of their class ids."""
        return self.data_bytes + len(self) * (1 if self.targets.shape[1] <= 256 else 2)


@dataclass(frozen=True)
class ImageCorpus:
    """A data set ready for use."""

    classes: tuple[str, ...]
    train: ImageSet
    val: ImageSet
    test: ImageSet
    fingerprint: str


def load_images(config: ImageDatasetConfig) -> ImageCorpus:
    """The data set, resized, with a stratified validation part. Raises ConfigError."""
    raw = read_images(config.dataset, config.data_dir)
    if len(raw.classes) != config.nclass:
        raise ConfigError(f"dataset.nclass: {config.nclass}, but {config.dataset} has {len(raw.classes)} classes")
    counts = raw.train.labels.bincount(minlength=config.nclass)
    if int(counts.min()) < 2:
        name = raw.classes[int(counts.argmin())]
        raise ConfigError(f"dataset: class {name} has {int(counts.min())} training images; 2 are the least")
    parts = [in_memory(part, config) for part in (raw.train, raw.val, raw.test) if part is not None]
    if raw.val is None:
        whole = parts[0]
        parts[:1] = [
            RawSplit(take(whole.images, which), whole.labels[which])
            for which in stratified(whole.labels, config.val_fraction)
        ]
    normaliser = measure(parts[0].images, config.size)
    train, val, test = (
        ImageSet(part.images, one_hot(part.labels, config.nclass).float(), config.size, normaliser) for part in parts
    )
    return ImageCorpus(raw.classes, train, val, test, fingerprint((train, val, test)))


def in_memory(part: RawSplit, config: ImageDatasetConfig) -> RawSplit:
    """Images of the wanted size, or their files with `load_memory: false`."""
    if isinstance(part.images, Tensor):
        return RawSplit(fit_size(part.images, config.size), part.labels)
    return RawSplit(decode_files(part.images, config.size), part.labels) if config.load_memory else part


def take(images: Tensor | tuple[Path, ...], which: Tensor) -> Tensor | tuple[Path, ...]:
    """Some of the images."""
    return images[which] if isinstance(images, Tensor) else tuple(images[i] for i in which.tolist())


def stratified(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Sample ids of train and validation: of every class the fraction, at least 1, by the stream (0, "validation")."""
    held = []
    for c in labels.unique().tolist():
        ids = (labels == c).nonzero().flatten()
        order = torch.randperm(len(ids), generator=generator(0, "validation", c))
        held.append(ids[order[: max(1, round(fraction * len(ids)))]])
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[torch.cat(held)] = True
    return (~mask).nonzero().flatten(), mask.nonzero().flatten()


def measure(images: Tensor | tuple[Path, ...], size: int) -> Normaliser:
    """Mean and deviation of the channels; of at most 2,000 files, evenly spaced."""
    if not isinstance(images, Tensor):
        images = decode_files(images[:: -(-len(images) // 2000)], size)
    # From the counts of the 256 levels: exact, and without a float copy of the images.
    counts = torch.stack([images[:, c].flatten().bincount(minlength=256) for c in range(images.shape[1])]).double()
    levels, total = torch.arange(256).double() / 255, counts.sum(1)
    mean = counts @ levels / total
    variance = (counts * (levels - mean[:, None]) ** 2).sum(1) / (total - 1)
    return Normaliser(mean.float(), variance.sqrt().clamp_min(1e-3).float())


def fingerprint(parts: tuple[ImageSet, ...]) -> str:
    """Short name of the data: its bytes, or its files' names and sizes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.labels.numpy().tobytes())
        if isinstance(part.images, Tensor):
            digest.update(part.images.numpy().tobytes())
        else:
            digest.update("".join(f"{path.name}{path.stat().st_size}" for path in part.images).encode())
    return digest.hexdigest()[:16]


def decode_files(paths: Sequence[Path], size: int) -> Tensor:
    """Colour images [N, 3, size, size] uint8: the shorter side brought to `size`, the centre cut out."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda path: fit_size(decode(path)[None], size)[0], paths))
    return torch.stack(found) if found else torch.zeros(0, 3, size, size, dtype=torch.uint8)


def decode(path: Path) -> Tensor:
    """A file's image in colour [3, H, W] uint8. Raises ConfigError."""
    from PIL import Image

    with (
        reading(path, "an image", SyntaxError, Image.DecompressionBombError),
        Image.open(path, formats=FORMATS) as file,
    ):
        return torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)


def fit_size(images: Tensor, size: int) -> Tensor:
    """Images [N, C, H, W] uint8 with the shorter side resized (antialiased) to `size` and the centre cut out."""
    height, width = images.shape[-2:]
    if min(height, width) != size:
        scale = size / min(height, width)
        target = (max(size, round(height * scale)), max(size, round(width * scale)))
        images = torch.cat([resize(part, target) for part in images.split(4096)])  # float values are four times as long
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def resize(images: Tensor, target: tuple[int, int]) -> Tensor:
    """Images [N, C, H, W] uint8 at `target` height and width, antialiased."""
    found = interpolate(images.float(), target, mode="bilinear", antialias=True, align_corners=False)
    return found.round().clamp(0, 255).to(torch.uint8)
