"""Losses on maps: FitNet, AT, NST, VID, ReviewKD, and what they learn beside the student."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from config import Section
from kd.methods.relations import projection, unit
from utils.losses import widened


class FitNet(Section):
    """Regression of one map; 2 is the middle one of three blocks."""

    WEIGHT: float = Field(100.0, ge=0)
    BLOCK: int = Field(2, ge=1)
    RELU: bool = True  # what is regressed is rectified, as the teacher's maps are; WRN's are not


class At(Section):
    """Attention maps of every block."""

    WEIGHT: float = Field(1000.0, ge=0)


class Nst(Section):
    """Neuron selectivity of every block."""

    WEIGHT: float = Field(50.0, ge=0)


class Vid(Section):
    """Variational information of every block."""

    WEIGHT: float = Field(1.0, ge=0)
    VARIANCE: float = Field(5.0, gt=0)  # at the start


class Review(Section):
    """Knowledge review over all blocks and the pooled features; weights of published pairs go from 0.6 to 8.

    Maps are those that the next block reads, of both networks; the public code takes the teacher's before their ReLU.
    """

    WEIGHT: float = Field(1.0, ge=0)
    WIDTH: int = Field(64, ge=1)  # of the fused maps: 64 for the ResNets of CIFAR, else the student's widest up to 512
    WARMUP: int = Field(20, ge=0)  # epochs in which the weight rises


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [B, C, H, W], the higher of both averaged down to the lower, in float32 at least."""
    size = min((a.shape[2], a.shape[3]), (b.shape[2], b.shape[3]))
    first, second = (x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (widened(a), widened(b)))
    return first, second


def fitnet_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of projected student and teacher maps [B, C, H, W]: [] (Romero et al., ICLR 2015)."""
    return F.mse_loss(*same_size(student, teacher))


def attention(maps: Tensor) -> Tensor:
    """Unit rows [B, H * W] of squared activations' means over the channels of maps [B, C, H, W]."""
    return unit(maps.square().mean(1).flatten(1))


def at_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of attention maps of [B, C, H, W], any C: [] (Zagoruyko and Komodakis, ICLR 2017)."""
    a, b = same_size(student, teacher)
    return F.mse_loss(attention(a), attention(b))


def nst_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared MMD of unit channels of [B, C, H, W], any C, with kernel (x . y)^2: [] (Huang and Wang 2017)."""
    s, t = (unit(maps.flatten(2)) for maps in same_size(student, teacher))  # [B, C, H * W]
    within = sum((x @ x.mT).square().mean((1, 2)) for x in (s, t))
    return (within - 2 * (s @ t.mT).square().mean((1, 2))).mean()


class VidHead(nn.Module):
    """Mean of the teacher's map given the student's, by three 1 x 1 convolutions, and a variance a channel."""

    def __init__(self, student: int, teacher: int, variance: float = 5.0) -> None:
        super().__init__()
        widths = (student, teacher, teacher, teacher)
        layers = [nn.Conv2d(i, o, 1, bias=False) for i, o in zip(widths[:-1], widths[1:], strict=True)]
        self.mean = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        self.raw = nn.Parameter(torch.full((teacher,), math.log(math.expm1(variance))))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, C_T, H, W] and variance [C_T] for student maps [B, C_S, H, W]."""
        return self.mean(x), F.softplus(self.raw) + 1e-5


def vid_loss(mean: Tensor, variance: Tensor, teacher: Tensor) -> Tensor:
    """(log v + (t - m)^2 / v) / 2, mean over all of the teacher's map [B, C, H, W]: [] (Ahn et al., CVPR 2019)."""
    mean, teacher = same_size(mean, teacher)
    v = variance[:, None, None]
    return 0.5 * (v.log() + (teacher - mean).square() / v).mean()


class Fusion(nn.Module):
    """ABF: a student map and what deeper blocks hand down, weighed pixel by pixel (Chen et al., CVPR 2021)."""

    def __init__(self, student: int, width: int, teacher: int, deepest: bool) -> None:
        super().__init__()
        self.enter, self.leave = projection(student, width), projection(width, teacher, 3)
        self.weigh = None if deepest else nn.Conv2d(2 * width, 2, 1)

    def forward(self, x: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Map [B, teacher, *size] to compare and map [B, width, H, W] to hand on, from [B, student, H, W]."""
        x = self.enter(x)
        if self.weigh is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[2:])
            share = self.weigh(torch.cat([x, deeper], 1)).sigmoid()
            x = x * share[:, :1] + deeper * share[:, 1:]
        fitted = x if x.shape[2:] == size else F.interpolate(x, list(size))
        return self.leave(fitted), x


class KnowledgeReview(nn.Module):
    """Fusions of all levels, from the deepest on; the pooled features are a level of size 1 x 1."""

    def __init__(self, student: Sequence[int], teacher: Sequence[int], width: int) -> None:
        """Channels of the levels, shallow first."""
        super().__init__()
        last = len(student) - 1
        self.levels = nn.ModuleList(
            Fusion(s, width, t, level == last) for level, (s, t) in enumerate(zip(student, teacher, strict=True))
        )

    def forward(self, maps: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Maps [B, C_T, *size] a level, shallow first, from the student's, and the teacher's sizes (H, W)."""
        out, deeper = [], None
        for level, x, size in reversed(list(zip(self.levels, maps, sizes, strict=True))):
            fitted, deeper = level(x, deeper, size)
            out.append(fitted)
        return out[::-1]


def review_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """HCL: [] from pairs of maps [B, C, H, W], summed over levels (Chen et al., CVPR 2021, section 3.3).

    Mean squared difference of the maps and of their averages on 4 x 4, 2 x 2 and 1 x 1 cells, where these are fewer
    than the rows, with weights 1, 1/2, 1/4, ... over their sum.
    """
    total = teacher[0].new_zeros(())
    for s, t in zip(student, teacher, strict=True):
        gap = widened(s) - widened(t)
        scales = [gap, *(F.adaptive_avg_pool2d(gap, m) for m in (4, 2, 1) if m < gap.shape[2])]
        total = total + sum(x.square().mean() / 2**i for i, x in enumerate(scales)) / (2 - 0.5 ** (len(scales) - 1))
    return total
