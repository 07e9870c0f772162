"""Augmentation: one draw for both halves, closed forms of every operation, exact shares."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from config import ConfigError
from utils.augment import (
    APPLY,
    BRIGHTNESS,
    CONTRAST,
    CROP,
    ROTATE,
    SATURATION,
    SCALE,
    VIEWS,
    Augmentation,
    Augmenter,
    BatchAugmentConfig,
    cutmix,
    draw_augmentation,
    mixup,
    view_logits,
    views,
)
from utils.streams import generator

ALL = "color_crop_cutout_flip_scale_rotate"


def images(count: int = 4, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def only(name: str, *numbers: float) -> Augmentation:
    return Augmentation((name,), {name: torch.tensor([[*numbers, *[0.5] * (3 - len(numbers))]], dtype=torch.float64)})


def gen(number: int = 0) -> torch.Generator:
    return generator(0, "test", number)


def test_one_draw_does_the_same_to_both_halves() -> None:
    view, x = draw_augmentation(ALL, 1, gen()), images(6)
    torch.testing.assert_close(view(x), torch.cat([view(x[:2]), view(x[2:])]))
    assert not torch.allclose(view(x), x)


def test_parameters_come_from_the_stream_and_do_not_depend_on_the_other_operations() -> None:
    few, many = draw_augmentation("crop", 1, gen()), draw_augmentation(ALL, 1, gen())
    assert torch.equal(few.numbers["crop"], many.numbers["crop"])
    assert torch.equal(few.numbers["crop"], draw_augmentation("crop", 1, gen()).numbers["crop"])
    assert not torch.equal(few.numbers["crop"], draw_augmentation("crop", 1, gen(1)).numbers["crop"])


def test_images_of_a_batch_can_have_their_own_parameters() -> None:
    x = images(1).expand(5, -1, -1, -1)
    assert len({row.sum().item() for row in draw_augmentation("color", 5, gen())(x)}) == 5


def test_published_strategies_take_one_of_their_alternatives_for_the_whole_batch() -> None:
    x, counts = images(3), {"crop": 0, "scale": 0, "rotate": 0}
    for number in range(120):
        view = draw_augmentation("flip_crop/scale/rotate", 3, gen(number))
        assert view.names[0] == "flip" and len(view.names) == 2
        counts[view.names[1]] += 1
        alone = draw_augmentation("_".join(view.names), 3, gen(number))
        assert torch.equal(view(x), alone(x))
    assert min(counts.values()) > 20


def test_alternatives_may_hold_all_of_colour() -> None:
    found = {draw_augmentation("color/cutout", 1, gen(number)).names for number in range(20)}
    assert found == {("brightness", "saturation", "contrast"), ("cutout",)}


def test_brightness_saturation_and_contrast_are_their_closed_forms() -> None:
    x = images()
    torch.testing.assert_close(only("brightness", 0.8)(x), x + 0.3 * BRIGHTNESS)
    grey = x.mean(1, keepdim=True)
    torch.testing.assert_close(only("saturation", 0.25)(x), grey + (x - grey) * 0.25 * SATURATION)
    torch.testing.assert_close(only("saturation", 0.0)(x), grey.expand_as(x))
    mean = x.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(only("contrast", 1.0)(x), mean + (x - mean) * (1 + CONTRAST))


def test_flip_is_torch_flip_for_one_half_of_the_numbers() -> None:
    x = images()
    assert torch.equal(only("flip", 0.2)(x), x.flip(3)) and torch.equal(only("flip", 0.7)(x), x)


@pytest.mark.parametrize("numbers", [(0.0, 0.999), (0.5, 0.5), (0.999, 0.1)])
def test_crop_is_a_slice_of_the_padded_image(numbers: tuple[float, float]) -> None:
    x, most = images(), int(16 * CROP + 0.5)
    top, left = (int(u * (2 * most + 1)) for u in numbers)
    padded = torch.nn.functional.pad(x, (most,) * 4)
    assert torch.equal(only("crop", *numbers)(x), padded[..., top : top + 16, left : left + 16])


def test_the_middle_number_leaves_places_alone() -> None:
    x = images()
    torch.testing.assert_close(only("rotate", 0.5)(x), x)
    torch.testing.assert_close(only("crop", 0.5, 0.5)(x), x)


def test_a_turn_takes_a_point_where_trigonometry_says() -> None:
    x = torch.zeros(1, 1, 65, 65, dtype=torch.float64)
    x[0, 0, 32, 52] = 1.0  # 20 pixels to the right of the middle
    row, column = divmod(int(only("rotate", 1.0)(x).argmax()), 65)
    angle = ROTATE * math.pi / 180
    assert abs(column - (32 + 20 * math.cos(angle))) < 1 and abs(abs(row - 32) - 20 * math.sin(angle)) < 1


def test_scale_stretches_each_side_by_its_own_factor() -> None:
    place = (torch.arange(32, dtype=torch.float64) + 0.5) / 16 - 1  # of pixel centres, -1 ... 1
    x = torch.stack([place.expand(32, 32), place[:, None].expand(32, 32)])[None]  # its x, its y
    found = only("scale", 0.2, 0.9)(x)[..., 8:24, 8:24]
    across, down = (1 / SCALE + u * (SCALE - 1 / SCALE) for u in (0.2, 0.9))
    torch.testing.assert_close(found[0, 0], across * x[0, 0, 8:24, 8:24])
    torch.testing.assert_close(found[0, 1], down * x[0, 1, 8:24, 8:24])


def test_a_turn_is_grid_sample_by_the_rotation_matrix() -> None:
    x = images(2)
    angle = math.radians(0.4 * ROTATE)
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]], dtype=torch.float64).expand(2, -1, -1)
    grid = torch.nn.functional.affine_grid(matrix, [2, 3, 16, 16], align_corners=False)
    expected = torch.nn.functional.grid_sample(x, grid, align_corners=False)
    torch.testing.assert_close(only("rotate", 0.7)(x), expected)


def test_cutout_empties_a_square_of_half_a_side() -> None:
    x = torch.ones(1, 3, 16, 16, dtype=torch.float64)
    empty = only("cutout", 0.5, 0.5)(x) == 0
    assert empty[0, 0].sum() == 64 and torch.equal(empty[0, 0], empty[0, 2])
    assert (only("cutout", 0.0, 0.999)(x) == 0)[0, 0].sum() == 16  # in a corner: a quarter of the square


@pytest.mark.parametrize("name", sorted(APPLY))
def test_every_operation_lets_gradients_through(name: str) -> None:
    x = images(2, 8).requires_grad_()
    assert torch.autograd.gradcheck(only(name, 0.3, 0.6), (x,), fast_mode=True)


def test_cutmix_labels_are_the_shares_of_the_pixels() -> None:
    x = torch.arange(6.0)[:, None, None, None].expand(6, 3, 8, 8)
    targets, mixed_some = torch.eye(6), False
    for number in range(20):
        mixed, labels = cutmix(x, targets, gen(number), 1.0, 1.0)
        shares = torch.stack([(mixed[:, 0] == c).float().mean((1, 2)) for c in range(6)], 1)
        torch.testing.assert_close(labels, shares)
        mixed_some |= bool((labels.max(1).values < 1).any())
    assert mixed_some
    assert cutmix(x, targets, gen(), 1.0, 0.0)[0] is x


def test_mixup_blends_images_and_labels_alike() -> None:
    targets = torch.eye(5, dtype=torch.float64)
    x = targets[:, :, None, None].expand(5, 5, 4, 4)
    mixed, labels = mixup(x, targets, gen(), 0.4)
    torch.testing.assert_close(mixed[:, :, 0, 0], labels)
    torch.testing.assert_close(labels.sum(1), torch.ones(5, dtype=torch.float64))


def test_beta_shares_have_beta_s_moments() -> None:
    shares = torch.tensor([float(mixup(torch.eye(2)[:, :, None, None], torch.eye(2), gen(i), 2.0)[1].max())
                           for i in range(400)])  # fmt: skip
    # max(share, 1 - share) or 1 where a sample met itself; Beta(2, 2) has E[max] = 11/16
    own = shares[shares < 1]
    assert abs(float(own.mean()) - 11 / 16) < 0.03


def test_an_augmenter_without_operations_changes_nothing() -> None:
    x, targets = images(), torch.eye(4)
    same, labels = Augmenter("none")(x, targets, gen())
    assert torch.equal(same, x) and labels is targets


def test_views_are_of_the_raw_pixels() -> None:
    x = images()
    assert [torch.equal(a, b) for a, b in zip(views(x, "hflip"), (x, x.flip(3)), strict=True)] == [True, True]
    assert views(x, "none")[0] is x
    here, *moved = views(x, "shift")
    assert torch.equal(here, x)
    for view, dy, dx in zip(moved, (1, -1, 0, 0), (0, 0, 1, -1), strict=True):  # pixels go down, up, right, left
        assert torch.equal(view[..., 1:-1, 1:-1], x.roll((dy, dx), (2, 3))[..., 1:-1, 1:-1])
    assert torch.equal(moved[0][..., 0, :], x[..., 0, :]) and torch.equal(moved[3][..., -1], x[..., -1])


def test_an_unknown_view_is_one_line() -> None:
    with pytest.raises(ConfigError, match="tenfold is not one of none, hflip, fivecrop, hflip5, shift"):
        views(images(), "tenfold")
    with pytest.raises(ConfigError, match="did you mean 'hflip5'"):
        views(images(), "flip5")


def plain(x: Tensor) -> Tensor:
    return x


def network(*ids: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(sum(ids))
        layers = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16 * 16, 5)
        return nn.Sequential(*layers).double().eval()


@pytest.mark.parametrize("size, side, place", [(28, 24, 2), (32, 28, 2), (64, 56, 4), (128, 112, 8)])
def test_five_crops_are_pil_s_bilinear_corners_and_centre(size: int, side: int, place: int) -> None:
    x = torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(x[0, 0].numpy())
    far = size - side
    for view, (top, left) in zip(
        views(x, "fivecrop"), ((0, 0), (0, far), (far, 0), (far, far), (place, place)), strict=True
    ):
        whole = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(view[0, 0].numpy(), np.asarray(whole), atol=1e-5)


def test_five_crops_of_a_constant_image_are_that_image() -> None:
    x = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)[:, None, None].expand(2, 3, 32, 32)
    found = views(x, "hflip5")
    assert len(found) == 10 and len(views(x, "fivecrop")) == 5
    for view in found:
        torch.testing.assert_close(view, x.contiguous(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["hflip", "hflip5"])
def test_mean_logits_of_mirrored_views_do_not_see_a_mirror(mode: str) -> None:
    x, net = images(), network(1)
    found = view_logits(net, x, mode, plain)
    torch.testing.assert_close(view_logits(net, x.flip(3), mode, plain), found, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(view_logits(net, x.flip(3), "none", plain), found)


@pytest.mark.parametrize("mode", VIEWS)
def test_views_keep_images_apart(mode: str) -> None:
    x, net, order = images(5), network(2), torch.tensor([3, 0, 4, 1, 2])
    found = view_logits(net, x, mode, plain)
    torch.testing.assert_close(view_logits(net, x[order], mode, plain), found[order], rtol=1e-12, atol=1e-12)
    alone = torch.cat([view_logits(net, x[i : i + 1], mode, plain) for i in range(5)])
    torch.testing.assert_close(alone, found, rtol=1e-12, atol=1e-12)
    changed = torch.cat([x[:1], images(5)[1:] + 1])
    torch.testing.assert_close(view_logits(net, changed, mode, plain)[:1], found[:1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", VIEWS)
def test_view_logits_are_the_mean_over_normalised_views(mode: str) -> None:
    x, net = images(), network(3)
    rows = np.stack([net((view - 0.4) / 0.2).detach().numpy() for view in views(x, mode)])
    found = view_logits(net, x, mode, lambda pixels: (pixels - 0.4) / 0.2)
    np.testing.assert_allclose(found, rows.mean(0), rtol=1e-12)
    assert not found.requires_grad
    single = net((x - 0.4) / 0.2)
    assert torch.allclose(found, single, atol=1e-6) == (mode == "none")


def test_an_unknown_operation_is_one_line_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'cutuot' is not one of .*did you mean 'cutout'"):
        draw_augmentation("crop/cutuot", 1, gen())


def test_a_batch_is_mixed_in_one_way_only() -> None:
    with pytest.raises(ValueError, match="set one to 0"):
        BatchAugmentConfig(cutmix=0.5, mixup=0.2)
    x, targets = images(), torch.eye(4, dtype=torch.float64)
    mixed, labels = Augmenter("none", mixup=1.0)(x, targets, gen())
    torch.testing.assert_close(mixed, torch.einsum("ij,jchw->ichw", labels, x))
