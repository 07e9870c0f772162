"""Regions of a map: exact areas, one classifier before or after pooling, the network's own logits as region 0."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from config import ConfigError
from kd.regions import Bins, parse_scales, pool_matrix, region_logits
from utils.image_networks import ImageNetworkConfig, image_network

C, K = 6, 5
SIZES = [(8, 8), (7, 7), (14, 14), (2, 2), (5, 3), (1, 1)]
SCALES = [(1,), (1, 2), (1, 4), (1, 2, 4), (1, 2, 3), (1, 3), (1, 2, 7)]


def maps(height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, C, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def head(dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(C, K, bias=bias, dtype=dtype)


def slow_regions(x: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Means [B, C, N] over cells, every pixel being cut into m x m equal parts."""
    height, width = x.shape[2:]
    means = []
    for m in scales:
        fine = x.repeat_interleave(m, 2).repeat_interleave(m, 3)
        means += [
            fine[:, :, i * height : (i + 1) * height, j * width : (j + 1) * width].mean((2, 3))
            for i in range(m)
            for j in range(m)
        ]
    return torch.stack(means, 2)


def slow_logits(x: Tensor, classifier: nn.Linear, scales: tuple[int, ...]) -> Tensor:
    return classifier(slow_regions(x, scales).mT).mT


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_cells_weigh_pixels_by_area(height: int, width: int, scales: tuple[int, ...]) -> None:
    matrix = pool_matrix(height, width, scales)
    assert matrix.shape == (sum(m * m for m in scales), height * width)
    torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix), dtype=torch.float64))
    x = maps(height, width)
    torch.testing.assert_close((matrix @ x.flatten(2).mT).mT, slow_regions(x, scales))


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_classifier_may_come_before_or_after_pooling(height: int, width: int, scales: tuple[int, ...]) -> None:
    x, classifier = maps(height, width), head()
    found = region_logits(x, classifier, scales)
    torch.testing.assert_close(found, slow_logits(x, classifier, scales))
    pixels = torch.einsum("bchw,kc->bkhw", x, classifier.weight) + classifier.bias[:, None, None]
    torch.testing.assert_close(found, slow_regions(pixels, scales))
    x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(region_logits(x, classifier, scales), found)
    plain = head(bias=False)
    torch.testing.assert_close(region_logits(x, plain, scales), slow_logits(x, plain, scales))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_region_0_has_the_logits_of_the_mean(height: int, width: int) -> None:
    x, classifier = maps(height, width), head()
    torch.testing.assert_close(region_logits(x, classifier, (1, 2, 4))[..., 0], classifier(x.mean((2, 3))))


@pytest.mark.parametrize("size", [16, 32, 40, 56])
def test_region_0_has_the_logits_of_the_network(size: int) -> None:
    net = image_network(ImageNetworkConfig(net_type="resnet18", norm_type="batch"), 3, size, K, 0, "test").eval()
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        out, last = net.with_map(x)
        torch.testing.assert_close(region_logits(last, net.head, (1, 2, 4))[..., 0], out.logits)


@pytest.mark.parametrize("scales", [(1,), (1, 2), (1, 4), (1, 2, 4)])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_adaptive_bins_are_the_published_pooling(height: int, width: int, scales: tuple[int, ...]) -> None:
    x, classifier = maps(height, width), head()
    grid = F.adaptive_avg_pool2d(x, 4)
    pooled = torch.cat([F.adaptive_avg_pool2d(grid, m).flatten(2) for m in scales], 2)
    torch.testing.assert_close(region_logits(x, classifier, scales, "adaptive"), classifier(pooled.mT).mT)


def test_adaptive_bins_count_some_pixels_more_than_others() -> None:
    weights = {bins: pool_matrix(7, 7, (1,), bins) for bins in ("exact", "adaptive")}
    assert (weights["exact"].max() / weights["exact"].min()).item() == pytest.approx(1)
    assert (weights["adaptive"].max() / weights["adaptive"].min()).item() == pytest.approx(6.25)


def test_adaptive_bins_of_unpublished_scales_are_refused() -> None:
    with pytest.raises(ConfigError, match="set bins exact"):
        region_logits(maps(8, 8), head(), (1, 3), "adaptive")


@pytest.mark.parametrize("bins", ["exact", "adaptive"])
@pytest.mark.parametrize("size", [2, 7, 8])
def test_gradients_are_those_of_differences(size: int, bins: Bins) -> None:
    x = maps(size, size)[:1].requires_grad_()
    assert torch.autograd.gradcheck(lambda m: region_logits(m, head(), (1, 2, 4), bins), x)


def test_gradients_reach_maps_and_classifier_alike() -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        grads = []
        for function in (region_logits, slow_logits):
            x, classifier = maps(8, 8).contiguous(memory_format=layout).requires_grad_(), head()
            function(x, classifier, (1, 2, 4)).square().sum().backward()
            grads.append([x.grad, classifier.weight.grad, classifier.bias.grad])
        torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize(
    ("size", "scales", "rows", "before", "after"),
    [
        (8, (1, 2, 4), 16, 0, 16 * 21),  # cells, by a pooling
        (9, (1, 2, 4), 16, 81 * 16, 16 * 21),  # cells that cut pixels
        (2, (1, 2, 4), 4, 0, 4 * 21),  # pixels
        (14, (1, 2, 7), 54, 196 * 54, 0),  # regions
        (8, (1,), 1, 0, 0),
    ],
)
def test_classifier_reads_the_fewest_rows(
    size: int, scales: tuple[int, ...], rows: int, before: int, after: int
) -> None:
    x, classifier = maps(size, size), head()
    region_logits(x, classifier, scales)
    with FlopCounterMode(display=False) as count:
        region_logits(x, classifier, scales)
    assert count.get_total_flops() == 2 * len(x) * (before * C + rows * C * K + after * K)


def test_low_precision_maps_are_read_in_float32() -> None:
    x, classifier = maps(7, 7, torch.bfloat16), head(torch.bfloat16)
    found = region_logits(x, classifier, (1, 2, 4))
    wide = head(torch.float32)
    wide.load_state_dict(classifier.state_dict())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, slow_logits(x.float(), wide, (1, 2, 4)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(region_logits(x, classifier, (1, 2, 4)), found)


def test_matrices_met_first_without_gradients_serve_training() -> None:
    x, classifier = maps(6, 11), head()
    with torch.inference_mode():
        expected = region_logits(x, classifier, (1, 2)).clone()
    x.requires_grad_()
    found = region_logits(x, classifier, (1, 2))
    found.sum().backward()
    assert np.array_equal(found.detach().numpy(), expected.numpy())


@pytest.mark.parametrize(
    "text", ["[1,2,4]", "[1, 2, 4]", "1,2,4", " 1, 2 ,4 ", "(1, 2, 4)", "[4,2,1]", [1, 2, 4], (1, 2, 4)]
)
def test_scales_are_read_in_every_spelling(text: str | list[int]) -> None:
    assert parse_scales(text) == (1, 2, 4)


def test_any_scales_with_1_are_taken() -> None:
    assert [parse_scales(text) for text in ("[1]", "(1,)", "1,3", "[1,2,7]")] == [(1,), (1,), (1, 3), (1, 2, 7)]


@pytest.mark.parametrize("text", ["", "[]", "[1,,2]", "1;2", "[0,1]", "-1,1", "[1.5]", "[1,1]", "one", [], [1, 2.0]])
def test_other_texts_are_refused_with_the_right_spelling(text: str | list[int]) -> None:
    with pytest.raises(ConfigError, match=r"write it as \[1,2,4\]"):
        parse_scales(text)


def test_scales_without_the_whole_image_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"M: \[2,4\] lacks 1"):
        parse_scales("[2,4]")
