"""Synthetic images: mosaics and their decoding, where they start, how a student reads them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from condenser.synthetic_image import (
    decode,
    image_grid,
    initial_class,
    mosaic,
    samples_per_image,
    student_view,
)
from condenser.synthetic_set import Note, SyntheticSet
from config import ConfigError
from utils.normaliser import Normaliser
from utils.streams import generator
from utils.utils_image import ImageSet


def flat(values: Tensor, size: int = 8) -> Tensor:
    return values[:, None, None, None].expand(-1, 3, size, size)


def real(count: int = 20, size: int = 8) -> ImageSet:
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, size, size) * 10
    return ImageSet(pixels, torch.eye(2).repeat(count // 2, 1), size, Normaliser(torch.zeros(3), torch.ones(3)))


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_decoding_gives_a_mosaic_s_images_back_in_order(factor: int) -> None:
    x = flat(torch.arange(2.0 * factor**2))
    torch.testing.assert_close(decode(mosaic(x, factor), factor, "single"), x)


def test_a_tile_is_the_bilinear_enlargement_of_its_part() -> None:
    data = torch.rand(2, 3, 8, 8)
    expected = torch.nn.functional.interpolate(data[1:, :, :4, 4:], (8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(decode(data, 2, "single")[5], expected[0])


def test_multi_decoding_adds_the_whole_image_to_its_tiles() -> None:
    data = torch.rand(2, 3, 8, 8)
    samples = decode(data, 2, "multi")
    assert len(samples) == 2 * samples_per_image(2, "multi") == 10
    torch.testing.assert_close(samples[[0, 5]], data)
    torch.testing.assert_close(samples[6:], decode(data, 2, "single")[4:])


def test_decoding_has_a_gradient_everywhere() -> None:
    data = torch.rand(1, 1, 8, 8, requires_grad=True)
    decode(data, 2, "multi").sum().backward()
    assert data.grad is not None and bool((data.grad > 0).all())


def test_random_start_is_made_of_the_class_s_own_images() -> None:
    images = real()
    members = images.members()[1]
    data = initial_class("random", images, members, 4, 2, generator(0, "init"))
    values = data[:, 0, 0, 0] * 255 / 10
    assert set(values.round().long().tolist()) <= set(members.tolist()) and len(values.unique()) == 4


def test_mixed_start_holds_factor_squared_images_and_a_small_class_begins_again() -> None:
    images = real(6)
    members = images.members()[0]  # 3 images for 2 x 4 places
    data = initial_class("mix", images, members, 2, 2, generator(0, "init"))
    tiles = decode(data, 2, "single")[:, 0, 0, 0] * 255 / 10
    assert sorted(tiles.round().long().unique().tolist()) == members.tolist()


def test_noise_is_pixels() -> None:
    data = initial_class("noise", real(), torch.arange(3), 5, 2, generator(0, "init"))
    assert data.shape == (5, 3, 8, 8) and float(data.min()) >= 0 and float(data.max()) <= 1


def test_a_student_reads_decoded_normalised_samples_with_their_image_s_label() -> None:
    normaliser = Normaliser(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.25, 0.25, 0.25]))
    found = SyntheticSet(flat(torch.tensor([0.5, 1.0])), torch.eye(2), torch.arange(2), None, {"factor": 2})
    view = student_view(found, normaliser)
    x, targets = view.batch(torch.tensor([0, 7]), torch.device("cpu"))
    torch.testing.assert_close(x, flat(torch.tensor([0.0, 2.0])))
    assert len(view) == 8 and torch.equal(targets, torch.eye(2))


def test_a_set_without_notes_is_read_as_it_is() -> None:
    found = SyntheticSet(torch.rand(2, 3, 8, 8), torch.eye(2), torch.arange(2))
    assert torch.equal(student_view(found, Normaliser(torch.zeros(3), torch.ones(3))).data, found.data)


@pytest.mark.parametrize(
    ("meta", "part"),
    [
        ({"factor": 3}, "factor: 3 must divide dataset.size: 8"),
        ({"factor": 4, "decode_type": "multi"}, "factor: 3 must divide .* every number up to 4"),
        ({"factor": "two"}, "factor is 'two'"),
        ({"factor": 0}, "at least 1"),
        ({"factor": 2, "decode_type": "bound"}, "'bound', not one of single, multi"),
    ],
)
def test_notes_that_cannot_be_followed_are_one_line(meta: dict[str, Note], part: str) -> None:
    found = SyntheticSet(torch.rand(2, 3, 8, 8), torch.eye(2), torch.arange(2), None, meta)
    with pytest.raises(ConfigError, match=part):
        student_view(found, Normaliser(torch.zeros(3), torch.ones(3)))


def test_the_picture_has_a_row_a_class(tmp_path: Path) -> None:
    from PIL import Image

    found = SyntheticSet(flat(torch.tensor([0.0, 0.0, 1.0])), torch.eye(3), torch.tensor([0, 0, 1]), None, {})
    image_grid(found, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (2 * (64 + 2) + 2, 2 * (64 + 2) + 2)
        assert picture.getpixel((30, 30)) == (0, 0, 0) and picture.getpixel((30, 100)) == (255, 255, 255)
