"""Image classifiers of the condensation literature: `logits, features = net(x)` for x [B, channels, size, size].

`features` [1, B, D] is what the head reads. Only definitions that differ from torchvision's are written out.
"""

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from config import ConfigError, Section
from utils.contract import Output
from utils.streams import stream_seed

NetType = Literal["convnet", "resnet18", "resnet18_ap", "resnet10_ap", "vgg11", "alexnet", "mlp", "lenet"]
NormType = Literal["instance", "batch", "group", "layer", "none"]
WITHOUT_NORM = ("alexnet", "mlp", "lenet")
GROUPS = 4  # of norm_type: group (Zhao et al. 2021)
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "leakyrelu": nn.LeakyReLU, "sigmoid": nn.Sigmoid, "gelu": nn.GELU, "swish": nn.SiLU,
}  # fmt: skip


class ImageNetworkConfig(Section):
    """The network of teachers and students."""

    net_type: NetType = "convnet"
    norm_type: NormType = "instance"
    depth: int = Field(3, ge=1)  # blocks of a convnet
    width: int = Field(128, ge=1)  # channels of a convnet, units of an mlp
    activation: Literal["relu", "leakyrelu", "sigmoid", "gelu", "swish"] = "relu"  # of a convnet
    pooling: Literal["avg", "max", "none"] = "avg"  # of a convnet

    @model_validator(mode="after")
    def check(self) -> "ImageNetworkConfig":
        """What the network does not read stands at its default; groups have equal widths."""
        if self.net_type in WITHOUT_NORM and self.norm_type not in ("none", "instance"):
            raise ValueError(f"norm_type: {self.norm_type}, but {self.net_type} has no norm layers; set none")
        if self.net_type != "convnet" and self.activation != "relu":
            raise ValueError(f"activation: {self.activation}, but {self.net_type} has its own; set relu")
        if self.net_type != "convnet" and self.pooling != "avg":
            raise ValueError(f"pooling: {self.pooling}, but {self.net_type} has its own; set avg")
        if self.net_type == "convnet" and self.norm_type == "group" and self.width % GROUPS:
            raise ValueError(
                f"width: {self.width} is not a multiple of the {GROUPS} groups of norm_type: group; round it"
            )
        return self


class ImageNetwork(nn.Module):
    """Blocks one after another, whatever joins their last map to one row a sample, and a linear head."""

    def __init__(self, blocks: list[nn.Module], join: nn.Module, channels: int, size: int, nclass: int) -> None:
        super().__init__()
        self.blocks, self.join = nn.ModuleList(blocks), join
        body = nn.Sequential(*blocks, join)
        shapes = {name: t.to("meta") for name, t in body.state_dict().items()}
        rows = torch.func.functional_call(body, shapes, torch.empty(2, channels, size, size, device="meta"))
        self.head = nn.Linear(rows.shape[1], nclass)

    def layers(self, x: Tensor) -> list[Tensor]:
        """The map [B, C_l, H_l, W_l] after every block."""
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps

    def get_feature_single(self, x: Tensor) -> Tensor:
        """What the head reads: [B, D]."""
        for block in self.blocks:
            x = block(x)
        return self.join(x)

    def forward(self, x: Tensor) -> Output:
        """Logits [B, C] and features [1, B, D]."""
        rows = self.get_feature_single(x)
        return Output(self.head(rows), rows[None])

    def with_map(self, x: Tensor, layer_idx: int | None = None) -> tuple[Output, Tensor]:
        """Output and, of the same pass, the map [B, C_l, H_l, W_l] after block `layer_idx` (1 = the first; None = the
        last). Raises ConfigError."""
        last, maps = self._block(layer_idx), self.layers(x)
        rows = self.join(maps[-1])
        return Output(self.head(rows), rows[None]), maps[last - 1]

    def from_map(self, maps: Tensor, layer_idx: int | None = None) -> Tensor:
        """Logits [B, C] of maps [B, C_l, H_l, W_l] as after block `layer_idx` (None = the last). Raises ConfigError."""
        for block in self.blocks[self._block(layer_idx) :]:
            maps = block(maps)
        return self.head(self.join(maps))

    @property
    def classifier(self) -> nn.Module:
        """What turns means [R, C] of the last map into logits [R, K]. ConfigError: the join reads pixels apart."""
        if not isinstance(next(self.join.children(), None), nn.AdaptiveAvgPool2d):
            raise ConfigError("M: the network does not average its last map, so that regions have no logits; set [1]")
        return self.head

    def _block(self, layer_idx: int | None) -> int:
        count = len(self.blocks)
        if layer_idx is not None and not 1 <= layer_idx <= count:
            raise ConfigError(
                f"feature.layer_idx: {layer_idx}, but the network has blocks 1 to {count}: take one of them, or null "
                "for the last"
            )
        return layer_idx or count


def norm(kind: NormType, channels: int) -> nn.Module:
    """A norm layer with a learned scale and shift a channel (the public ConvNet's layer norm has them a pixel).

    One group a channel is InstanceNorm2d(affine=True), whose kernel on a CPU takes 1.3 to 2.6 times as long.
    """
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    groups = {"instance": channels, "group": GROUPS, "layer": 1}
    return nn.GroupNorm(groups[kind], channels) if kind in groups else nn.Identity()


def image_network(
    settings: ImageNetworkConfig, channels: int, size: int, nclass: int, seed: int, purpose: str, *ids: int
) -> ImageNetwork:
    """A fresh network for images [channels, size, size], its weights drawn from the stream (seed, purpose, ids...).

    Raises ConfigError where the images are too small for it.
    """
    limit = smallest_size(settings, channels)
    if size < limit and settings.net_type == "convnet" and settings.pooling != "none":
        raise ConfigError(
            f"network.depth: {settings.depth} needs images of {limit} pixels, dataset.size is {size}: "
            f"lower the depth to {size.bit_length() - 1} or raise the size"
        )
    if size < limit:
        detail = "" if settings.net_type in WITHOUT_NORM else f" with norm_type: {settings.norm_type}"
        raise ConfigError(
            f"network.net_type: {settings.net_type}{detail} needs images of {limit} pixels, dataset.size is {size}: "
            "raise the size or take a smaller network"
        )
    builders = {"convnet": convnet, "vgg11": vgg11, "alexnet": alexnet, "mlp": mlp, "lenet": lenet}
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(seed, purpose, *ids))
        blocks, join = builders.get(settings.net_type, resnet)(settings, channels, size)
        return ImageNetwork(blocks, join, channels, size, nclass)


def smallest_size(s: ImageNetworkConfig, channels: int) -> int:
    """Fewest pixels a side that leave every map a pixel, and two a side to instance norm, which turns one into 0."""
    least = 2 if s.norm_type == "instance" else 1  # pixels a side of the last map before any pooling
    return {
        "convnet": least if s.pooling == "none" else 2**s.depth,
        "resnet18": 8 * (least - 1) + 1,  # the last map has ceil(size / 8)
        "resnet18_ap": 8 * least,  # and here floor(size / 8)
        "resnet10_ap": 8 * least,
        "vgg11": 28 if channels == 1 else 32,
        "alexnet": 8,
        "mlp": 1,
        "lenet": 12 if channels == 1 else 16,
    }[s.net_type]


Parts = tuple[list[nn.Module], nn.Module]


def convnet(s: ImageNetworkConfig, channels: int, size: int) -> Parts:
    """Convolution, norm, activation, pooling by 2, `depth` times (Gidaris & Komodakis 2018, as in Zhao et al. 2021).

    Grey images are not padded to 32 pixels: 28 become 14, 7, 3.
    """
    pools = {"avg": nn.AvgPool2d(2), "max": nn.MaxPool2d(2), "none": nn.Identity()}
    act = ACTIVATIONS[s.activation]
    widths = [channels] + [s.width] * s.depth
    blocks: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1), norm(s.norm_type, b), act(), pools[s.pooling])
        for a, b in zip(widths, widths[1:], strict=False)
    ]
    return blocks, nn.Flatten()


def resnet(s: ImageNetworkConfig, channels: int, size: int) -> Parts:
    """torchvision's ResNet with the stem for small images: a 3 x 3 convolution of stride 1 and no max pooling.

    `_ap`: every convolution of stride 2 becomes one of stride 1 and an average pooling (Zhao et al. 2021); the last
    map is averaged (Kim et al., IDC, 2022), not flattened.
    """
    from torchvision.models.resnet import BasicBlock, ResNet

    counts = [1, 1, 1, 1] if s.net_type == "resnet10_ap" else [2, 2, 2, 2]
    whole: Any = ResNet(BasicBlock, counts, norm_layer=lambda width: norm(s.norm_type, width))
    stem = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's convolutions
    blocks: list[nn.Module] = [nn.Sequential(stem, whole.bn1, whole.relu)]
    for stage in (whole.layer1, whole.layer2, whole.layer3, whole.layer4):
        if s.net_type.endswith("_ap") and stage[0].conv1.stride == (2, 2):
            first = stage[0]
            first.conv1.stride = first.downsample[0].stride = (1, 1)
            first.conv2 = nn.Sequential(nn.AvgPool2d(2), first.conv2)
            first.downsample[0] = nn.Sequential(first.downsample[0], nn.AvgPool2d(2))
        blocks.append(stage)
    return blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def vgg11(s: ImageNetworkConfig, channels: int, size: int) -> Parts:
    """torchvision's convolutions of VGG-11, the last map flattened into one linear layer (Zhao et al. 2021).

    torchvision knows batch norm or none, and starts from normal weights where these are PyTorch's own, as published.
    """
    blocks: list[nn.Module] = []
    padding = 3 if channels == 1 else 1  # MNIST's 28 pixels become 32
    for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        layers: list[nn.Module] = []
        for width in stage:
            layers += [nn.Conv2d(channels, width, 3, padding=padding), norm(s.norm_type, width), nn.ReLU()]
            channels, padding = width, 1
        blocks.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
    return blocks, nn.Flatten()


def alexnet(s: ImageNetworkConfig, channels: int, size: int) -> Parts:
    """AlexNet for small images (Zhao et al. 2021), grey ones not padded to 32 pixels."""
    return [
        nn.Sequential(nn.Conv2d(channels, 128, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(128, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(192, 256, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(256, 192, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(192, 192, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    ], nn.Flatten()


def mlp(s: ImageNetworkConfig, channels: int, size: int) -> Parts:
    """Two hidden layers; as maps, they have one pixel."""
    widths = [channels * size * size, s.width, s.width]
    return [
        nn.Sequential(nn.Flatten(), nn.Linear(a, b), nn.ReLU(), nn.Unflatten(1, (b, 1, 1)))
        for a, b in zip(widths, widths[1:], strict=False)
    ], nn.Flatten()


def lenet(s: ImageNetworkConfig, channels: int, size: int) -> Parts:
    """LeNet-5 with ReLU and max pooling; the first convolution is padded for grey images, as MNIST's 28 pixels want."""
    first = nn.Conv2d(channels, 6, 5, padding=2 if channels == 1 else 0)
    blocks: list[nn.Module] = [
        nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
    ]
    side = ((size if channels == 1 else size - 4) // 2 - 4) // 2
    join = nn.Sequential(nn.Flatten(), nn.Linear(16 * side**2, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU())
    return blocks, join
