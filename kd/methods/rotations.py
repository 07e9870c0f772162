"""HSAKD: heads on every block tell class and rotation together (Yang et al., IJCAI 2021)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from config import ConfigError, Section
from utils.losses import kl_rows

TURNS = 4


class Hsakd(Section):
    """Weights are of the student; its cross-entropy sees upright images only, and no joint labels."""

    TEMPERATURE: float = Field(3.0, gt=0)
    MAIN: float = Field(1.0, ge=0)  # the network's own logits, all rotations
    HEADS: float = Field(1.0, ge=0)  # the heads', summed


def rotated(images: Tensor) -> Tensor:
    """Images [B, C, S, S] turned by 0, 90, 180, 270 degrees, sample by sample: [4 B, C, S, S]. ConfigError: S x R."""
    if images.shape[2] != images.shape[3]:
        raise ConfigError(f"HSAKD turns images of {images.shape[2]} x {images.shape[3]}; give it square ones")
    return torch.stack([images.rot90(turn, (2, 3)) for turn in range(TURNS)], 1).flatten(0, 1)


def joint_labels(labels: Tensor) -> Tensor:
    """Labels [4 B] of `rotated` among 4 K: 4 y + turn, for labels [B] among K."""
    return (TURNS * labels[:, None] + torch.arange(TURNS, device=labels.device)).flatten()


class HierarchicalHeads(nn.Module):
    """A head a block: strided convolutions in place of the blocks that follow, averaging, a linear layer."""

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        """Channels of the blocks' maps, the last head has one convolution of its own."""
        super().__init__()
        self.heads = nn.ModuleList()
        for block in range(len(channels)):
            widths = [*channels[block:]] if block < len(channels) - 1 else [channels[-1]] * 2
            stride = 2 if block < len(channels) - 1 else 1
            layers = [
                nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
                for i, o in zip(widths[:-1], widths[1:], strict=True)
            ]
            pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], TURNS * classes))
            self.heads.append(nn.Sequential(*layers, pool))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Joint logits [4 B, 4 K] a head for the blocks' maps [4 B, C_l, H_l, W_l]."""
        return [head(x) for head, x in zip(self.heads, maps, strict=True)]


def joint_loss(heads: Sequence[Tensor], labels: Tensor) -> Tensor:
    """A teacher's CE [4 B, 4 K] of joint labels, summed over heads: [] for labels [B]; upright images' is apart."""
    joint = joint_labels(labels)
    return torch.stack([F.cross_entropy(z, joint) for z in heads]).sum()


def student_loss(
    logits: Tensor, heads: Sequence[Tensor], teacher: Tensor, teacher_heads: Sequence[Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    """T^2 KL of logits [4 B, K] and, summed over heads, of joint logits [4 B, 4 K], means over all 4 B rows: [], []."""
    main = kl_rows(logits, teacher, temperature).mean()
    pairs = zip(heads, teacher_heads, strict=True)
    return main, torch.stack([kl_rows(s, t, temperature).mean() for s, t in pairs]).sum()
