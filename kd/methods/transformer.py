"""TaT: the student's map rebuilt for every pixel of the teacher's (Lin et al., CVPR 2022)."""

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from config import ConfigError, Section
from kd.methods.relations import cells, projection


class Tat(Section):
    """Target-aware transformer. CELLS 1: whole maps (ImageNet); else patch groups and an anchor, as for segmentation
    (VOC: CELLS 16, GROUPS 64, ANCHOR 32, weights 0.1, 1, 0.4).

    Published for ImageNet: 0.1 beside 0.5 CE + 0.5 KD at temperature 1, or without KD twice the weight of CE.
    """

    WEIGHT: float = Field(0.1, ge=0)  # of all
    KERNEL: int = Field(3, ge=1)  # of the student's convolutions; 1 for segmentation
    CELLS: int = Field(1, ge=1)  # n: n x n patches
    GROUPS: int = Field(1, ge=1)  # of patches, stacked on channels within a group
    ANCHOR: int = Field(32, ge=1)  # side of the averaged map
    PATCH: float = Field(1.0, ge=0)
    GLOBAL: float = Field(0.4, ge=0)  # of the anchor

    @model_validator(mode="after")
    def check(self) -> "Tat":
        """Groups are of patches."""
        if self.GROUPS > 1 and self.CELLS == 1:
            raise ValueError(
                f"GROUPS: {self.GROUPS}, but CELLS is 1, so there is one patch; raise CELLS, or leave it out"
            )
        return self


def rebuilt(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, M, D]: for each teacher pixel [B, M, D] the student's values [B, N, D], weighed by softmax of query . key.

    The prose of the paper; its code has the rows of the student as queries, which is not aware of the target. Without
    1 / sqrt(D), as published.
    """
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)


def patch_groups(maps: Tensor, count: int, groups: int) -> Tensor:
    """Maps [B, C, H, W] as [B * groups, C count^2 / groups, H / count, W / count], neighbours in a group.

    ConfigError: no whole patches or groups.
    """
    if count**2 % groups:
        raise ConfigError(f"TAT.GROUPS: {groups} does not divide {count} x {count} patches; take a divisor")
    patches = cells(maps, count, count)
    return patches.unflatten(1, (groups, -1)).flatten(2, 3).flatten(0, 1)


class TargetAware(nn.Module):
    """Student maps as the teacher's pixels ask for them; learned: key and value of the student."""

    def __init__(self, student: int, teacher: int, kernel: int = 3) -> None:
        super().__init__()
        self.key, self.value = projection(student, teacher, kernel), projection(student, teacher, kernel)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_T, H_T, W_T] from maps [B, C_S, H_S, W_S] and [B, C_T, H_T, W_T]."""
        query, key, value = (x.flatten(2).mT for x in (teacher, self.key(student), self.value(student)))
        return rebuilt(query, key, value).mT.reshape_as(teacher)


class HierarchicalTargetAware(nn.Module):
    """TaT within groups of patches, for what is local, and on averaged maps, for what is global."""

    def __init__(self, student: int, teacher: int, kernel: int, count: int, groups: int, anchor: int) -> None:
        super().__init__()
        stack = count**2 // groups
        self.count, self.groups, self.anchor = count, groups, anchor
        self.local = TargetAware(student * stack, teacher * stack, kernel)
        self.whole = TargetAware(student, teacher, kernel)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [], [] of patches and anchor for maps [B, C, H, W]. ConfigError: as `patch_groups`."""
        s, t = (patch_groups(x, self.count, self.groups) for x in (student, teacher))
        a, b = (F.adaptive_avg_pool2d(x, self.anchor) for x in (student, teacher))
        return F.mse_loss(self.local(s, t), t), F.mse_loss(self.whole(a, b), b)
