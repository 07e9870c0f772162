"""Image networks: published sizes, torchvision's outputs, one calling contract, what a norm ignores."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ConfigError
from utils import image_networks
from utils.fit import FitConfig, make_optimizer
from utils.image_networks import ImageNetwork, ImageNetworkConfig, NormType, image_network, norm

EVERY = ("convnet", "resnet18", "resnet18_ap", "resnet10_ap", "vgg11", "alexnet", "mlp", "lenet")
VGG = ((3, 64), (64, 128), (128, 256), (256, 256), (256, 512), (512, 512), (512, 512), (512, 512))


@pytest.fixture(autouse=True)
def same_inputs() -> None:
    torch.manual_seed(0)


def build(size: int = 32, channels: int = 3, nclass: int = 10, number: int = 0, **settings: Any) -> ImageNetwork:
    return image_network(ImageNetworkConfig(**settings), channels, size, nclass, 0, "test", number)


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def conv(a: int, b: int, side: int = 3) -> int:
    return a * b * side**2 + b


def convnet(channels: int, size: int, depth: int, nclass: int, width: int = 128, norms: int = 2) -> int:
    widths = [channels] + [width] * depth
    body = sum(conv(a, b) + norms * b for a, b in zip(widths, widths[1:], strict=False))
    return body + (width * (size // 2**depth) ** 2 + 1) * nclass


def resnet(blocks: int, channels: int = 3) -> int:
    total, a = channels * 64 * 9 + 2 * 64, 64
    for b in (64, 128, 256, 512):
        total += a * b * 9 + b * b * 9 + 4 * b + (blocks - 1) * (2 * b * b * 9 + 4 * b)
        total += a * b + 2 * b if a != b else 0
        a = b
    return total + 513 * 10


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 320_010),  # the ConvNet of Zhao et al. at 3 x 32 x 32
        ({"norm_type": "none"}, convnet(3, 32, 3, 10, norms=0)),
        ({"size": 28, "channels": 1}, convnet(1, 28, 3, 10)),
        ({"size": 64, "depth": 4, "nclass": 200}, convnet(3, 64, 4, 200)),
        ({"size": 128, "depth": 5}, convnet(3, 128, 5, 10)),
        ({"net_type": "resnet18", "norm_type": "batch"}, 11_173_962),
        ({"net_type": "resnet18_ap", "norm_type": "batch"}, resnet(2)),  # pooling has no weights
        ({"net_type": "resnet10_ap"}, resnet(1)),
        ({"net_type": "vgg11", "norm_type": "none"}, 9_220_480 + 5130),  # torchvision's vgg11().features
        ({"net_type": "vgg11"}, sum(conv(a, b) + 2 * b for a, b in VGG) + 5130),
        (
            {"net_type": "alexnet"},
            conv(3, 128, 5) + conv(128, 192, 5) + 2 * 192 * 256 * 9 + 448 + conv(192, 192) + 30730,
        ),
        ({"net_type": "mlp"}, 3072 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10),
        ({"net_type": "lenet"}, 62_006),
        ({"net_type": "lenet", "size": 28, "channels": 1}, 61_706),  # LeCun's, all maps connected
    ],
)
def test_parameter_counts_are_the_published_ones(settings: dict[str, Any], expected: int) -> None:
    assert parameters(build(**settings)) == expected
    assert resnet(2) == 11_173_962 and convnet(3, 32, 3, 10) == 320_010


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (28, 1), (32, 3), (64, 3)])
@pytest.mark.parametrize("kind", EVERY)
def test_every_network_learns_at_every_size_that_it_takes(kind: str, size: int, channels: int) -> None:
    if kind == "vgg11" and size == 16:
        with pytest.raises(ConfigError, match="vgg11 .* needs images of 28 pixels, dataset.size is 16: raise"):
            build(size, channels, net_type=kind)
        return
    net = build(size, channels, net_type=kind, width=8)
    x = torch.randn(2, channels, size, size, requires_grad=True)
    logits, features = net(x)
    assert logits.shape == (2, 10) and features.shape[:2] == (1, 2)
    torch.testing.assert_close(net.head(features[0]), logits)
    torch.testing.assert_close(net.get_feature_single(x), features[0])
    maps = net.layers(x)
    assert maps and all(m.dim() == 4 and len(m) == 2 for m in maps)
    torch.testing.assert_close(net.join(maps[-1]), features[0])
    logits.logsumexp(1).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("settings", "channels", "limit"),
    [
        ({"net_type": "convnet", "depth": 4}, 3, 16),
        ({"net_type": "convnet", "pooling": "none"}, 3, 2),
        ({"net_type": "resnet18"}, 3, 9),
        ({"net_type": "resnet10_ap"}, 3, 16),
        ({"net_type": "resnet10_ap", "norm_type": "batch"}, 3, 8),
        ({"net_type": "vgg11"}, 1, 28),
        ({"net_type": "vgg11"}, 3, 32),
        ({"net_type": "alexnet"}, 3, 8),
        ({"net_type": "lenet"}, 1, 12),
        ({"net_type": "lenet"}, 3, 16),
    ],
)
def test_the_smallest_size_taken_is_the_smallest_that_tells_images_apart(
    settings: dict[str, Any], channels: int, limit: int
) -> None:
    first, second = build(limit, channels, **settings)(torch.randn(2, channels, limit, limit)).features[0]
    assert (first - second).abs().max() > 1e-4
    with pytest.raises(ConfigError, match=f"needs images of {limit} pixels, dataset.size is {limit - 1}"):
        build(limit - 1, channels, **settings)
    kind = settings["net_type"]
    make = image_networks.resnet if kind.startswith("resnet") else getattr(image_networks, kind)
    try:
        blocks, join = make(ImageNetworkConfig(**settings), channels, limit - 1)
        first, second = nn.Sequential(*blocks, join)(torch.randn(2, channels, limit - 1, limit - 1))
    except RuntimeError:  # a map without pixels
        return
    assert (first - second).abs().max() < 1e-4  # but for rounding, the same row for all images


def test_a_convnet_too_deep_for_its_images_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        build(28, depth=5)
    assert str(refused.value) == (
        "network.depth: 5 needs images of 32 pixels, dataset.size is 28: lower the depth to 4 or raise the size"
    )
    assert build(28, depth=4).head.in_features == 128


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"net_type": "alexnet", "norm_type": "batch"}, "alexnet has no norm layers; set none"),
        ({"net_type": "resnet18", "activation": "gelu"}, "resnet18 has its own; set relu"),
        ({"net_type": "vgg11", "pooling": "none"}, "vgg11 has its own; set avg"),
        ({"norm_type": "group", "width": 50}, "width: 50 is not a multiple of the 4 groups"),
        ({"net_type": "resnet50"}, "net_type"),
    ],
)
def test_a_setting_that_the_network_would_not_heed_is_refused(settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        ImageNetworkConfig(**settings)


def test_maps_shrink_by_floor_division() -> None:
    def sides(net: ImageNetwork, size: int) -> list[int]:
        return [m.shape[-1] for m in net.layers(torch.zeros(2, 3, size, size))]

    assert sides(build(28, width=4), 28) == [14, 7, 3]
    assert sides(build(128, width=4, depth=5), 128) == [64, 32, 16, 8, 4]
    assert sides(build(net_type="resnet18"), 32) == [32, 32, 16, 8, 4]
    assert build(28).head.in_features == 128 * 3 * 3


def test_weights_come_from_the_stream_alone() -> None:
    states: list[Tensor] = []
    for number in (3, 3, 4):
        torch.manual_seed(number + len(states))
        before = torch.get_rng_state()
        net = build(number=number)
        states.append(torch.cat([p.flatten() for p in net.parameters()]))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_the_head_has_its_own_rate() -> None:
    net = build()
    body, head = make_optimizer(net, FitConfig(lr=1e-3, head_lr=1e-2, batch_size=1)).param_groups
    assert {id(p) for p in head["params"]} == {id(net.head.weight), id(net.head.bias)} and head["lr"] == 1e-2
    assert sum(p.numel() for p in body["params"]) == 320_010 - 2048 * 10 - 10


@pytest.mark.parametrize("kind", ["convnet", "resnet18", "resnet10_ap", "vgg11"])
@pytest.mark.parametrize("norm_type", ["instance", "batch", "group", "layer", "none"])
def test_the_norm_of_the_settings_stands_in_every_network(kind: str, norm_type: str) -> None:
    net = build(net_type=kind, norm_type=norm_type)
    count = {"convnet": 3, "resnet18": 20, "resnet10_ap": 12, "vgg11": 8}[kind]
    batch = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    grouped = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
    assert len(batch) == (count if norm_type == "batch" else 0)
    assert len(grouped) == (count if norm_type in ("instance", "group", "layer") else 0)
    groups = {"instance": lambda c: c, "group": lambda c: 4, "layer": lambda c: 1}
    assert all(m.num_groups == groups[norm_type](m.num_channels) for m in grouped)


def test_instance_norm_is_pytorch_s_and_ignores_shift_and_scale_of_every_channel_of_every_image() -> None:
    ours, torchs = norm("instance", 4).double(), nn.InstanceNorm2d(4, affine=True).double()
    for layer in (ours, torchs):
        layer.load_state_dict({"weight": torch.tensor([1.0, 2, -3, 0.5]), "bias": torch.tensor([0.0, 1, 2, 3])})
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    scale, shift = 1 + torch.rand(3, 4, 1, 1).double(), torch.randn(3, 4, 1, 1).double()
    torch.testing.assert_close(ours(x), torchs(x))
    torch.testing.assert_close(ours(scale * x + shift), ours(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["instance", "none"])
def test_only_with_instance_norm_a_convnet_ignores_how_its_convolutions_scale_and_shift_channels(
    kind: NormType,
) -> None:
    net, x = build(16, width=8, norm_type=kind), torch.randn(2, 3, 16, 16)
    before = net(x).logits
    with torch.no_grad():
        for layer in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
            scale = 1 + torch.rand(8)
            layer.weight.mul_(scale[:, None, None, None])
            assert layer.bias is not None
            layer.bias.mul_(scale).add_(torch.randn(8))
    change = (net(x).logits - before).abs().max()
    assert change < 1e-3 if kind == "instance" else change > 0.05


def in_order(net: nn.Module, like: nn.Module) -> dict[str, Tensor]:
    """State of `net` under the names of `like`, entry by entry."""
    return dict(zip(like.state_dict(), net.state_dict().values(), strict=True))


def test_the_small_image_resnet_is_torchvision_s_but_for_its_stem() -> None:
    from torchvision.models import resnet18

    whole = resnet18(num_classes=10)
    whole.conv1, whole.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    net, x = build(net_type="resnet18", norm_type="batch"), torch.randn(4, 3, 32, 32)
    whole.load_state_dict(in_order(net, whole))
    torch.testing.assert_close(net(x).logits, whole(x))
    torch.testing.assert_close(net.eval()(x).logits, whole.eval()(x))  # and so are the statistics of that pass


def test_vgg_has_torchvision_s_convolutions() -> None:
    from torchvision.models.vgg import cfgs, make_layers

    whole = make_layers(cfgs["A"], batch_norm=True)
    net, x = build(net_type="vgg11", norm_type="batch"), torch.randn(4, 3, 32, 32)
    whole.load_state_dict(dict(zip(whole.state_dict(), list(net.state_dict().values())[:-2], strict=True)))
    torch.testing.assert_close(net(x).features[0], whole(x).flatten(1))


def test_average_pooling_replaces_every_stride_of_a_resnet_ap() -> None:
    net = build(net_type="resnet10_ap")
    assert {m.stride for m in net.modules() if isinstance(m, nn.Conv2d)} == {(1, 1)}
    maps = net.layers(torch.randn(2, 3, 32, 32))
    assert [m.shape[-1] for m in maps] == [32, 32, 16, 8, 4]
    *_, last = net.blocks
    x, (a, b, c) = maps[-2], (p for p in last.parameters() if p.dim() == 4)
    inner = F.avg_pool2d(F.relu(F.instance_norm(F.conv2d(x, a, padding=1))), 2)
    direct = F.avg_pool2d(F.conv2d(x, c), 2)
    expected = F.relu(F.instance_norm(F.conv2d(inner, b, padding=1)) + F.instance_norm(direct))
    torch.testing.assert_close(maps[-1], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.join(maps[-1]), expected.mean((2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [*({"net_type": kind} for kind in EVERY), {"norm_type": "batch"}])
def test_the_later_blocks_turn_the_map_of_any_block_into_the_network_s_logits(settings: dict[str, Any]) -> None:
    net, x = build(width=8, **settings), torch.randn(3, 3, 32, 32)
    whole, maps = net(x), net.layers(x)
    for layer_idx, expected in (*enumerate(maps, 1), (None, maps[-1])):
        output, found = net.with_map(x, layer_idx)
        torch.testing.assert_close((*output, found), (*whole, expected))
        torch.testing.assert_close(net.from_map(found, layer_idx), whole.logits)


def test_output_and_map_are_of_one_pass() -> None:
    net, passes = build(width=8), []
    for block in net.blocks:
        block.register_forward_hook(lambda *_: passes.append(1))
    output, found = net.with_map(torch.randn(2, 3, 32, 32), 2)
    assert len(passes) == 3
    net.from_map(found, 2)
    assert len(passes) == 4
    (slope,) = torch.autograd.grad(output.logits.sum(), found)  # the logits are of this very map
    assert slope.abs().sum() > 0


@pytest.mark.parametrize("layer_idx", [-1, 0, 4])
def test_a_block_that_the_network_lacks_is_one_line(layer_idx: int) -> None:
    net, expected = build(width=8), f"feature.layer_idx: {layer_idx}, but the network has blocks 1 to 3: take one"
    with pytest.raises(ConfigError, match=expected):
        net.with_map(torch.randn(2, 3, 32, 32), layer_idx)
    with pytest.raises(ConfigError, match=expected):
        net.from_map(torch.randn(2, 8, 4, 4), layer_idx)
