"""Synthetic images: where they start, how one image becomes several training samples, and what they look like."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from condenser.synthetic_set import SyntheticSet
from config import ConfigError
from utils.checkpoint import atomic_write
from utils.normaliser import Normaliser
from utils.utils_image import ImageSet

DecodeType = Literal["single", "multi"]


def tiles_a_side(factor: int, kind: DecodeType) -> tuple[int, ...]:
    """Tiles a side of every cut of a stored image."""
    return (factor,) if kind == "single" else tuple(range(1, factor + 1))


def samples_per_image(factor: int, kind: DecodeType) -> int:
    """Training samples that one stored image stands for."""
    return sum(f**2 for f in tiles_a_side(factor, kind))


def check_decoding(size: int, factor: int, kind: DecodeType) -> None:
    """Raises ConfigError unless images of `size` pixels a side can be cut into equal tiles."""
    for f in tiles_a_side(factor, kind):
        if size % f:
            cuts = "" if kind == "single" else f" (decode_type: multi cuts by every number up to {factor})"
            raise ConfigError(f"condense.factor: {f} must divide dataset.size: {size}{cuts}")


def decode(data: Tensor, factor: int, kind: DecodeType) -> Tensor:
    """Images [N, C, H, W] -> samples [N * samples_per_image, C, H, W], those of an image side by side.

    single: the factor x factor tiles, brought to full size; multi: those of 1, 2 ... factor tiles a side (Kim et al.,
    IDC, 2022). Raises ConfigError where tiles do not divide the side.
    """
    check_decoding(data.shape[-1], factor, kind)
    parts = [tiles(data, f) for f in tiles_a_side(factor, kind)]  # [N, f * f, C, H, W]
    return torch.cat(parts, 1).flatten(0, 1)


def tiles(data: Tensor, factor: int) -> Tensor:
    """The factor x factor tiles of images [N, C, H, W], bilinearly brought to full size: [N, factor^2, C, H, W]."""
    count, channels, height, width = data.shape
    cut = data.view(count, channels, factor, height // factor, factor, width // factor)
    cut = cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    if factor > 1:
        cut = F.interpolate(cut, (height, width), mode="bilinear", align_corners=False)
    return cut.view(count, factor**2, channels, height, width)


def mosaic(images: Tensor, factor: int) -> Tensor:
    """Images [N * factor^2, C, H, W] -> [N, C, H, W], each made of factor^2 of them, averaged down to a tile."""
    _, channels, height, width = images.shape
    small = F.interpolate(images, (height // factor, width // factor), mode="area")
    grid = small.view(-1, factor, factor, channels, height // factor, width // factor)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)


def initial_class(
    init: Literal["random", "noise", "mix"], images: ImageSet, members: Tensor, ipc: int, factor: int, gen: Generator
) -> Tensor:
    """Pixels [ipc, C, H, W] of one class: `random` real images, `mix` mosaics of factor^2 of them, or `noise`."""
    if init == "noise":
        shape = (ipc, images.channels, images.size, images.size)
        return (0.5 + 0.25 * torch.randn(shape, generator=gen)).clamp(0, 1)
    each = factor**2 if init == "mix" else 1
    order = members[torch.randperm(len(members), generator=gen)]
    chosen = order[torch.arange(ipc * each) % len(order)]  # a small class begins again
    pixels = images.pixels(chosen).cpu()
    return mosaic(pixels, factor) if init == "mix" else pixels


@dataclass(frozen=True)
class SyntheticImages:
    """A synthetic set as a student reads it: decoded and normalised."""

    data: Tensor  # [N, C, H, W]
    targets: Tensor  # [N, classes]

    def __len__(self) -> int:
        return len(self.data)

    @property
    def lengths(self) -> Tensor:
        """All alike [N]."""
        return torch.ones(len(self), dtype=torch.long)

    def input(self, samples: Tensor, device: torch.device) -> Tensor:
        """Images [B, C, H, W]."""
        return self.data[samples].to(device)

    def batch(self, samples: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] with their targets [B, classes]."""
        return self.input(samples, device), self.targets[samples].to(device)


def student_view(found: SyntheticSet, normaliser: Normaliser) -> SyntheticImages:
    """Decode a synthetic set of pixels by its own notes; every sample has its image's labels.

    Raises ConfigError for notes that cannot be followed; without notes an image is one sample.
    """
    factor, named = found.meta.get("factor", 1), found.meta.get("decode_type", "single")
    if not isinstance(factor, int) or factor < 1:
        raise ConfigError(f"synthetic set: its factor is {factor!r}, which must be an integer of at least 1")
    if named not in get_args(DecodeType):
        raise ConfigError(f"synthetic set: its decode_type is {named!r}, not one of {', '.join(get_args(DecodeType))}")
    kind: DecodeType = "multi" if named == "multi" else "single"
    data = normaliser(decode(found.data, factor, kind))
    return SyntheticImages(data, found.targets.repeat_interleave(samples_per_image(factor, kind), 0))


def image_grid(found: SyntheticSet, path: Path, per_class: int = 10) -> None:
    """Write a PNG: a row a class with its first images, enlarged to be seen."""
    from PIL import Image
    from torchvision.utils import make_grid

    rows = [found.data[found.owner == c][:per_class] for c in found.owner.unique()]
    width = max(map(len, rows))
    filled = torch.cat([torch.cat([row, row.new_ones(width - len(row), *row.shape[1:])]) for row in rows])
    scale = max(1, 64 // filled.shape[-1])
    large = F.interpolate(filled.clamp(0, 1), scale_factor=scale, mode="nearest")
    picture = (make_grid(large, nrow=width, padding=2, pad_value=1.0) * 255).round().to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    atomic_write(path, buffer.getvalue())
