"""Logits of an image's regions: cells of an m x m grid over the last map, for every scale m (SDD, CVPR 2024, eq. 2-7).

The classifier is affine and the weights of a region sum to 1, so it may be applied before or after any averaging:
Z = P X W^T + b = P (X W^T + b). That is why it needs to read only the finest cells, each once.
"""

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ConfigError

Bins = Literal["exact", "adaptive"]


def parse_scales(text: str | Sequence[int]) -> tuple[int, ...]:
    """Ascending scales of `[1,2]`, `[1, 2]`, `1,2` or a list. ConfigError: no such list, or without 1."""
    words = re.split(r"\s*,\s*", str(text).strip(" []()").removesuffix(","))
    scales = sorted({int(word) for word in words if word.isdecimal()})
    if len(scales) < len(words) or 0 in scales:
        raise ConfigError(f"M: {text} is not a list of different grid sizes; write it as [1,2,4]")
    if 1 not in scales:
        raise ConfigError(f"M: {text} lacks 1, the whole image, to which regions are compared; add it")
    return tuple(scales)


def pool_matrix(height: int, width: int, scales: Sequence[int], bins: Bins = "exact") -> Tensor:
    """P [N, H * W], float64: weights of pixels in regions, scale by scale, each row by row; rows sum to 1.

    exact: the area of the cell on the pixel, so that scale 1 is the mean for any H, W. adaptive: as published, from a
    4 x 4 grid of cells that overlap unless 4 divides H and W. ConfigError: adaptive with other scales than 1, 2, 4.
    """
    if bins == "adaptive" and not {*scales} <= {1, 2, 4}:
        raise ConfigError(f"M: {list(scales)}, but adaptive bins are published for 1, 2 and 4 only; set bins exact")
    return torch.cat([torch.kron(_cells(height, m, bins), _cells(width, m, bins)) for m in scales])


def _cells(size: int, count: int, bins: Bins) -> Tensor:
    """Weights [count, size] of pixels in cells along one side."""
    if bins == "adaptive":
        grid = F.adaptive_avg_pool1d(torch.eye(size, dtype=torch.float64)[None], 4)[0].mT
        return grid.unflatten(0, (count, -1)).mean(1)
    cell, pixel = torch.arange(count)[:, None] * size, torch.arange(size) * count  # left ends, in 1 / (size * count)
    shared = torch.minimum(cell + size, pixel + count) - torch.maximum(cell, pixel)
    return shared.clamp_min(0).double() / size


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _steps(
    height: int, width: int, scales: tuple[int, ...], bins: Bins, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Matrices before [R, H * W] and after [N, R] the classifier whose product is P, with the fewest rows R of pixels,
    cells of the finest common grid, and regions; None = the identity. Kept: a copy to the device would wait for it."""
    grid, regions = math.lcm(*scales), sum(m * m for m in scales)
    before: Tensor | None = pool_matrix(height, width, scales, bins)
    after: Tensor | None = None
    if height * width < min(grid**2, regions):
        before, after = None, before
    elif grid**2 < regions:
        before, after = pool_matrix(height, width, (grid,), bins), pool_matrix(grid, grid, scales)
    first, second = (m if m is None else m.to(device, dtype) for m in (before, after))
    return first, second


def region_logits(maps: Tensor, head: nn.Linear, scales: Sequence[int], bins: Bins = "exact") -> Tensor:
    """Logits [B, K, N] of the regions of maps [B, C, H, W] under the classifier, in float32 at least.

    Region 0 of scales (1, ...) has the network's own logits if it averages its last map (exact bins). ConfigError:
    as `pool_matrix`.
    """
    dtype, grid = torch.promote_types(maps.dtype, torch.float32), math.lcm(*scales)
    height, width = maps.shape[2:]
    with torch.autocast(maps.device.type, enabled=False):
        maps = maps.to(dtype)
        even = bins == "exact" and not (height % grid or width % grid) and grid**2 <= sum(m * m for m in scales)
        if even:  # the finest cells are blocks of pixels: a pooling costs less than a matrix of them
            maps = F.avg_pool2d(maps, (height // grid, width // grid))
        before, after = _steps(*maps.shape[2:], tuple(scales), bins, dtype, maps.device)
        if even:
            before = None
        rows = maps.flatten(2).mT  # [B, H * W, C]
        if before is not None:  # [B, R, C], written so that the gradient comes in the layout of the maps
            channels_last = maps.is_contiguous(memory_format=torch.channels_last)
            rows = before @ rows if channels_last else (rows.mT @ before.mT).mT
        logits = F.linear(rows, head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype))
        return (logits if after is None else after @ logits).mT
