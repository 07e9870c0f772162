"""Image augmentation with its random numbers apart: draw them once, apply them to any images, differentiably.

Differentiable Siamese augmentation (Zhao & Bilen, 2021): real and synthetic images meet the same parameters.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field, model_validator
from torch import Generator, Tensor

from config import ConfigError, Section
from config.schema import nearest

COLOUR = ("color", "brightness", "saturation", "contrast")
PLACE = ("crop", "flip", "scale", "rotate")
OPERATIONS = (*COLOUR, *PLACE, "cutout")
VIEWS = ("none", "hflip", "fivecrop", "hflip5", "shift")
VIEW_CROP = 0.875  # of a side
# Published: brightness +- 0.5, saturation up to x2, contrast x0.5 to x1.5, shifts of 1/8, squares of half a side.
BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
CROP, CUTOUT, SCALE, ROTATE = 0.125, 0.5, 1.2, 15.0


def operations(strategy: str) -> tuple[tuple[str, ...], ...]:
    """The steps that `strategy` names, each with its alternatives; `none` is none. Raises ConfigError.

    color_crop is both; color_crop/scale is colour, and one of crop and scale for the whole batch.
    """
    steps = tuple(tuple(step.split("/")) for step in strategy.split("_") if step not in ("", "none"))
    wrong = [name for step in steps for name in step if name not in OPERATIONS]
    if wrong:
        raise ConfigError(
            f"augmentation: '{wrong[0]}' is not one of {', '.join(OPERATIONS)}{nearest(wrong[0], OPERATIONS)}"
        )
    return steps


def known(strategy: str) -> str:
    """A strategy, all of whose operations exist. Raises ConfigError."""
    operations(strategy)
    return strategy


AugType = Annotated[str, AfterValidator(known)]


@dataclass(frozen=True)
class Augmentation:
    """Operations and their uniform numbers in 0 ... 1: one row for all images, or one for each."""

    names: tuple[str, ...]
    numbers: dict[str, Tensor]  # of an operation: [B or 1, 3]

    def part(self, which: slice) -> "Augmentation":
        """The same of some of the images, where each has its own numbers."""
        return Augmentation(self.names, {name: u[which] for name, u in self.numbers.items()})

    def __call__(self, x: Tensor) -> Tensor:
        """The images [B, C, H, W], augmented: colour first, then place, then cutout."""
        for name in OPERATIONS:
            if name in self.names and name != "color":
                x = APPLY[name](x, self.numbers[name].to(x))
        return x


def draw_augmentation(strategy: str, count: int, gen: Generator) -> Augmentation:
    """An augmentation for `count` images, or with 1 the same for any number of them (Siamese)."""
    steps = operations(strategy)
    # All operations are drawn whatever the strategy names, so that naming one more changes no other.
    numbers = {name: torch.rand(count, 3, generator=gen) for name in OPERATIONS[1:]}
    names = tuple(s[0] if len(s) == 1 else s[int(torch.randint(len(s), (1,), generator=gen))] for s in steps)
    if "color" in names:
        names = (*COLOUR[1:], *(name for name in names if name not in COLOUR))
    return Augmentation(names, numbers)


def spread(u: Tensor, column: int) -> Tensor:
    """A column of numbers [B, 3] in the shape of images: [B, 1, 1, 1]."""
    return u[:, column, None, None, None]


def brightness(x: Tensor, u: Tensor) -> Tensor:
    """x + b, b within half of BRIGHTNESS."""
    return x + (spread(u, 0) - 0.5) * BRIGHTNESS


def saturation(x: Tensor, u: Tensor) -> Tensor:
    """Colour's distance from its grey times a factor between 0 and SATURATION."""
    grey = x.mean(1, keepdim=True)
    return (x - grey) * (spread(u, 0) * SATURATION) + grey


def contrast(x: Tensor, u: Tensor) -> Tensor:
    """The distance from the image's mean times a factor between 1 - CONTRAST and 1 + CONTRAST."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (1 + (2 * spread(u, 0) - 1) * CONTRAST) + mean


def crop(x: Tensor, u: Tensor) -> Tensor:
    """A shift by whole pixels, at most CROP of a side, zeros coming in."""
    count, _, height, width = x.shape
    most = [int(side * CROP + 0.5) for side in (height, width)]
    padded = F.pad(x, (most[1], most[1], most[0], most[0]))
    first = [(u[:, i] * (2 * m + 1)).long().clamp_max(2 * m) for i, m in enumerate(most)]  # row and column [B or 1]
    if len(u) == 1:
        row, column = map(int, first)
        return padded[..., row : row + height, column : column + width]
    rows, columns = (
        start[:, None] + torch.arange(side, device=x.device) for start, side in zip(first, (height, width), strict=True)
    )
    every = torch.arange(count, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[every, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip(x: Tensor, u: Tensor) -> Tensor:
    """A mirror image, for one in two."""
    return torch.where(spread(u, 0) < 0.5, x.flip(3), x)


def warp(x: Tensor, matrix: Tensor) -> Tensor:
    """Images seen through an affine map [B or 1, 2, 3] of output to input places."""
    grid = F.affine_grid(matrix.expand(len(x), -1, -1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def scale(x: Tensor, u: Tensor) -> Tensor:
    """Each side stretched by its own factor between 1 / SCALE and SCALE."""
    factor = 1 / SCALE + u[:, :2] * (SCALE - 1 / SCALE)
    zero = torch.zeros_like(factor[:, 0])
    rows = [torch.stack([factor[:, 0], zero, zero], 1), torch.stack([zero, factor[:, 1], zero], 1)]
    return warp(x, torch.stack(rows, 1))


def rotate(x: Tensor, u: Tensor) -> Tensor:
    """A turn by at most ROTATE degrees."""
    angle = (2 * u[:, 0] - 1) * (ROTATE * math.pi / 180)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return warp(x, torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1))


def cutout(x: Tensor, u: Tensor) -> Tensor:
    """Zeros in a square of CUTOUT of a side, which may reach over the border."""
    height, width = x.shape[2:]
    inside = []
    for i, side in ((0, height), (1, width)):
        size = int(side * CUTOUT + 0.5)
        first = (u[:, i] * (side + (1 - size % 2))).long()[:, None] - size // 2
        place = torch.arange(side, device=x.device)
        inside.append((place >= first) & (place < first + size))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return x.masked_fill(hole, 0.0)


APPLY = {
    "brightness": brightness, "saturation": saturation, "contrast": contrast, "crop": crop, "flip": flip,
    "scale": scale, "rotate": rotate, "cutout": cutout,
}  # fmt: skip


def cutmix(x: Tensor, targets: Tensor, gen: Generator, beta: float, probability: float) -> tuple[Tensor, Tensor]:
    """A rectangle of every image [B, C, H, W] from another one, labels [B, C] mixed by its area (Yun et al. 2019).

    The share is Beta(beta, beta); with 1 - `probability` the batch stays as it is.
    """
    if float(torch.rand(1, generator=gen)) >= probability:
        return x, targets
    share, (height, width) = beta_draw(beta, gen), x.shape[2:]
    order = torch.randperm(len(x), generator=gen).to(x.device)
    sides = [round(side * math.sqrt(1 - share)) for side in (height, width)]
    first = [int(torch.rand(1, generator=gen) * (side - s + 1)) for side, s in zip((height, width), sides, strict=True)]
    mixed = x.clone()
    where = (..., slice(first[0], first[0] + sides[0]), slice(first[1], first[1] + sides[1]))
    mixed[where] = x[order][where]
    area = sides[0] * sides[1] / (height * width)
    return mixed, (1 - area) * targets + area * targets[order]


def mixup(x: Tensor, targets: Tensor, gen: Generator, alpha: float) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] and labels [B, C] blended with others by a share ~ Beta(alpha, alpha) (Zhang et al. 2018)."""
    share, order = beta_draw(alpha, gen), torch.randperm(len(x), generator=gen).to(x.device)
    return share * x + (1 - share) * x[order], share * targets + (1 - share) * targets[order]


def beta_draw(a: float, gen: Generator) -> float:
    """One number ~ Beta(a, a) from the stream."""
    one, other = torch._standard_gamma(torch.tensor([a, a], dtype=torch.float64), generator=gen).tolist()
    return one / max(one + other, 1e-12)


def views(x: Tensor, mode: str) -> list[Tensor]:
    """Test-time views [B, C, H, W] of raw pixels [B, C, H, W], whose logits are averaged. Raises ConfigError.

    hflip: the image and its mirror image; fivecrop: the four corners and the centre, VIEW_CROP of a side, bilinearly
    brought to full size; hflip5: these and their mirror images; shift: the image and its four shifts by a pixel, the
    border repeated.
    """
    height, width = x.shape[2:]
    if mode == "none":
        return [x]
    if mode == "hflip":
        return [x, x.flip(3)]
    if mode == "shift":
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return [padded[..., i : i + height, j : j + width] for i, j in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))]
    if mode in ("fivecrop", "hflip5"):
        tall, wide = round(VIEW_CROP * height), round(VIEW_CROP * width)
        down, right = height - tall, width - wide
        corners = ((0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2))
        crops = [
            F.interpolate(x[..., i : i + tall, j : j + wide], (height, width), mode="bilinear", align_corners=False)
            for i, j in corners
        ]
        return crops if mode == "fivecrop" else [*crops, *(crop.flip(3) for crop in crops)]
    raise ConfigError(f"view: {mode} is not one of {', '.join(VIEWS)}{nearest(mode, VIEWS)}")


@torch.no_grad()
def view_logits(
    net_logits: Callable[[Tensor], Tensor], pixels: Tensor, mode: str, normalise: Callable[[Tensor], Tensor]
) -> Tensor:
    """Logits [B, C] of raw pixels [B, C, H, W] by a network in eval mode, mean over their views. Raises ConfigError."""
    first, *others = (net_logits(normalise(view)) for view in views(pixels, mode))
    for logits in others:  # one after another: the order of a reduction may depend on the place in the batch
        first = first + logits
    return first / (1 + len(others))


class BatchAugmentConfig(Section):
    """What a training batch goes through; a base of the sections that train on images."""

    aug_type: AugType = "none"  # of every image on its own, as in color_flip_crop/scale: `/` for one of them a batch
    cutmix: float = Field(0.0, ge=0, le=1)  # probability; the share of the other image is uniform
    mixup: float = Field(0.0, ge=0)  # alpha of the Beta distribution of shares; 0 = off

    @model_validator(mode="after")
    def one_mixture(self) -> "BatchAugmentConfig":
        """CutMix or MixUp, not both."""
        if self.cutmix and self.mixup:
            raise ValueError(f"mixup: {self.mixup} and cutmix: {self.cutmix} both mix images; set one to 0")
        return self


@dataclass(frozen=True)
class Augmenter:
    """`aug_type` for every image of a batch on its own, then CutMix or MixUp."""

    aug_type: str
    cutmix: float = 0.0
    mixup: float = 0.0

    def __call__(self, x: Tensor, targets: Tensor, gen: Generator) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] and targets [B, C], augmented by numbers of the stream."""
        x = draw_augmentation(self.aug_type, len(x), gen)(x)
        if self.mixup:
            return mixup(x, targets, gen, self.mixup)
        return cutmix(x, targets, gen, beta=1.0, probability=self.cutmix) if self.cutmix else (x, targets)
