"""Image networks: published sizes, one calling contract, what a norm ignores."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from config import ConfigError
from utils.image_networks import ImageNetwork, ImageNetworkConfig, image_network

EVERY = ("convnet", "resnet18", "resnet18_ap", "resnet10_ap", "vgg11", "alexnet", "mlp", "lenet")


def build(size: int = 32, channels: int = 3, nclass: int = 10, number: int = 0, **settings: Any) -> ImageNetwork:
    return image_network(ImageNetworkConfig(**settings), channels, size, nclass, 0, "test", number)


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("settings", "published"),
    [
        ({}, 320_010),  # the ConvNet of Zhao et al. at 3 x 32 x 32
        ({"net_type": "resnet18", "norm_type": "batch"}, 11_173_962),
        ({"net_type": "lenet"}, 62_006),
        ({"net_type": "alexnet"}, 1_872_202),
        ({"net_type": "mlp"}, 3072 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10),
        ({"net_type": "resnet18_ap", "norm_type": "batch"}, 11_173_962),  # pooling has no weights
        ({"net_type": "resnet10_ap", "norm_type": "batch"}, 4_903_242),
        ({"net_type": "vgg11", "norm_type": "none"}, 9_220_480 + 512 * 10 + 10),  # torchvision's vgg11().features
    ],
)
def test_parameter_counts_are_the_published_ones(settings: dict[str, Any], published: int) -> None:
    assert parameters(build(**settings)) == published


def test_grey_lenet_has_the_size_of_lecun_s() -> None:
    assert parameters(build(28, 1, net_type="lenet")) == 61_706


@pytest.mark.parametrize("size", [16, 28, 32, 64])
@pytest.mark.parametrize("kind", EVERY)
def test_every_network_learns_at_every_size_that_it_takes(kind: str, size: int) -> None:
    if kind == "vgg11" and size < 32:
        with pytest.raises(ConfigError, match=f"32 pixels, dataset.size is {size}"):
            build(size, net_type=kind)
        return
    net = build(size, net_type=kind, width=8, norm_type="instance")
    x = torch.randn(2, 3, size, size, requires_grad=True)
    logits, features = net(x)
    assert logits.shape == (2, 10) and features.shape[:2] == (1, 2)
    torch.testing.assert_close(net.head(features[0]), logits)
    torch.testing.assert_close(net.get_feature_single(x), features[0])
    logits.logsumexp(1).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()


def test_a_convnet_too_deep_for_its_images_is_refused() -> None:
    with pytest.raises(ConfigError, match="depth: 5 needs images of 32 pixels, dataset.size is 16"):
        build(16, depth=5)


def test_weights_come_from_the_stream_alone() -> None:
    states: list[Tensor] = []
    for number in (3, 3, 4):
        torch.manual_seed(number + len(states))
        states.append(build(number=number).state_dict()["blocks.0.0.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_instance_norm_ignores_scale_and_shift_of_an_image() -> None:
    net = build(16, depth=1, width=4, pooling="none").double()
    conv = net.blocks[0].get_submodule("0")
    assert isinstance(conv, nn.Conv2d)
    conv.padding = (0, 0)  # zeros at the border are no shift
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)

    def row(x: Tensor) -> Tensor:
        return net.layers(x)[0]

    torch.testing.assert_close(row(5 * x + 2), row(x), rtol=1e-4, atol=1e-4)


def test_the_small_image_resnet_is_torchvision_s_but_for_its_stem() -> None:
    from torchvision.models import resnet18

    net, whole = build(net_type="resnet18", norm_type="batch").eval(), resnet18().eval()
    for stage, block in zip((whole.layer1, whole.layer2, whole.layer3, whole.layer4), net.blocks[1:], strict=True):
        stage.load_state_dict(block.state_dict())
    x = torch.randn(2, 3, 32, 32)
    stem = net.blocks[0](x)
    expected = whole.layer4(whole.layer3(whole.layer2(whole.layer1(stem)))).mean((2, 3))
    torch.testing.assert_close(net(x).features[0], expected)


def test_average_pooling_replaces_every_stride_of_a_resnet_ap() -> None:
    net = build(net_type="resnet18_ap")
    strides = {m.stride for m in net.modules() if isinstance(m, nn.Conv2d)}
    assert strides == {(1, 1)}
    assert [m.shape[-1] for m in net.layers(torch.zeros(1, 3, 32, 32))] == [32, 32, 16, 8, 4]
