"""Winograd's convolution against torch's."""

import pytest
import torch
from torch import nn

from utils.image_networks import ImageNetworkConfig, image_network
from utils.winograd import WinogradConv, follow, with_winograd


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_plain_convolution(size: int, bias: bool) -> None:
    conv = nn.Conv2d(5, 7, 3, padding=1, bias=bias).double().requires_grad_(False)
    x = torch.randn(3, 5, size, size, dtype=torch.float64)
    torch.testing.assert_close(WinogradConv(conv)(x), conv(x), rtol=1e-12, atol=1e-12)


def test_sides_that_tiles_do_not_fill_go_the_plain_way() -> None:
    conv = nn.Conv2d(5, 7, 3, padding=1)
    x = torch.randn(2, 5, 7, 7)
    assert torch.equal(WinogradConv(conv)(x), conv(x))


@pytest.mark.parametrize("kind", ["convnet", "resnet10_ap", "vgg11"])
def test_a_network_follows_its_parameters(kind: str) -> None:
    settings = ImageNetworkConfig.model_validate({"net_type": kind, "width": 32})
    net = image_network(settings, 3, 32, 10, 0, "test").double().eval().requires_grad_(False)
    twin = with_winograd(net)
    assert any(isinstance(module, WinogradConv) for module in twin.modules())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for p in net.parameters():
        p.add_(0.01 * torch.randn_like(p))
    assert not torch.allclose(twin(x).logits, net(x).logits, rtol=1e-4)
    follow(twin)
    torch.testing.assert_close(twin(x).logits, net(x).logits, rtol=1e-9, atol=1e-9)


def test_in_float32_the_error_is_that_of_rounding() -> None:
    conv = nn.Conv2d(128, 128, 3, padding=1).requires_grad_(False)
    x = torch.randn(4, 128, 16, 16)
    want = conv.double()(x.double())
    error = (WinogradConv(conv.float())(x) - want).abs().max() / want.abs().max()
    assert float(error) < 5e-5
