"""Whitening: kornia's definition, there and back, one hash for one set of pixels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from config import ConfigError
from utils.normaliser import Normaliser, load_zca, same_zca
from utils.utils_image import ImageDatasetConfig, ImageSet, load_images
from utils.zca import EPS, fit_zca, whitened, zca_sha256

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load_images(ImageDatasetConfig(dataset="digits", nclass=10, size=8)).train


def noise(channels: int = 3, size: int = 8, count: int = 50) -> ImageSet:
    gen = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, size, size), generator=gen, dtype=torch.uint8)
    return ImageSet(images, torch.eye(2)[torch.arange(count) % 2], size, Normaliser(*torch.ones(2, channels)))


def pixels(images: ImageSet) -> Tensor:
    return images.pixels(torch.arange(len(images)))


@pytest.mark.parametrize("name", ["digits", "noise"])  # more images than pixels, and fewer
def test_transform_is_kornia_s_by_singular_values(name: str, digits: ImageSet) -> None:
    images = digits if name == "digits" else noise()
    zca, x = fit_zca(images, CPU), pixels(images).double().flatten(1).numpy()
    u, s, _ = np.linalg.svd(np.cov(x.T))
    expected = {-0.5: zca.transform, 0.5: zca.inverse}
    for power, found in expected.items():
        np.testing.assert_allclose(found.numpy(), u @ np.diag((s + EPS) ** power) @ u.T, atol=1e-6)
    rows = (x - x.mean(0)) @ u @ np.diag((s + EPS) ** -0.5) @ u.T
    np.testing.assert_allclose(zca.apply(pixels(images)).flatten(1).numpy(), rows, atol=1e-5)
    np.testing.assert_allclose(zca.mean.flatten().numpy(), x.mean(0), atol=1e-7)


def test_whitened_pixels_have_the_spectrum_s_over_s_plus_eps(digits: ImageSet) -> None:
    white = whitened(digits, fit_zca(digits, CPU), CPU).flatten(1).double()
    s = torch.linalg.eigvalsh(pixels(digits).flatten(1).double().T.cov())
    torch.testing.assert_close(torch.linalg.eigvalsh(white.T.cov()), s / (s + EPS), atol=1e-6, rtol=0)


def test_new_images_come_back_from_float32(digits: ImageSet) -> None:
    zca, x = fit_zca(digits, CPU), torch.rand(20, 1, 8, 8)
    assert (zca.invert(zca.apply(x)) - x).abs().max() < 1e-4
    assert zca.apply(x).shape == x.shape and not torch.allclose(zca.apply(x), x, atol=0.1)


def test_gradient_reaches_the_pixels_through_the_symmetric_matrix(digits: ImageSet) -> None:
    zca, x = fit_zca(digits, CPU), torch.rand(3, 1, 8, 8).requires_grad_()
    along = torch.rand(3, 1, 8, 8)
    (slope,) = torch.autograd.grad((zca.apply(x) * along).sum(), x)
    torch.testing.assert_close(slope.flatten(1), along.flatten(1) @ zca.transform.T)


def test_saved_transform_has_the_same_bits(digits: ImageSet, tmp_path: Path) -> None:
    zca = fit_zca(digits, CPU)
    zca.save(tmp_path / "zca.safetensors")
    found = load_zca(tmp_path / "zca.safetensors", zca_sha256(digits))
    assert all(torch.equal(getattr(found, name), getattr(zca, name)) for name in ("mean", "transform", "inverse"))
    assert found.sha256 == zca.sha256


def test_hash_knows_every_pixel_and_their_order(digits: ImageSet) -> None:
    images = digits.images
    assert isinstance(images, Tensor)
    one = images.clone()
    one[5, 0, 3, 3] ^= 1
    others = [replace(digits, images=one), replace(digits, images=images.flip(0)), digits.subset(torch.arange(1, 99))]
    hashes = [zca_sha256(found) for found in (digits, replace(digits, targets=digits.targets.flip(0)), *others)]
    assert hashes[0] == hashes[1] and len(set(hashes[1:])) == 4


def test_another_transform_is_refused(digits: ImageSet, tmp_path: Path) -> None:
    path, own = tmp_path / "zca.safetensors", zca_sha256(digits)
    fit_zca(digits, CPU).save(path)
    with pytest.raises(ConfigError, match=f"{path}: made with ZCA {own[:8]}, but this run has ZCA 12345678: set --zca"):
        load_zca(path, "1234567890")
    for found, expected, text in ((own, "", "this run has no ZCA"), ("", own, "made with no ZCA")):
        with pytest.raises(ConfigError, match=text):
            same_zca(found, expected, path)
    same_zca("", "", path)


def test_too_large_images_are_refused_before_any_work() -> None:
    with pytest.raises(ConfigError, match=r"3 x 65 x 65 are 12675 numbers, .* the limit is 12288: lower dataset.size"):
        fit_zca(noise(size=65, count=2), CPU)


@pytest.mark.parametrize("what", ["cut", "foreign", "absent"])
def test_damaged_file_is_named(digits: ImageSet, tmp_path: Path, what: str) -> None:
    path = tmp_path / "zca.safetensors"
    if what == "cut":
        fit_zca(digits, CPU).save(path)
        path.write_bytes(path.read_bytes()[:-1])
    elif what == "foreign":
        replace(fit_zca(digits, CPU), inverse=torch.eye(3)).save(path)
    with pytest.raises(ConfigError, match=f"{path}: not a ZCA transform"):
        load_zca(path, zca_sha256(digits))
