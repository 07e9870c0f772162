"""Training views of images, a random crop and perhaps its mirror image, set by (seed, epoch, sample id) alone.

No view depends on the batch, the rank or the device that it is made for.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from config import ConfigError
from utils.streams import generator
from utils.utils_image import ImageSet, decode, resize

AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of a resized crop (Szegedy et al. 2015), as torchvision draws it


def check_crop(side: int, size: int, pad: int) -> None:
    """Raises ConfigError unless images of that side, with that padding, have a crop of that size."""
    if size > side + 2 * pad:
        raise ConfigError(f"crop: {size} pixels of a side, but images of {side} padded by {pad} have {side + 2 * pad}")


def view_numbers(seed: int, epoch: int, count: int) -> Tensor:
    """Numbers [count, 3] in 0 ... 1 for row, column, mirror; row i is sample i's whatever `count` is."""
    return torch.rand(count, 3, generator=generator(seed, "view", epoch))


def crop_flip(images: Tensor, numbers: Tensor, size: int, pad: int = 0) -> Tensor:
    """Crops [B, C, size, size] of images [B, C, H, W] that `pad` zeros surround, mirrored where the third number < 1/2.

    Numbers [B, 3] in 0 ... 1 on the same device; the first two choose among the places of the crop.
    """
    padded = F.pad(images, (pad, pad, pad, pad))
    height, width = padded.shape[2:]
    # u n can round to n for u just below 1.
    top, left = ((numbers[:, i] * (s - size + 1)).long().clamp_max(s - size) for i, s in enumerate((height, width)))
    place = torch.arange(size, device=images.device)
    rows = top[:, None] + place
    columns = left[:, None] + torch.where(numbers[:, 2, None] < 0.5, size - 1 - place, place)
    where = (rows[:, :, None] * width + columns[:, None]).flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return padded.flatten(2).gather(2, where).unflatten(2, (size, size))


def resized_views(data: ImageSet, seed: int, epoch: int, size: int) -> Callable[[Tensor], Tensor]:
    """From sample ids [B] to their views of the epoch, [B, 3, size, size] uint8, cut from the files in full size.

    Raises ConfigError where the images are in memory, in one size.
    """
    files = data.images
    if isinstance(files, Tensor):
        raise ConfigError("dataset.load_memory: resized crops are cut from files; set it to false, or crop unresized")

    def one(i: int) -> Tensor:
        return resized_crop_flip(decode(files[i]), size, generator(seed, "view", epoch, i))

    def views(samples: Tensor) -> Tensor:
        with ThreadPoolExecutor(8) as pool:
            return torch.stack(list(pool.map(one, samples.tolist())))

    return views


def resized_crop_flip(image: Tensor, size: int, gen: Generator) -> Tensor:
    """A random part of an image [C, H, W] uint8 at [C, size, size], mirrored for one in two."""
    top, left, height, width = crop_box(image.shape[1], image.shape[2], gen)
    found = resize(image[None, :, top : top + height, left : left + width], (size, size))[0]
    return found.flip(2) if float(torch.rand(1, generator=gen)) < 0.5 else found


def crop_box(height: int, width: int, gen: Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a part of AREA of the image and of a RATIO of sides, uniform in its logarithm.

    The first of TRIES draws that fits; else the largest centred part of such a ratio.
    """
    for area, ratio, down, right in torch.rand(TRIES, 4, generator=gen).tolist():
        pixels = height * width * (AREA[0] + area * (AREA[1] - AREA[0]))
        sides = math.exp(math.log(RATIO[0]) + ratio * math.log(RATIO[1] / RATIO[0]))  # width / height
        tall, wide = round(math.sqrt(pixels / sides)), round(math.sqrt(pixels * sides))
        if 0 < tall <= height and 0 < wide <= width:
            return int(down * (height - tall + 1)), int(right * (width - wide + 1)), tall, wide
    tall, wide = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return (height - tall) // 2, (width - wide) // 2, tall, wide
