"""The whitening of whole images (ZCA, utils/normaliser.py), fitted once in float64 to training pixels and known by
their hash."""

import hashlib

import torch
from torch import Tensor

from config import ConfigError
from utils.normaliser import Zca
from utils.utils_image import ImageSet

EPS = 0.1
LIMIT = 12288  # numbers of an image, 3 x 64 x 64: three square matrices of 1.2 GB while fitting
PASS = 1024  # images at once


def zca_size(channels: int, size: int) -> int:
    """D, the numbers of an image. Raises ConfigError beyond LIMIT."""
    d = channels * size**2
    if d > LIMIT:
        raise ConfigError(
            f"zca: images of {channels} x {size} x {size} are {d} numbers, and matrices of {8e-9 * d**2:.1f} GB; the "
            f"limit is {LIMIT}: lower dataset.size, or leave zca out"
        )
    return d


def zca_sha256(images: ImageSet) -> str:
    """What a transform is known by: the hash of the pixels that it is fitted to, in order, and of eps."""
    digest = hashlib.sha256(f"{EPS} {len(images)} {images.channels} {images.size}".encode())
    for samples in torch.arange(len(images)).split(PASS):
        digest.update((images.pixels(samples) * 255).round().byte().cpu().numpy().tobytes())
    return digest.hexdigest()


def fit_zca(images: ImageSet, device: torch.device) -> Zca:
    """The transform of these images, computed in float64 and kept in float32. Raises ConfigError beyond LIMIT."""
    d, parts = zca_size(images.channels, images.size), torch.arange(len(images)).split(PASS)
    mean = sum((images.pixels(part).double().sum(0) for part in parts), torch.zeros(())) / len(images)
    scatter = torch.zeros(d, d, dtype=torch.float64, device=device)
    for part in parts:
        x = (images.pixels(part).double() - mean).flatten(1).to(device)
        scatter.addmm_(x.T, x)
    s, u = torch.linalg.eigh(scatter / (len(images) - 1))
    root = (s.clamp_min(0) + EPS).sqrt()
    mean, transform, inverse = (t.float().cpu() for t in (mean, (u / root) @ u.T, (u * root) @ u.T))
    return Zca(mean, transform, inverse, zca_sha256(images))


def whitened(images: ImageSet, zca: Zca, device: torch.device) -> Tensor:
    """All images [N, C, H, W], whitened, on `device`: once, not a product with [D, D] in every step."""
    zca = zca.to(device)
    return torch.cat([zca.apply(images.pixels(part).to(device)) for part in torch.arange(len(images)).split(PASS)])
