"""Losses on relations: between channels (ICKD), predictions (DIST), samples (RKD, PKT, SP). Pure functions of tensors.

Relations have the shape of what is related, so widths of student and teacher may differ, except where it is said.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from config import ConfigError, Section
from utils.losses import widened


class Ickd(Section):
    """Inter-channel correlation; the weight is of the README, the published script has 4."""

    WEIGHT: float = Field(2.5, ge=0)
    GRID: int = Field(1, ge=1)  # n: relations within each of n x n cells, for large maps


class Dist(Section):
    """Inter- and intra-class relations; the temperature is that of CIFAR-100, ImageNet's is 1."""

    WEIGHT: float = Field(2.0, ge=0)
    INTER: float = Field(1.0, ge=0)  # between the classes of a sample
    INTRA: float = Field(1.0, ge=0)  # between the samples of a class
    TEMPERATURE: float = Field(4.0, gt=0)


class Rkd(Section):
    """Distances and angles between samples."""

    DISTANCE: float = Field(25.0, ge=0)
    ANGLE: float = Field(50.0, ge=0)


class Pkt(Section):
    """Neighbour probabilities of samples."""

    WEIGHT: float = Field(30000.0, ge=0)


class Sp(Section):
    """Similarities of samples."""

    WEIGHT: float = Field(3000.0, ge=0)


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """x / |x| along `dim`; 0, and without gradient, where |x| <= 1e-12 (F.normalize gives 1e12 times the gradient)."""
    square = x.square().sum(dim, keepdim=True)
    return x * torch.where(square > 1e-24, square, math.inf).rsqrt()


def pearson(a: Tensor, b: Tensor, eps: float, dim: int = -1) -> Tensor:
    """Correlation along `dim`, without it; `eps` is added to either variance, so constant rows have 0."""
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    return (a * b).mean(dim) * ((a.square().mean(dim) + eps) * (b.square().mean(dim) + eps)).rsqrt()


def projection(student: int, teacher: int, kernel: int = 1) -> nn.Sequential:
    """Maps [B, student, H, W] -> [B, teacher, H, W]: convolution without bias, batch norm."""
    return nn.Sequential(nn.Conv2d(student, teacher, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(teacher))


def cells(maps: Tensor, rows: int, columns: int) -> Tensor:
    """Maps [B, C, H, W] in rows x columns cells: [B, rows * columns, C, H / rows, W / columns]. ConfigError: no whole
    cells."""
    height, width = maps.shape[2:]
    if height % rows or width % columns:
        raise ConfigError(
            f"a grid of {rows} x {columns} cells does not divide maps of {height} x {width}; take divisors of these"
        )
    return maps.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def ickd_loss(student: Tensor, teacher: Tensor, grid: int = 1) -> Tensor:
    """Mean of |unit(G_S) - unit(G_T)|^2 over channels, rows of G = F F^T: [] (Liu et al., ICCV 2021).

    Projected student and teacher [B, C, H, W], whose H, W may differ; in each of grid x grid cells. In [0, 4]; the sum
    over channels divided by B C, as released for CIFAR (ImageNet: by B^2 C). ConfigError: as `cells`.
    """
    flat = (cells(widened(maps), grid, grid).flatten(3) for maps in (student, teacher))
    g_s, g_t = (unit(f @ f.mT) for f in flat)  # [B, grid^2, C, C]
    return (g_s - g_t).square().sum(-1).mean()


def dist_loss(
    student: Tensor, teacher: Tensor, temperature: float = 4.0, inter: float = 1.0, intra: float = 1.0
) -> Tensor:
    """T^2 (inter (1 - mean row correlation) + intra (1 - mean column correlation)) of softmax(z / T), logits [B, K].

    [] (Huang et al., NeurIPS 2022). Variances are of K p and gain 1e-6: at a uniform student a row's |gradient| is
    1e3 T / sqrt(K) (as published, 1e-8 beside the product of norms, 3.5e6 at K = 5). For one row, intra is 1. T is a
    number: distances of correlations do not fall with T, so that T^2 of a learned one would run away.
    """
    p_s, p_t = (z.shape[-1] * (widened(z) / temperature).softmax(-1) for z in (student, teacher))
    rows, columns = (1 - pearson(p_s, p_t, 1e-6, dim).mean() for dim in (1, 0))
    return temperature**2 * (inter * rows + intra * columns)


def rkd_loss(student: Tensor, teacher: Tensor, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """Smooth L1 of pairs' distances over their mean, of triplets' cosines: [] for rows [B, D] (Park et al., CVPR 2019).

    Means over all B^2 pairs and B^3 triplets, as in RepDistiller, whose weights are the defaults.
    """
    pairs = [x[None] - x[:, None] for x in (widened(student), widened(teacher))]  # [B, B, D]
    lengths = [torch.where(d2 > 0, d2, 1).sqrt() * (d2 > 0) for d2 in (d.square().sum(-1) for d in pairs)]
    d_s, d_t = (d * (d > 0).sum() / d.sum().clamp_min(1e-12) for d in lengths)
    a_s, a_t = (e @ e.mT for e in (unit(d) for d in pairs))
    return distance * F.smooth_l1_loss(d_s, d_t) + angle * F.smooth_l1_loss(a_s, a_t)


def pkt_loss(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """KL of neighbour probabilities, rows of (1 + cosine) / 2 over their sum, mean over B^2 pairs: [] for rows [B, D].

    Passalis and Tefas, ECCV 2018, normalised as in RepDistiller.
    """
    likeness = ((1 + u @ u.mT).clamp_min(0) for u in (unit(widened(x)) for x in (student, teacher)))
    p_s, p_t = (k / k.sum(1, keepdim=True) for k in likeness)
    return (p_t * ((p_t + eps) / (p_s + eps)).log()).mean()


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """|unit(F_S F_S^T) - unit(F_T F_T^T)|^2 / B^2: [] for features [B, ...] (Tung and Mori, ICCV 2019)."""
    g_s, g_t = (unit(f @ f.mT) for f in (widened(x).flatten(1) for x in (student, teacher)))
    return (g_s - g_t).square().mean()
