"""Networks of the distillation literature: published sizes, public names, one update of batch norm; foreign ones."""

import argparse
import copy
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from config import ConfigError
from utils.image_networks import ImageNetwork, ImageNetworkConfig, image_network
from utils.kd_networks import LARGE, NETWORKS, kd_network, load_public
from utils.wrapped_network import WrappedNetwork

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torchvision")


@pytest.fixture(autouse=True)
def same_inputs() -> None:
    torch.manual_seed(0)


def build(name: str, nclass: int = 10, size: int = 32, channels: int = 3, number: int = 0) -> ImageNetwork:
    return kd_network(name, nclass, channels, size, 0, "test", number)


def measure(name: str, nclass: int, size: int) -> tuple[int, float, tuple[int, ...]]:
    """Parameters, millions of multiplications of its convolutions, shape of the last map, as it measures its head."""
    products: list[float] = []
    shapes: list[tuple[int, ...]] = []

    def keep(layer: nn.Module, read: tuple[Tensor], given: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            products.append(layer.weight.numel() * given[0, 0].numel() / 1e6)
        elif isinstance(layer, nn.AdaptiveAvgPool2d):
            shapes.append(tuple(read[0].shape[1:]))

    with torch.device("meta"), register_module_forward_hook(keep):
        net = build(name, nclass, size)
    return sum(p.numel() for p in net.parameters()), sum(products), shapes[0]


# name, parameters at 100 classes, channels and side of the last map, millions of multiplications
CIFAR = """
resnet8 83892 64 8 12.5
resnet14 181108 64 8 26.7
resnet20 278324 64 8 40.8
resnet32 472756 64 8 69.1
resnet44 667188 64 8 97.4
resnet56 861620 64 8 125.7
resnet110 1736564 64 8 253.1
resnet8x4 1233540 256 8 177.0
resnet32x4 7433860 256 8 1083.0
wrn_16_1 180916 64 8 26.7
wrn_16_2 703284 128 8 101.1
wrn_40_1 569780 64 8 83.3
wrn_40_2 2255156 128 8 327.6
vgg8 3965028 512 4 96.1
vgg11 9277284 512 4 209.4
vgg13 9462180 512 4 284.9
vgg16 14774436 512 4 398.1
vgg19 20086692 512 4 511.4
MobileNetV2 812836 1280 2 6.4
ShuffleV1 949258 960 4 38.6
ShuffleV2 1355528 1024 4 44.4
ResNet18 11220132 512 4 555.4
ResNet50 23705252 2048 4 1297.8
"""
IMAGENET = """
imagenet_resnet18 11689512 512 7 1813.6
imagenet_resnet34 21797672 512 7 3663.2
imagenet_resnet50 25557032 2048 7 4087.1
MobileNetV1 4231976 1024 7 567.7
"""
CUB = """
resnet32x4 7463400 256 28 13300
resnet8x4 1263080 256 28 2200
vgg8 4016328 512 28 4700
vgg13 9513480 512 28 14000
MobileNetV2 942856 1280 7 110
ShuffleV1 1048814 960 14 520
ResNet50 23917832 2048 14 16000
"""


@pytest.mark.parametrize(("table", "nclass", "size"), [(CIFAR, 100, 32), (IMAGENET, 1000, 224), (CUB, 200, 224)])
def test_parameters_multiplications_and_maps_are_the_published_ones(table: str, nclass: int, size: int) -> None:
    for line in table.strip().splitlines():
        name, *numbers = line.split()
        parameters, channels, side, products = (float(number) for number in numbers)
        found, multiplied, shape = measure(name, nclass, size)
        assert (name, found, shape) == (name, parameters, (channels, side, side))
        assert multiplied == pytest.approx(products, rel=0.05 if table == CUB else 0, abs=0.051)


def test_every_network_is_in_a_table() -> None:
    assert {line.split()[0] for line in (CIFAR + IMAGENET).split("\n") if line} == {*NETWORKS}


def test_every_family_has_a_stem_for_large_images() -> None:
    parameters, multiplied, shape = measure("wrn_40_2", 200, 224)
    assert (parameters, shape) == (2255156 + 100 * 129 + 3 * 16 * (49 - 9), (128, 28, 28))
    assert multiplied == pytest.approx(4000, rel=0.02)
    assert measure("ShuffleV2", 200, 224)[2] == (1024, 14, 14)
    assert measure("vgg8", 200, 64)[2] == (512, 4, 4)  # after a fourth pooling


class Public(dict[str, Tensor]):
    """Weights under the names of public files, made when first asked for, and the functions that read them."""

    def get_or_make(self, name: str, *shape: int, around: float = 0.0, spread: float = 1.0) -> Tensor:
        if name not in self:
            self[name] = around + spread * torch.rand(shape) - (0 if around else spread / 2)
        return self[name]

    def conv(self, x: Tensor, name: str, width: int, side: int = 1, stride: int = 1, groups: int = 1) -> Tensor:
        inputs = x.shape[1] // groups
        spread = math.sqrt(24 / (inputs * side**2))  # keeps the variance through a ReLU
        weight = self.get_or_make(f"{name}.weight", width, inputs, side, side, spread=spread)
        return F.conv2d(x, weight, self.get(f"{name}.bias"), stride, side // 2, groups=groups)

    def norm(self, x: Tensor, name: str) -> Tensor:
        width = x.shape[1]
        weight = self.get_or_make(f"{name}.weight", width, around=0.7, spread=0.6)
        bias = self.get_or_make(f"{name}.bias", width)
        mean, var = (
            self.get_or_make(f"{name}.running_mean", width),
            self.get_or_make(f"{name}.running_var", width, around=0.5),
        )
        return F.batch_norm(x, mean, var, weight, bias)

    def both(self, x: Tensor, conv: str, norm: str, *args: int) -> Tensor:
        return self.norm(self.conv(x, conv, *args), norm)

    def end(self, x: Tensor, name: str) -> Tensor:
        weight = self.get_or_make(f"{name}.weight", 10, x.shape[1], spread=0.1)
        return F.linear(x.mean((2, 3)), weight, self.get_or_make(f"{name}.bias", 10))


def public_resnet(
    p: Public, x: Tensor, counts: list[int], widths: list[int], shortcut: str, head: str, wide: int = 1
) -> Tensor:
    """With `wide` times as many channels at a unit's end as within, by three convolutions if wide > 1."""
    x = F.relu(p.both(x, "conv1", "bn1", widths[0], 3))
    for stage, (count, width) in enumerate(zip(counts, widths[1:], strict=True), 1):
        for unit in range(count):
            at, stride = f"layer{stage}.{unit}", 2 if stage > 1 and not unit else 1
            direct = x
            if stride == 2 or x.shape[1] != wide * width:
                direct = p.both(x, f"{at}.{shortcut}.0", f"{at}.{shortcut}.1", wide * width, 1, stride)
            if wide == 1:
                x = F.relu(p.both(x, f"{at}.conv1", f"{at}.bn1", width, 3, stride))
                x = p.both(x, f"{at}.conv2", f"{at}.bn2", width, 3)
            else:
                x = F.relu(p.both(x, f"{at}.conv1", f"{at}.bn1", width))
                x = F.relu(p.both(x, f"{at}.conv2", f"{at}.bn2", width, 3, stride))
                x = p.both(x, f"{at}.conv3", f"{at}.bn3", wide * width)
            x = F.relu(x + direct)
    return p.end(x, head)


def public_wrn(p: Public, x: Tensor, count: int, factor: int) -> Tensor:
    x = p.conv(x, "conv1", 16, 3)
    for stage in (1, 2, 3):
        for unit in range(count):
            at, width, stride = f"block{stage}.layer.{unit}", 8 * 2**stage * factor, 2 if stage > 1 and not unit else 1
            start = F.relu(p.norm(x, f"{at}.bn1"))
            y = p.conv(start, f"{at}.conv1", width, 3, stride)
            y = p.conv(F.relu(p.norm(y, f"{at}.bn2")), f"{at}.conv2", width, 3)
            x = y + (x if x.shape == y.shape else p.conv(start, f"{at}.convShortcut", width, 1, stride))
    return p.end(F.relu(p.norm(x, "bn1")), "fc")


def public_vgg(p: Public, x: Tensor, counts: list[int]) -> Tensor:
    for stage, (count, width) in enumerate(zip(counts, (64, 128, 256, 512, 512), strict=True)):
        for unit in range(count):
            at = f"block{stage}.{3 * unit}"
            p.get_or_make(f"{at}.bias", width)
            x = F.relu(p.both(x, at, f"block{stage}.{3 * unit + 1}", width, 3))
        x = F.max_pool2d(x, 2) if stage < 3 else x
    return p.end(x, "classifier")


def public_mobile2(p: Public, x: Tensor) -> Tensor:
    x = F.relu(p.both(x, "conv1.0", "conv1.1", 16, 3, 2))
    plan = [(1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1)]
    for stage, (factor, width, count, first) in enumerate(plan):
        for unit in range(count):
            at, stride, inner = f"blocks.{stage}.{unit}.conv", first if not unit else 1, factor * x.shape[1]
            y = F.relu(p.both(x, f"{at}.0", f"{at}.1", inner))
            y = F.relu(p.both(y, f"{at}.3", f"{at}.4", inner, 3, stride, inner))
            y = p.both(y, f"{at}.6", f"{at}.7", width)
            x = x + y if x.shape == y.shape else y
    return p.end(F.relu(p.both(x, "conv2.0", "conv2.1", 1280)), "classifier.0")


def shuffle(x: Tensor, groups: int) -> Tensor:
    order = torch.arange(x.shape[1]).view(groups, -1).T.flatten()
    return x[:, order]


def public_shuffle1(p: Public, x: Tensor) -> Tensor:
    x = F.relu(p.both(x, "conv1", "bn1", 24))
    for stage, (width, count) in enumerate(((240, 4), (480, 8), (960, 4)), 1):
        for unit in range(count):
            at, groups = f"layer{stage}.{unit}", 1 if x.shape[1] == 24 else 3
            new, stride = (width, 1) if unit else (width - x.shape[1], 2)
            y = F.relu(p.both(x, f"{at}.conv1", f"{at}.bn1", new // 4, 1, 1, groups))
            y = F.relu(p.both(shuffle(y, groups), f"{at}.conv2", f"{at}.bn2", new // 4, 3, stride, new // 4))
            y = p.both(y, f"{at}.conv3", f"{at}.bn3", new, 1, 1, 3)
            x = F.relu(x + y) if unit else F.relu(torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1))
    return p.end(x, "linear")


def public_shuffle2(p: Public, x: Tensor) -> Tensor:
    x = F.relu(p.both(x, "conv1", "bn1", 24))
    for stage, (width, count) in enumerate(((116, 4), (232, 8), (464, 4)), 1):
        for unit in range(count):
            at, half = f"layer{stage}.{unit}", width // 2
            if unit:
                left, y, names, stride = x[:, :half], x[:, half:], "123", 1
            else:
                left = p.both(x, f"{at}.conv1", f"{at}.bn1", x.shape[1], 3, 2, x.shape[1])
                left, y, names, stride = F.relu(p.both(left, f"{at}.conv2", f"{at}.bn2", half)), x, "345", 2
            a, b, c = names
            y = F.relu(p.both(y, f"{at}.conv{a}", f"{at}.bn{a}", half))
            y = p.both(y, f"{at}.conv{b}", f"{at}.bn{b}", half, 3, stride, half)
            y = F.relu(p.both(y, f"{at}.conv{c}", f"{at}.bn{c}", half))
            x = shuffle(torch.cat([left, y], 1), 2)
    return p.end(F.relu(p.both(x, "conv2", "bn2", 1024)), "linear")


def public_mobile1(p: Public, x: Tensor) -> Tensor:
    x = F.relu(p.both(x, "model.0.0", "model.0.1", 32, 3, 2))
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    for number, (width, stride) in enumerate(plan, 1):
        at, inputs = f"model.{number}", x.shape[1]
        x = F.relu(p.both(x, f"{at}.0", f"{at}.1", inputs, 3, stride, inputs))
        x = F.relu(p.both(x, f"{at}.3", f"{at}.4", width))
    return p.end(x, "fc")


EVERY_FAMILY = (
    "resnet8x4", "wrn_16_2", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2", "ResNet18", "imagenet_resnet18",
    "MobileNetV1",
)  # fmt: skip
SMALL, DEEP = [16, 16, 32, 64], [64, 64, 128, 256, 512]
AS_PUBLISHED: dict[str, Callable[[Public, Tensor], Tensor]] = {
    "resnet14": lambda p, x: public_resnet(p, x, [2, 2, 2], SMALL, "downsample", "fc"),
    "resnet8x4": lambda p, x: public_resnet(p, x, [1, 1, 1], [32, 64, 128, 256], "downsample", "fc"),
    "ResNet50": lambda p, x: public_resnet(p, x, [3, 4, 6, 3], DEEP, "shortcut", "linear", 4),
    "wrn_16_1": lambda p, x: public_wrn(p, x, 2, 1),
    "wrn_40_2": lambda p, x: public_wrn(p, x, 6, 2),
    "vgg13": lambda p, x: public_vgg(p, x, [2, 2, 2, 2, 2]),
    "MobileNetV2": public_mobile2,
    "ShuffleV1": public_shuffle1,
    "ShuffleV2": public_shuffle2,
    "MobileNetV1": public_mobile1,
}


@pytest.mark.parametrize("name", AS_PUBLISHED)
def test_a_public_file_gives_the_logits_of_its_published_definition(name: str, tmp_path: Path) -> None:
    public, x = Public(), torch.randn(2, 3, 32, 32)
    expected = AS_PUBLISHED[name](public, x)
    torch.save({"model": dict(public), "epoch": 240}, tmp_path / "ckpt_epoch_240.pth")
    net = build(f"{name}_sdd").eval()
    load_public(f"{name}_sdd", tmp_path / "ckpt_epoch_240.pth", net)
    with torch.no_grad():
        found = net(x).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def small() -> tuple[Public, Tensor, Tensor]:
    """A public network, images, and its logits."""
    public, x = Public(), torch.randn(2, 3, 16, 16)
    return public, x, AS_PUBLISHED["resnet8x4"](public, x)


@pytest.mark.parametrize(
    "layout", ["flat", "module", "student", "numpy", "arguments", "safetensors", "ours", "ours_pth"]
)
def test_every_layout_of_a_file_is_read(layout: str, small: tuple[Public, Tensor, Tensor], tmp_path: Path) -> None:
    public, x, expected = small
    net, reread = build("resnet8x4"), build("resnet8x4", number=1)
    state: dict[str, Any] = dict(public)
    if layout == "module":
        state = {"state_dict": {f"module.{key}": value for key, value in state.items()}}
    elif layout == "student":
        students = {f"module.student.{key}": value for key, value in state.items()}
        state = {"model": {"module.teacher.conv1.weight": torch.zeros(1), **students}, "epoch": 1}
    elif layout == "numpy":
        state = {"model": state, "best_acc": np.float64(72.5), "acc": np.float32(72.5)}
    elif layout == "arguments":
        state = {"opt": argparse.Namespace(lr=0.05, model="resnet8x4"), "model": state}
    path = tmp_path / ("net.safetensors" if layout in ("safetensors", "ours") else "net.pth")
    torch.save(state, tmp_path / "net.pth")
    if layout == "safetensors":
        save_file(state, path)
    load_public("resnet8x4", tmp_path / "net.pth" if layout == "ours" else path, net)
    if layout.startswith("ours"):
        (save_file if layout == "ours" else torch.save)(net.state_dict(), path)
        load_public("resnet8x4", path, reread)
        net = reread
    torch.testing.assert_close(net.eval()(x).logits, expected, rtol=1e-3, atol=1e-3)


def test_torchvision_s_weights_load_as_they_are(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    whole, x = resnet18(num_classes=10), torch.randn(4, 3, 64, 64)
    torch.save(whole.state_dict(), tmp_path / "net.pth")
    for name in ("imagenet_resnet18", "torchvision:resnet18"):
        net = build(name, size=64)
        load_public(name, tmp_path / "net.pth", net)
        torch.testing.assert_close(net.eval()(x).logits, whole.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "nclass", "reason"),
    [
        ("resnet8x4", 20, r"not the weights of resnet8x4 for 20 classes \(2 differences; head.weight has the shape"),
        ("resnet8", 10, "not the weights of resnet8 for 10 classes .*instead of .*: take another file"),
        ("resnet32x4", 10, r"no blocks\.1\.1\.conv1\.weight"),
        ("wrn_16_1", 10, "not the weights of wrn_16_1"),
        ("MobileNetV2", 10, "not the weights of MobileNetV2"),
        ("vgg8", 10, "not the weights of vgg8"),
        ("torchvision:resnet18", 10, "not the weights of torchvision:resnet18"),
    ],
)
def test_the_file_of_another_network_is_one_line(
    name: str, nclass: int, reason: str, small: tuple[Public, Tensor, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "resnet8x4.pth"
    torch.save({"model": dict(small[0])}, path)
    net = build(name, nclass)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ConfigError, match=reason) as refused:
        load_public(name, path, net)
    assert "\n" not in str(refused.value) and str(refused.value).startswith(str(path))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


class Harm:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("executed",)


def test_nothing_in_a_file_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = build("resnet8")
    torch.save({"model": net.state_dict(), "opt": Harm()}, tmp_path / "harm.pth")
    (tmp_path / "harm.pkl").write_bytes(pickle.dumps(Harm(), protocol=2))
    for name in ("harm.pth", "harm.pkl"):
        with pytest.raises(ConfigError, match="not a readable file of tensors"):
            load_public("resnet8", tmp_path / name, net)
    assert capsys.readouterr().out == ""
    for value in ({"epoch": 3}, {}, [torch.zeros(1)]):
        torch.save(value, tmp_path / "other.pth")
        with pytest.raises(ConfigError, match="holds no named tensors"):
            load_public("resnet8", tmp_path / "other.pth", net)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_a_training_pass_updates_every_batch_norm_once_and_the_map_gives_the_logits(name: str) -> None:
    net, x = build(name, size=16), torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    output, maps = net.to(memory_format=torch.channels_last).train().with_map(x)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(m.num_batches_tracked == 1 for m in norms)
    torch.testing.assert_close(net.head(net.join(maps)), output.logits)
    torch.testing.assert_close(net.classifier(maps.mean((2, 3))), output.logits, rtol=1e-4, atol=1e-5)
    output.logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    plain = net.eval().to(memory_format=torch.contiguous_format)(x.contiguous()).logits
    torch.testing.assert_close(net.to(memory_format=torch.channels_last)(x).logits, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_any_size_is_taken_whatever_the_network_was_made_for(name: str) -> None:
    for made, channels, sizes in ((8, 1, (8, 33)), (LARGE, 3, (17, 65))):
        net = build(name, size=made, channels=channels).eval()
        for size in sizes:
            with torch.no_grad():
                assert net(torch.randn(2, channels, size, size)).logits.isfinite().all()


def test_names_are_checked() -> None:
    with pytest.raises(ConfigError, match="network 'resnet8X4' is not known; take resnet8x4, .*or torchvision:NAME"):
        build("resnet8X4_sdd")
    for wrong, right in (("wrn40_2", "wrn_40_2"), ("mobilenetv2", "MobileNetV2"), ("shufflev1", "ShuffleV1")):
        with pytest.raises(ConfigError, match=f"take {right}"):
            build(wrong)
    with pytest.raises(ConfigError, match="take resnet8, .*MobileNetV1"):
        build("???")
    with pytest.raises(ConfigError, match="vgg8 needs images of 8 pixels, these have 7"):
        build("vgg8", size=7)
    with pytest.raises(ConfigError, match="no classifier 'resnet_18'; did you mean 'resnet18'"):
        build("torchvision:resnet_18")


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.flatten() for p in net.parameters()])


@pytest.mark.parametrize("name", ["resnet8", "ShuffleV1", "torchvision:shufflenet_v2_x0_5"])
def test_weights_come_from_the_stream_alone(name: str) -> None:
    states = []
    for number in (3, 3, 4):
        torch.manual_seed(number + len(states))
        before = torch.get_rng_state()
        states.append(flat(build(name, number=number)))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    assert torch.equal(flat(build(f"{name}_sdd", number=3)), states[0])


@pytest.mark.parametrize("name", ["resnet8x4", "wrn_16_2", "vgg8", "MobileNetV2", "ResNet18"])
def test_convolutions_start_normal_with_the_variance_of_their_outputs(name: str) -> None:
    net = build(name, size=LARGE)
    for m in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        drawn = (m.weight * math.sqrt(m.kernel_size[0] ** 2 * m.out_channels / 2)).flatten().detach()
        assert abs(drawn.std() - 1) < 5 / math.sqrt(2 * drawn.numel()), m
        assert drawn.numel() < 4000 or abs((drawn**4).mean() - 3) < 0.5  # of a normal variable; 1.8 of a uniform one
        assert m.bias is None or not m.bias.any()
    small_head = name in ("vgg8", "MobileNetV2")
    assert net.head.bias.any() == (not small_head and name != "wrn_16_2")
    if small_head:
        assert net.head.weight.std().item() == pytest.approx(0.01, rel=0.1)


FOREIGN = ("resnet18", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "densenet121", "mnasnet0_5")


@pytest.mark.parametrize("name", FOREIGN)
def test_torchvision_s_classifiers_are_wrapped_as_they_are(name: str) -> None:
    net, x = build(f"torchvision:{name}"), torch.randn(2, 3, 32, 32)
    assert isinstance(net, WrappedNetwork)
    module = net.eval().blocks[0].get_submodule("module")
    expected = module(x)
    for other in (net, copy.deepcopy(net)) if name == "resnet18" else (net,):
        output, maps = other.with_map(x)
        torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.head(other.join(maps)), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.from_map(maps), expected, rtol=1e-4, atol=1e-5)
        assert maps.dim() == 4
        torch.testing.assert_close(other.classifier(maps.mean((2, 3))), expected, rtol=1e-4, atol=1e-5)
    state = net.state_dict()
    assert {key.removeprefix(WrappedNetwork.PLACE): v.shape for key, v in state.items()} == {
        key: v.shape for key, v in module.state_dict().items()
    }
    assert len({v.data_ptr() for v in net.parameters()}) == len([*net.parameters()])


def test_a_copy_of_a_wrapped_network_has_its_own_weights() -> None:
    net, x = build("torchvision:mobilenet_v3_small").eval(), torch.randn(2, 3, 32, 32)
    other, before = copy.deepcopy(net), net(x).logits
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(net(x).logits, before) and not other(x).logits.any()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x).logits, before)


class Functional(nn.Module):
    """Pools by a function after a squeeze of its own, has batch norm and dropout between pooling and head."""

    def __init__(self, num_classes: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.norm = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)), nn.BatchNorm2d(8)
        self.neck, self.drop, self.fc = nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, num_classes)
        self.pool = pool

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.body(x)
        x = x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1))
        x = F.relu(self.norm(x))
        rows = self.neck(self.pool(x))
        return self.fc(self.drop(rows)), [rows]


def put(monkeypatch: pytest.MonkeyPatch, make: Any) -> str:
    module = ModuleType("mine")
    module.__dict__["net"] = make
    monkeypatch.setitem(sys.modules, "mine", module)
    return "mine:net"


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean((2, 3)),
    "torch.mean": lambda x: torch.mean(x, dim=[2, 3], keepdim=True).squeeze(3).squeeze(2),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "window": lambda x: F.avg_pool2d(x, x.shape[-1]).view(len(x), -1),
}


@pytest.mark.parametrize("pool", POOLS)
def test_a_module_of_a_user_is_wrapped_with_all_that_stands_after_its_pooling(
    pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = build(put(monkeypatch, lambda num_classes: Functional(num_classes, POOLS[pool])), size=16)
    module, x = net.blocks[0].get_submodule("module"), torch.randn(6, 3, 16, 16)
    twin = copy.deepcopy(module)
    torch.manual_seed(1)
    expected = twin(x)[0]
    torch.manual_seed(1)
    output, maps = net.with_map(x)
    torch.testing.assert_close(output.logits, expected)
    assert maps.shape == (6, 8, 8, 8) and (maps >= 0).all()
    assert all(m.num_batches_tracked == 1 for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d))
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(net.state_dict()[WrappedNetwork.PLACE + key], value)
    for loss in (output.logits.square().sum(), expected.square().sum()):
        loss.backward()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3)
    net.eval()
    torch.testing.assert_close(net.classifier(maps.mean((2, 3))), net.from_map(maps))


def test_a_classifier_that_reads_pixels_apart_is_wrapped_but_has_no_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(num_classes: int) -> nn.Module:  # as VGG
        features = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        return nn.Sequential(*features, nn.Linear(32, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, num_classes))

    net, x = build(put(monkeypatch, make), size=16).eval(), torch.randn(2, 3, 16, 16)
    output, maps = net.with_map(x)
    torch.testing.assert_close(output.logits, net.blocks[0].get_submodule("module")(x))
    assert maps.shape == (2, 8, 2, 2)
    with pytest.raises(ConfigError, match="does not average its last map"):
        _ = net.classifier


class Refused(nn.Module):
    """What cannot be wrapped."""

    def __init__(self, num_classes: int, kind: str) -> None:
        super().__init__()
        self.kind, self.conv = kind, nn.Conv2d(3, 8, 3, 2, 1)
        self.fc, self.aside = nn.Linear(16 if kind == "two pools" else 8, num_classes), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        rows = maps.mean((2, 3))
        if self.kind == "two pools":
            return self.fc(torch.cat([rows, maps.amax((2, 3))], 1))
        if self.kind == "largest":
            return self.fc(maps.amax((2, 3)))
        if self.kind == "tokens":
            return self.fc(maps.flatten(2).mT[:, 0])
        if self.kind == "softmax":
            return self.fc(rows).softmax(1)
        if self.kind == "function":
            return self.fc(rows.tanh())
        if self.kind == "dropout":
            return self.fc(F.dropout(rows, 0.5, self.training))
        if self.kind == "branch":
            return self.fc(rows) if self.aside(rows) is None else self.fc(rows)
        return F.adaptive_avg_pool2d(F.conv2d(maps, self.fc.weight[:, :, None, None]), 1).flatten(1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("two pools", "does more between its last map and its head 'fc' than layer after layer"),
        ("function", "does more between its last map"),
        ("branch", "does more between its last map"),
        ("dropout", "another way from its last map to its head in training .* dropout as nn.Dropout"),
        ("largest", "reads its last map by amax: average it"),
        ("tokens", r"head 'fc' of mine:net reads no map \[B, C, H, W\]"),
        ("softmax", "does not end in an nn.Linear"),
        ("convolution", "does not end in an nn.Linear"),
    ],
)
def test_a_module_without_the_parts_is_refused_with_the_reason(
    kind: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = put(monkeypatch, lambda num_classes: Refused(num_classes, kind))
    with pytest.raises(ConfigError, match=reason) as refused:
        build(name, size=16)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("torchvision:squeezenet1_1", "does not end in an nn.Linear"),
        ("torchvision:googlenet", "without auxiliary heads"),
        ("torchvision:inception_v3", r"fails on images \[3, 32, 32\] .*: resize them"),
        ("nowhere.to_be:found", "No module named 'nowhere'.* PYTHONPATH"),
        ("math:nothing", "has no attribute 'nothing'"),
        ("math:cos", "failed .*num_classes"),
    ],
)
def test_a_name_that_leads_to_no_such_module_is_one_line(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        build(name)
    assert "\n" not in str(refused.value)


def test_a_transformer_has_no_map() -> None:
    from torchvision.models import VisionTransformer

    small = VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=10)
    with pytest.raises(ConfigError, match=r"head 'heads.head' of small reads no map \[B, C, H, W\]"):
        WrappedNetwork("small", small, 3, 32, 10)
    with pytest.raises(ConfigError, match=r"small fails on images \[3, 16, 16\] \(Wrong image height"):
        WrappedNetwork("small", small, 3, 16, 10)


def test_a_factory_is_held_to_its_classes_and_to_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"gives \[7\] numbers an image, not 10 classes"):
        build(put(monkeypatch, lambda num_classes: Functional(7, POOLS["mean"])), size=16)
    with pytest.raises(ConfigError, match="gives int: return a torch.nn.Module"):
        build(put(monkeypatch, lambda num_classes: num_classes))


def test_a_wrapped_network_stops_before_its_pooling(monkeypatch: pytest.MonkeyPatch) -> None:
    net = build(put(monkeypatch, lambda num_classes: Functional(num_classes, POOLS["mean"])), size=16)
    heads: list[int] = []
    net.head.register_forward_hook(lambda *_: heads.append(1))
    net(torch.randn(2, 3, 16, 16))
    assert len(heads) == 1


def test_networks_that_read_pixels_apart_have_no_region_classifier() -> None:
    with pytest.raises(ConfigError, match="M: the network does not average its last map"):
        _ = image_network(ImageNetworkConfig(), 3, 16, 10, 0, "test").classifier
    averaged = image_network(ImageNetworkConfig(net_type="resnet10_ap"), 3, 16, 10, 0, "test")
    assert averaged.classifier is averaged.head
