"""Data for distillation: CUB-200-2011, and views set by (seed, epoch, sample id) alone."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from config import ConfigError
from utils.image_readers import read_images
from utils.streams import generator
from utils.utils_image import ImageCorpus, ImageDatasetConfig, load_images
from utils.views import check_crop, crop_box, crop_flip, resized_crop_flip, resized_views, view_numbers


def load(name: str, folder: Path | None, nclass: int, size: int, **more: object) -> ImageCorpus:
    values = {"dataset": name, "nclass": nclass, "size": size, "data_dir": folder, **more}
    return load_images(ImageDatasetConfig.model_validate(values))


@pytest.fixture(scope="module")
def digits() -> ImageCorpus:
    return load("digits", None, 10, 32)


@pytest.fixture
def cub(shared_data: Path) -> Path:
    folder = shared_data / "cub200" / "CUB_200_2011"
    if not folder.is_dir():
        pytest.skip(f"CUB-200-2011 is absent: {folder}")
    return folder


def pixels(count: int, side: int = 32, channels: int = 3) -> Tensor:
    gen = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=gen)


def slow_view(image: Tensor, numbers: list[float], size: int, pad: int) -> Tensor:
    padded = np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)))
    row, column = (int(u * (padded.shape[1] - size + 1)) for u in numbers[:2])
    cut = padded[:, row : row + size, column : column + size]
    return torch.from_numpy((cut[:, :, ::-1] if numbers[2] < 0.5 else cut).copy())


@pytest.mark.parametrize("side, size, pad", [(32, 32, 4), (40, 28, 0), (16, 20, 3)])
def test_views_are_those_of_a_loop_over_samples(side: int, size: int, pad: int) -> None:
    images, numbers = pixels(50, side), view_numbers(1, 2, 50)
    found = crop_flip(images, numbers, size, pad)
    expected = [slow_view(x, u, size, pad) for x, u in zip(images, numbers.tolist(), strict=True)]
    assert found.dtype == torch.uint8 and torch.equal(found, torch.stack(expected))


def test_views_of_a_batch_cost_a_fraction_of_a_transform_a_sample() -> None:
    from torchvision.transforms import v2

    images, numbers = pixels(64), view_numbers(0, 0, 64)
    each = v2.Compose([v2.RandomCrop(32, 4), v2.RandomHorizontalFlip()])

    def seconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(7):
            start = time.thread_time()
            work()
            times.append(time.thread_time() - start)
        return min(times)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours, theirs = seconds(lambda: crop_flip(images, numbers, 32, 4)), seconds(lambda: [each(x) for x in images])
    torch.set_num_threads(threads)
    assert ours < theirs / 3


def test_numbers_choose_every_place_alike_and_a_mirror_for_one_in_two() -> None:
    count = 81 * 2 * 200
    places = torch.arange(48 * 48).view(1, 1, 48, 48).expand(count, 1, 48, 48)[..., :10, :10]
    corner = crop_flip(places.contiguous(), view_numbers(0, 0, count), 2)[:, 0]
    mirrored = corner[:, 0, 0] > corner[:, 0, 1]
    counts = (2 * corner.amin((1, 2)) + mirrored).bincount()
    counts = counts[counts > 0].double()
    assert len(counts) == 162  # 9 rows, 9 columns, 2 sides
    assert float(((counts - 200) ** 2 / 200).sum()) < 161 + 5 * math.sqrt(2 * 161)  # chi-square of 161 degrees


def test_numbers_next_to_the_limits_stay_inside() -> None:
    images, most = pixels(2), 1 - 2**-24  # most * 9 is 9 in float32
    found = crop_flip(images, torch.tensor([[0.0, 0.0, 0.9], [most, most, 0.9]]), 32, 4)
    assert torch.equal(found[0, :, 4:, 4:], images[0, :, :28, :28]) and not found[0, :, :4].any()
    assert torch.equal(found[1, :, :28, :28], images[1, :, 4:, 4:]) and not found[1, :, 28:].any()


@pytest.mark.parametrize("count", [1, 2, 5, 7, 15, 16, 17, 1000])
def test_a_sample_s_numbers_do_not_depend_on_the_number_of_samples(count: int) -> None:
    assert torch.equal(view_numbers(3, 4, count), view_numbers(3, 4, 50_000)[:count])


def test_a_view_depends_on_seed_epoch_and_sample_only(digits: ImageCorpus) -> None:
    def views(ids: Tensor, seed: int = 0, epoch: int = 3, count: int = 1000) -> Tensor:
        return crop_flip(digits.train.levels(ids), view_numbers(seed, epoch, count)[ids], 32, 4)

    ids = torch.arange(64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    whole = views(ids)
    assert torch.equal(views(order), whole[order]) and torch.equal(views(ids, count=64), whole)
    assert torch.equal(torch.cat([views(part) for part in ids.split(7)]), whole)
    for other in (views(ids, epoch=4), views(ids, seed=1)):
        assert (other != whole).flatten(1).any(1).float().mean() > 0.9


def test_a_crop_larger_than_its_image_is_one_line() -> None:
    check_crop(32, 40, 4)
    with pytest.raises(ConfigError, match="crop: 41 pixels of a side, but images of 32 padded by 4 have 40"):
        check_crop(32, 41, 4)


def test_resized_crops_have_torchvision_s_distribution() -> None:
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    for height, width in ((60, 90), (200, 20), (20, 200)):
        ours = np.array([crop_box(height, width, generator(0, "test", i)) for i in range(1500)], float)
        image = torch.zeros(3, height, width)
        theirs = np.array(
            [RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(1500)], float
        )
        assert (ours[:, :2].min(0) >= 0).all() and ((ours[:, :2] + ours[:, 2:]).max(0) <= (height, width)).all()
        error = np.sqrt((ours.var(0) + theirs.var(0)) / 1500) + 1e-9
        assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4.5 * error).all()
        assert np.allclose(ours.std(0), theirs.std(0), rtol=0.12, atol=0.05)


def test_a_resized_crop_is_torchvision_s_resize_of_its_part() -> None:
    from torchvision.transforms.v2.functional import resized_crop

    image, mirrored = pixels(1, 50)[0][:, :40], 0
    for i in range(20):
        top, left, height, width = crop_box(40, 50, generator(0, "test", i))
        expected = resized_crop(image.float(), top, left, height, width, [24, 24], antialias=True)
        found = resized_crop_flip(image, 24, generator(0, "test", i)).float()
        errors = [float((found - x).abs().max()) for x in (expected, expected.flip(2))]
        assert min(errors) < 0.51  # rounded to whole levels
        mirrored += errors[1] < errors[0]
    assert 3 < mirrored < 17


def test_views_of_files_depend_on_seed_epoch_and_sample_only(cub: Path) -> None:
    data = load("cub200", cub, 25, 64, load_memory=False).train
    ids = torch.tensor([600, 3, 41])
    views = resized_views(data, 0, 1, 32)
    found = views(ids)
    assert found.shape == (3, 3, 32, 32) and found.dtype == torch.uint8
    assert torch.equal(views(ids[[2, 0]]), found[[2, 0]])
    assert not torch.equal(resized_views(data, 0, 2, 32)(ids), found)


def test_resized_crops_need_files(digits: ImageCorpus) -> None:
    with pytest.raises(ConfigError, match="load_memory: resized crops are cut from files"):
        resized_views(digits.train, 0, 0, 32)


def test_levels_are_the_bytes_of_the_pixels(digits: ImageCorpus, cub: Path) -> None:
    ids = torch.tensor([5, 2])
    files = load("cub200", cub, 25, 64, load_memory=False)
    for part in (digits.test, files.test):
        assert part.levels(ids).dtype == torch.uint8
        assert torch.equal(part.levels(ids).float() / 255, part.pixels(ids))


def test_cub_has_its_official_split_in_the_order_of_its_classes(cub: Path) -> None:
    from torchvision.datasets import ImageFolder

    found, folders = read_images("cub200", cub.parent), ImageFolder(str(cub / "images"))
    assert list(found.classes) == folders.classes and len(found.classes) == 25
    assert (len(found.train.labels), len(found.test.labels), found.val) == (750, 652, None)
    expected = {Path(path): label for path, label in folders.samples}
    for part in (found.train, found.test):
        assert isinstance(part.images, tuple)
        assert [expected.pop(path) for path in part.images] == part.labels.tolist()
    assert not expected
    assert found.train.labels.bincount().tolist() == [30] * 25


def own_cub(folder: Path, classes: dict[int, str], count: int = 4) -> Path:
    rows = [(c, f"{name}/{i}.jpg", int(i % 2 == 0)) for c, name in classes.items() for i in range(count)]
    for name in classes.values():
        (folder / "images" / name).mkdir(parents=True)
    for _, path, _ in rows:
        Image.new("RGB", (20, 16), (9, 9, 9)).save(folder / "images" / path)
    for i, name in enumerate(("image_class_labels", "images", "train_test_split")):
        text = "".join(f"{n} {row[i]}\n" for n, row in enumerate(rows, 1))
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_classes_of_cub_whose_folders_are_absent_are_left_out(tmp_path: Path) -> None:
    own_cub(tmp_path, {2: "002.b", 7: "007.c", 11: "011.d"})
    for path in (tmp_path / "images" / "007.c").iterdir():
        path.unlink()
    found = read_images("cub200", tmp_path)
    assert found.classes == ("002.b", "011.d") and found.train.labels.tolist() == [0, 0, 1, 1]


def test_an_absent_image_and_a_damaged_list_of_cub_are_one_line(tmp_path: Path) -> None:
    own_cub(tmp_path, {1: "001.a", 2: "002.b"})
    labels = (tmp_path / "image_class_labels.txt").read_text()
    for damaged in (labels[: len(labels) // 2], "1 a\n", "\0\n"):
        (tmp_path / "image_class_labels.txt").write_text(damaged)
        with pytest.raises(ConfigError, match="not CUB-200-2011") as caught:
            read_images("cub200", tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "image_class_labels.txt").write_text(labels)
    (tmp_path / "images" / "001.a" / "2.jpg").unlink()
    with pytest.raises(ConfigError, match="001.a/2.jpg: absent, but images.txt lists it"):
        read_images("cub200", tmp_path)
    (tmp_path / "train_test_split.txt").unlink()
    with pytest.raises(ConfigError, match="holds no train_test_split.txt"):
        read_images("cub200", tmp_path)
