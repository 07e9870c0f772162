"""Networks of the distillation literature at their published parameter counts: `kd_network("resnet8x4", ...)`.

CIFAR's are those of He et al. (2016), Zagoruyko & Komodakis (2016), Simonyan & Zisserman (2015), Sandler et al. (2018),
Zhang et al. (2018) and Ma et al. (2018) as RepDistiller (Tian et al., 2020) and mdistiller (Zhao et al., 2022) train
them; from LARGE pixels on they begin with a 7 x 7 convolution of stride 2, as published for CUB-200 (VGG: unchanged).
"""

import argparse
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ConfigError
from utils.checkpoint import load_pth, load_tensors
from utils.image_networks import ImageNetwork
from utils.streams import stream_seed
from utils.wrapped_network import WrappedNetwork, foreign_module

LARGE = 64  # pixels a side from which CIFAR's networks take the stem for large images
SMALLEST_VGG = 8  # pixels a side: three poolings by 2
SHUFFLE_STEM = 24  # channels
Blocks = list[nn.Module]


def conv_bn(inputs: int, outputs: int, side: int = 1, stride: int = 1, groups: int = 1) -> Blocks:
    """A convolution without bias that keeps the size but for its stride, and batch norm."""
    conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def stem(channels: int, width: int, side: int, size: int, stride: int = 1) -> Blocks:
    """The first convolution and its batch norm, as published for images of `size` pixels a side."""
    return conv_bn(channels, width, 7, 2) if size >= LARGE else conv_bn(channels, width, side, stride)


def resnet(depth: int, widths: tuple[int, ...], channels: int, size: int) -> Blocks:
    """Three stages of (depth - 2) / 6 basic blocks (He et al. 2016, 4.2); a 1 x 1 shortcut where shapes change."""
    from torchvision.models.resnet import BasicBlock

    blocks: Blocks = [nn.Sequential(*stem(channels, widths[0], 3, size), nn.ReLU(inplace=True))]
    for number, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        stride = 2 if number else 1
        shortcut = nn.Sequential(*conv_bn(a, b, 1, stride)) if (a, stride) != (b, 1) else None
        rest = (BasicBlock(b, b) for _ in range((depth - 2) // 6 - 1))
        blocks.append(nn.Sequential(BasicBlock(a, b, stride, shortcut), *rest))
    return blocks


class WideUnit(nn.Module):
    """Norm, ReLU, convolution, twice; a 1 x 1 shortcut reads the first ReLU (Zagoruyko & Komodakis 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.downsample = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, outputs, H / stride, W / stride] of maps [B, inputs, H, W]."""
        start = F.relu(self.bn1(x), inplace=True)
        y = self.conv2(F.relu(self.bn2(self.conv1(start)), inplace=True))
        return y + (x if self.downsample is None else self.downsample(start))


def wrn(depth: int, factor: int, channels: int, size: int) -> Blocks:
    """Three stages of (depth - 4) / 6 units, then norm and ReLU, each applied once."""
    widths = [16, 16 * factor, 32 * factor, 64 * factor]
    blocks: Blocks = [stem(channels, 16, 3, size)[0]]
    for number, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        rest = (WideUnit(b, b, 1) for _ in range((depth - 4) // 6 - 1))
        blocks.append(nn.Sequential(WideUnit(a, b, 2 if number else 1), *rest))
    return [*blocks, nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True))]


def vgg(counts: tuple[int, ...], channels: int, size: int) -> Blocks:
    """Convolutions with bias and batch norm; max pooling after three stages, and a fourth at 64 pixels as published."""
    blocks: Blocks = []
    for number, (count, width) in enumerate(zip(counts, (64, 128, 256, 512, 512), strict=True)):
        layers: Blocks = []
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        if number < (4 if size == 64 else 3):
            layers.append(nn.MaxPool2d(2))
        blocks.append(nn.Sequential(*layers))
    return blocks


class Residual(nn.Sequential):
    """x + layers(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W] of maps of the same shape."""
        return x + super().forward(x)


def mobilenet_v2(channels: int, size: int) -> Blocks:
    """Half the width, ReLU instead of ReLU6, expansions kept where they expand by 1 (Sandler et al. 2018)."""
    first = [*stem(channels, 16, 3, size, 2), nn.ReLU(inplace=True), *([nn.MaxPool2d(2)] if size >= LARGE else [])]
    blocks: Blocks = [nn.Sequential(*first)]
    inputs = 16
    # expansion, channels, units, stride of the first
    for factor, outputs, count, stride in (
        (1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1),
    ):  # fmt: skip
        units: Blocks = []
        for number in range(count):
            step, wide = 1 if number else stride, factor * inputs
            layers = [
                *conv_bn(inputs, wide), nn.ReLU(inplace=True),
                *conv_bn(wide, wide, 3, step, wide), nn.ReLU(inplace=True),
                *conv_bn(wide, outputs),
            ]  # fmt: skip
            units.append((Residual if (step, inputs) == (1, outputs) else nn.Sequential)(*layers))
            inputs = outputs
        blocks.append(nn.Sequential(*units))
    return [*blocks, nn.Sequential(*conv_bn(inputs, 1280), nn.ReLU(inplace=True))]


class ShuffleUnit(nn.Module):
    """Grouped 1 x 1, shuffle, depthwise 3 x 3, grouped 1 x 1 (Zhang et al. 2018); at stride 2 the input is averaged and
    appended. A ReLU follows the depthwise convolution, as published for CIFAR."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        new = outputs - inputs if stride == 2 else outputs
        self.first = 1 if inputs == SHUFFLE_STEM else groups  # groups of the first convolution
        self.conv1, self.bn1 = conv_bn(inputs, new // 4, groups=self.first)
        self.conv2, self.bn2 = conv_bn(new // 4, new // 4, 3, stride, new // 4)
        self.conv3, self.bn3 = conv_bn(new // 4, new, groups=groups)
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, outputs, H / stride, W / stride] of maps [B, inputs, H, W]."""
        y = torch.channel_shuffle(F.relu(self.bn1(self.conv1(x)), inplace=True), self.first)
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)), inplace=True)))
        return F.relu(x + y if self.pool is None else torch.cat([y, self.pool(x)], 1))


def shuffle_v1(channels: int, size: int) -> Blocks:
    """ShuffleNet with 3 groups, its first convolution 1 x 1."""
    blocks: Blocks = [nn.Sequential(*stem(channels, SHUFFLE_STEM, 1, size), nn.ReLU(inplace=True))]
    inputs = SHUFFLE_STEM
    for outputs, count in ((240, 4), (480, 8), (960, 4)):
        rest = (ShuffleUnit(outputs, outputs, 1, 3) for _ in range(count - 1))
        blocks.append(nn.Sequential(ShuffleUnit(inputs, outputs, 2, 3), *rest))
        inputs = outputs
    return blocks


def shuffle_v2(channels: int, size: int) -> Blocks:
    """torchvision's shufflenet_v2_x1_0, its first convolution 1 x 1 and without max pooling."""
    from torchvision.models.shufflenetv2 import InvertedResidual

    blocks: Blocks = [nn.Sequential(*stem(channels, SHUFFLE_STEM, 1, size), nn.ReLU(inplace=True))]
    inputs = SHUFFLE_STEM
    for outputs, count in ((116, 4), (232, 8), (464, 4)):
        rest = (InvertedResidual(outputs, outputs, 1) for _ in range(count - 1))
        blocks.append(nn.Sequential(InvertedResidual(inputs, outputs, 2), *rest))
        inputs = outputs
    return [*blocks, nn.Sequential(*conv_bn(inputs, 1024), nn.ReLU(inplace=True))]


def deep_resnet(unit: str, counts: tuple[int, ...], imagenet: bool, channels: int, size: int) -> Blocks:
    """torchvision's ResNet; `imagenet` with its own stem, else 3 x 3 (7 x 7 from LARGE on) without max pooling."""
    from torchvision.models import resnet as published

    whole: Any = published.ResNet(getattr(published, unit), list(counts))
    first = [*stem(channels, 64, 3, LARGE if imagenet else size), whole.relu, *([whole.maxpool] if imagenet else [])]
    return [nn.Sequential(*first), whole.layer1, whole.layer2, whole.layer3, whole.layer4]


def mobilenet_v1(channels: int, size: int) -> Blocks:
    """Depthwise and 1 x 1 convolutions (Howard et al. 2017) for ImageNet, in public configs MobileNetV2."""
    blocks: Blocks = [nn.Sequential(*conv_bn(channels, 32, 3, 2), nn.ReLU(inplace=True))]
    widths = (32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)
    for number, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        stride = 2 if number and a != b else 1
        layers = [*conv_bn(a, a, 3, stride, a), nn.ReLU(inplace=True), *conv_bn(a, b), nn.ReLU(inplace=True)]
        blocks.append(nn.Sequential(*layers))
    return blocks


@dataclass(frozen=True)
class Published:
    """How a network is built, initialised and called by others."""

    build: Callable[[int, int], Blocks]  # of channels and size
    places: dict[str, str]  # what begins a name in public files, and in ours
    fan_out: bool = True  # convolutions N(0, 2 / (k^2 outputs)), their biases 0; else PyTorch's own
    head: Literal["default", "zero_bias", "small"] = "default"  # PyTorch's own; bias 0; N(0, 0.01^2) and bias 0


STAGES = {f"layer{i}": f"blocks.{i}" for i in (1, 2, 3, 4)}
RESNET = {"conv1": "blocks.0.0", "bn1": "blocks.0.1", **STAGES, "fc": "head", "linear": "head"}
WRN = {"conv1": "blocks.0", **{f"block{i}.layer": f"blocks.{i}" for i in (1, 2, 3)}, "bn1": "blocks.4.0", "fc": "head"}
VGG = {**{f"block{i}": f"blocks.{i}" for i in range(5)}, "classifier": "head"}
MOBILE = {"conv1": "blocks.0", **{f"blocks.{i}": f"blocks.{i + 1}" for i in range(7)}, "conv2": "blocks.8"}
DOWN = ("branch1.0", "branch1.2", "branch2.0", "branch2.3", "branch2.5")  # convolutions; their norms are one further
SHUFFLE2 = {
    f"layer{stage}.{unit}.{kind}{i}": f"blocks.{stage}.{unit}.{place[:-1]}{int(place[-1]) + (kind == 'bn')}"
    for stage, count in ((1, 4), (2, 8), (3, 4))
    for unit in range(count)
    for i, place in enumerate(DOWN[2:] if unit else DOWN, 1)
    for kind in ("conv", "bn")
}
SHUFFLE2 |= {"conv1": "blocks.0.0", "bn1": "blocks.0.1", "conv2": "blocks.4.0", "bn2": "blocks.4.1", "linear": "head"}
RENAMED = (("convShortcut", "downsample"), ("shortcut", "downsample"), (".conv.", "."))  # within a block
DEPTHS = {18: ("BasicBlock", (2, 2, 2, 2)), 34: ("BasicBlock", (3, 4, 6, 3)), 50: ("Bottleneck", (3, 4, 6, 3))}
VGGS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
PUBLISHED: dict[str, Published] = {
    **{f"resnet{d}": Published(partial(resnet, d, (16, 16, 32, 64)), RESNET) for d in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{d}x4": Published(partial(resnet, d, (32, 64, 128, 256)), RESNET) for d in (8, 32)},
    **{f"wrn_{d}_{k}": Published(partial(wrn, d, k), WRN, head="zero_bias") for d in (16, 40) for k in (1, 2)},
    **{f"vgg{d}": Published(partial(vgg, counts), VGG, head="small") for d, counts in VGGS.items()},
    "MobileNetV2": Published(mobilenet_v2, {**MOBILE, "classifier.0": "head"}, head="small"),
    "ShuffleV1": Published(shuffle_v1, RESNET, fan_out=False),
    "ShuffleV2": Published(shuffle_v2, SHUFFLE2, fan_out=False),
    **{f"ResNet{d}": Published(partial(deep_resnet, *DEPTHS[d], False), RESNET) for d in (18, 50)},
    **{f"imagenet_resnet{d}": Published(partial(deep_resnet, *DEPTHS[d], True), RESNET) for d in DEPTHS},
    "MobileNetV1": Published(
        mobilenet_v1, {**{f"model.{i}": f"blocks.{i}" for i in range(14)}, "fc": "head"}, fan_out=False
    ),
}
NETWORKS = tuple(PUBLISHED)
# Beside tensors public checkpoints hold arguments and NumPy scalars, of which NumPy 1 and 2 give different addresses.
SCALAR = np.float64(0).__reduce__()[0]
PLAIN: list[Any] = [
    argparse.Namespace, np.dtype, type(np.dtype("f4")), type(np.dtype("f8")),
    (SCALAR, "numpy.core.multiarray.scalar"), (SCALAR, "numpy._core.multiarray.scalar"),
]  # fmt: skip


def known_network(name: str) -> str:
    """A name that `kd_network` takes. Raises ConfigError for another, with those that are near."""
    short = name.removesuffix("_sdd")
    if ":" not in short and short not in PUBLISHED:
        lower = {known.lower(): known for known in NETWORKS}
        near = [lower[found] for found in difflib.get_close_matches(short.lower(), lower)] or NETWORKS
        raise ConfigError(
            f"network '{short}' is not known; take {', '.join(near)}, or torchvision:NAME or package.module:factory"
        )
    return name


def kd_network(name: str, nclass: int, channels: int, size: int, seed: int, purpose: str, *ids: int) -> ImageNetwork:
    """A fresh network for images [channels, size, size], its weights drawn from the stream (seed, purpose, ids...).

    `name`: one of NETWORKS, torchvision:NAME or package.module:factory; a last `_sdd` is ignored. Raises ConfigError.
    """
    name = known_network(name).removesuffix("_sdd")
    if name.startswith("vgg") and size < SMALLEST_VGG:
        raise ConfigError(f"network: {name} needs images of {SMALLEST_VGG} pixels, these have {size}: enlarge them")
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(seed, purpose, *ids))
        if ":" in name:
            return WrappedNetwork(name, foreign_module(name, nclass), channels, size, nclass)
        published = PUBLISHED[name]
        join = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        net = ImageNetwork(published.build(channels, size), join, channels, size, nclass)
        convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)] if published.fan_out else []
        for layer in convolutions:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if published.head != "default":
            nn.init.zeros_(net.head.bias)
        if published.head == "small":
            nn.init.normal_(net.head.weight, std=0.01)
        return net


def load_public(name: str, path: Path, net: ImageNetwork) -> None:
    """Fill `net`, made as `name`, from a file of ours, RepDistiller's, mdistiller's or torchvision's; nothing in it is
    executed. Raises ConfigError for another network's file."""
    name, ours, found = name.removesuffix("_sdd"), net.state_dict(), _state(path)
    if ours.keys().isdisjoint(found) and name in PUBLISHED:
        found = {_place(key, PUBLISHED[name].places): value for key, value in found.items()}
    elif ours.keys().isdisjoint(found):
        found = {f"{WrappedNetwork.PLACE}{key}": value for key, value in found.items()}
    counters = {
        key: value for key, value in ours.items() if key.endswith("num_batches_tracked")
    }  # new in PyTorch 0.4.1
    found = counters | found
    wrong = [
        f"{key} has the shape {list(found[key].shape)} instead of {list(value.shape)}" if key in found else f"no {key}"
        for key, value in ours.items()
        if key not in found or found[key].shape != value.shape
    ] + [f"{key} is too much" for key in found if key not in ours]
    if wrong:
        raise ConfigError(
            f"{path}: not the weights of {name} for {net.head.out_features} classes ({len(wrong)} differences; "
            f"{wrong[0]}): take another file, or name the network that it is of"
        )
    net.load_state_dict(found)


def _state(path: Path) -> dict[str, Tensor]:
    """Named tensors of a file, of the student where it has a student and a teacher. Raises ConfigError."""
    if path.suffix == ".safetensors":
        return load_tensors(path)
    with torch.serialization.safe_globals(PLAIN):
        found = load_pth(path)
    for key in ("model", "state_dict", "net"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"{path}: holds no named tensors: take a file with a network's state_dict")
    found = {key.removeprefix("module."): value for key, value in found.items()}
    student = {key.removeprefix("student."): value for key, value in found.items() if key.startswith("student.")}
    return student or found


def _place(key: str, places: dict[str, str]) -> str:
    """Our name of a public one."""
    for public, own in places.items():
        if key.startswith(f"{public}."):
            rest = key.removeprefix(public)
            for a, b in RENAMED:
                rest = rest.replace(a, b)
            return own + rest
    return key
