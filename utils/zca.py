"""Whitening of whole images (ZCA), fitted once in float64 to training pixels and known by their hash.

x' = (x - mean) U diag(1 / sqrt(s + eps)) U^T with U diag(s) U^T their covariance (kornia's definition, eps 0.1), on
pixels between 0 and 1 and in place of the channels' mean and deviation.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from config import ConfigError
from utils.checkpoint import save_tensors
from utils.image_readers import reading
from utils.utils_image import ImageSet

EPS = 0.1
LIMIT = 12288  # numbers of an image, 3 x 64 x 64: three square matrices of 1.2 GB while fitting
PASS = 1024  # images at once


@dataclass(frozen=True)
class Zca:
    """Mean [C, H, W], symmetric matrices [D, D] there and back, D = C H W, and the hash of what it was fitted to."""

    mean: Tensor
    transform: Tensor
    inverse: Tensor
    sha256: str

    def apply(self, pixels: Tensor) -> Tensor:
        """Pixels [B, C, H, W] in 0 ... 1, whitened."""
        return product(pixels - self.mean.to(pixels), self.transform)

    def invert(self, white: Tensor) -> Tensor:
        """Pixels [B, C, H, W] of whitened ones."""
        return product(white, self.inverse) + self.mean.to(white)

    def to(self, device: torch.device) -> "Zca":
        """The same on `device`."""
        return Zca(self.mean.to(device), self.transform.to(device), self.inverse.to(device), self.sha256)

    def save(self, path: Path) -> None:
        """Write as a safetensors file. Raises ConfigError."""
        tensors = {"mean": self.mean, "transform": self.transform, "inverse": self.inverse}
        save_tensors(path, tensors, {"sha256": self.sha256})


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """Images [B, C, H, W] as rows times a matrix [D, D], in the shape that they had."""
    kind = torch.float64 if x.is_cuda else x.dtype  # there, float32 may be TF32, which keeps three digits
    return (x.flatten(1).to(kind) @ matrix.to(x.device, kind)).view_as(x).to(x.dtype)


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


def same_zca(found: str, expected: str, path: Path) -> None:
    """Raises ConfigError unless what `path` holds was whitened by the expected transform ("" = by none)."""
    if found != expected:
        made, wanted = (f"ZCA {name[:8]}" if name else "no ZCA" for name in (found, expected))
        raise ConfigError(
            f"{path}: made with {made}, but this run has {wanted}: set --zca or --no_zca to fit, and the same data set "
            "with the same validation part"
        )


def load_zca(path: Path, sha256: str) -> Zca:
    """The transform of the data with that hash. Raises ConfigError for another one's, or a damaged file."""
    with reading(path, "a ZCA transform", SafetensorError), safe_open(path, "pt") as file:
        found = file.metadata()["sha256"]
        mean, transform, inverse = (file.get_tensor(name) for name in ("mean", "transform", "inverse"))
        if mean.ndim != 3 or not transform.shape == inverse.shape == (mean.numel(), mean.numel()):
            raise ValueError(f"mean {list(mean.shape)} with matrices {list(transform.shape)}, {list(inverse.shape)}")
    same_zca(found, sha256, path)
    return Zca(mean, transform, inverse, found)


def whitened(images: ImageSet, zca: Zca, device: torch.device) -> Tensor:
    """All images [N, C, H, W], whitened, on `device`: once, not a product with [D, D] in every step."""
    zca = zca.to(device)
    return torch.cat([zca.apply(images.pixels(part).to(device)) for part in torch.arange(len(images)).split(PASS)])
