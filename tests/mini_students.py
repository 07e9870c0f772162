"""A network of a user, without batch norm."""

from collections import OrderedDict

from torch import nn


def group_norm(num_classes: int) -> nn.Module:
    """Two convolutions with group norm over one channel, global pooling and a linear head."""
    return nn.Sequential(
        OrderedDict(
            first=nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU()),
            second=nn.Sequential(nn.Conv2d(8, 16, 3, 1, 1), nn.GroupNorm(2, 16), nn.ReLU()),
            pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            head=nn.Linear(16, num_classes),
        )
    )
