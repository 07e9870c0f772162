"""Tiles: the same bits for every request size, order and companions, and for every micro-batch of a step."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ConfigError
from scripts import bench_invariant
from utils.augment import VIEWS, view_logits
from utils.image_networks import ImageNetworkConfig, image_network
from utils.invariant import TILE, tiled, tiled_gradients

NETWORKS = {  # with the size and the number of images that it is tried on
    "convnet 128": (ImageNetworkConfig(width=128), 9, 256),
    "convnet 8": (ImageNetworkConfig(width=8), 9, 256),
    "resnet10_ap": (ImageNetworkConfig(net_type="resnet10_ap"), 16, 20),
    "mlp": (ImageNetworkConfig(net_type="mlp", norm_type="none", width=100), 9, 256),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def images(count: int, size: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def network(name: str, size: int = 9, classes: int = 10) -> nn.Module:
    return image_network(NETWORKS[name][0], 3, size, classes, 0, "test").eval()


def logits_of(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: net(x).logits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", [16, TILE])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_sample_s_logits_have_the_same_bits_in_every_request(threads: int, name: str, tile: int, device: str) -> None:
    _, size, count = NETWORKS[name]
    forward, x = logits_of(network(name, size).to(device)), images(count, size).to(device)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1)).to(device)
    whole = tiled(forward, x, tile)
    torch.testing.assert_close(whole, forward(x), rtol=1e-4, atol=1e-5)
    for asked in (1, 3, 13, tile + 1, 100, 255):
        part = order[:asked]
        assert torch.equal(tiled(forward, x[part], tile), whole[part])
    assert torch.equal(tiled(forward, x[order], tile), whole[order])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_place_in_a_tile_changes_no_bit(threads: int, name: str) -> None:
    size = NETWORKS[name][1]
    net = network(name, size, classes=1 if name == "mlp" else 17)  # one output: a matrix-vector product
    rows = tiled(logits_of(net), images(1, size).expand(2 * TILE - 3, -1, -1, -1))
    assert torch.equal(rows, rows[:1].expand_as(rows))


def test_networks_of_full_size_too() -> None:
    for name in ("convnet 128", "mlp"):
        forward, x = logits_of(network(name, 32)), images(48, 32)
        whole = tiled(forward, x)
        for part in (slice(0, 1), slice(5, 8), slice(9, 48)):
            assert torch.equal(tiled(forward, x[part]), whole[part])


@pytest.mark.parametrize("threads", [4], indirect=True)
@pytest.mark.parametrize("count", [3, TILE])
def test_the_address_and_the_layout_of_a_request_change_no_bit(threads: int, count: int) -> None:
    forward, x = logits_of(network("mlp", 32)), images(count, 32)
    shifted = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    for same in (shifted, x.contiguous(memory_format=torch.channels_last), x.flip(0).flip(0)):
        assert torch.equal(tiled(forward, same), tiled(forward, x))


def test_every_pass_has_the_size_of_a_tile_and_ends_in_zeros() -> None:
    seen: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x

    x = torch.ones(37, 2)
    assert torch.equal(tiled(forward, x, 16), x) and [len(part) for part in seen] == [16, 16, 16]
    assert torch.equal(torch.cat(seen), torch.cat([x, torch.zeros(11, 2)]))
    assert tiled(forward, x[:0], 16).shape == (0, 2)


@pytest.mark.parametrize("mode", VIEWS)
def test_tiled_logits_of_views_have_the_same_bits_in_every_request(mode: str) -> None:
    net, x = network("convnet 8"), images(21, 9)

    def logits(pixels: Tensor) -> Tensor:
        return view_logits(lambda view: tiled(logits_of(net), view, 16), pixels, mode, lambda v: (v - 0.4) / 0.2)

    whole = logits(x)
    assert all(torch.equal(logits(x[i : i + 1]), whole[i : i + 1]) for i in range(21))


def step(net: nn.Module, x: Tensor, targets: Tensor, micro: int, tile: int) -> list[Tensor]:
    sums: list[Tensor] = []
    for first in range(0, len(x), micro):
        read, labels = x[first : first + micro].clone(), targets[first : first + micro].clone()

        def loss_sum(part: slice, read: Tensor = read, labels: Tensor = labels, first: int = first) -> Tensor:
            here = slice(part.start - first, part.stop - first)
            return F.cross_entropy(net(read[here]).logits, labels[here], reduction="sum")

        sums = tiled_gradients(loss_sum, list(net.parameters()), range(first, first + len(read)), tile, sums)
    return [total / len(x) for total in sums]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_has_the_same_bits_whatever_its_micro_batches(
    threads: int, name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    _, size, most = NETWORKS[name]
    count = min(most, 104)
    x, targets = images(count, size).to(device), torch.arange(count, device=device) % 10
    net = network(name, size).to(device)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(device == "cuda")
    try:
        whole = step(net, x, targets, count, 16)
        for micro in (16, 48, count):
            assert all(torch.equal(a, b) for a, b in zip(step(net, x, targets, micro, 16), whole, strict=True))
    finally:
        torch.use_deterministic_algorithms(deterministic)


def test_summed_tiles_are_autograd_s_mean_loss_and_gradient() -> None:
    net, x, targets = network("convnet 8").double(), images(40, 9).double(), torch.arange(40) % 10
    loss, *gradients = step(net, x, targets, 32, 16)
    expected = F.cross_entropy(net(x).logits, targets)
    torch.testing.assert_close(loss, expected.detach())
    for found, right in zip(gradients, torch.autograd.grad(expected, list(net.parameters())), strict=True):
        torch.testing.assert_close(found, right)


def test_sums_are_float32_and_a_parameter_without_part_in_the_loss_gets_zeros() -> None:
    used, other = (torch.ones(3, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))

    def loss_sum(part: slice) -> Tensor:
        return (part.stop - part.start) * used.sum()

    loss, gradient, zero = tiled_gradients(loss_sum, [used, other], range(0, 16000), 16)
    assert loss.dtype == gradient.dtype == torch.float32
    assert gradient.tolist() == [16000.0] * 3 and zero.tolist() == [0.0] * 3  # 4096 + 16 = 4096 in bfloat16


@pytest.mark.parametrize("tile", [0, -16, 5, 40])
def test_tiles_of_other_sizes_are_one_line(tile: int) -> None:
    for run in (
        lambda: tiled(torch.relu, torch.ones(3, 2), tile),
        lambda: tiled_gradients(lambda part: torch.zeros(()), [], range(3), tile),
    ):
        with pytest.raises(ConfigError, match=f"tile: {tile} .*multiple of 16"):
            run()


def test_a_micro_batch_within_a_tile_is_one_line() -> None:
    with pytest.raises(ConfigError, match="sample 24; .*multiple of tile: 16"):
        tiled_gradients(lambda part: torch.zeros(()), [], range(24, 48), 16)


def test_the_benchmark_s_sides_agree_and_tiles_change_no_logits() -> None:
    sides, x = bench_invariant.make(8, 70, 32, 16)
    torch.testing.assert_close(sides["plain"](x), sides["tiled"](x))
    assert bench_invariant.differing(sides["tiled"], x) == 0
    assert bench_invariant.differing(lambda part: part.flatten(1) * len(part), x) == 70
