"""How pixels between 0 and 1 become what networks see: by the channels' mean and deviation, or whitened (ZCA).

x' = (x - mean) U diag(1 / sqrt(s + eps)) U^T with U diag(s) U^T the pixels' covariance (kornia's definition, eps 0.1).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from config import ConfigError
from utils.checkpoint import save_tensors
from utils.foreign_files import reading


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


@dataclass(frozen=True)
class Normaliser:
    """Mean and deviation of every channel [C], or in their place a whitening."""

    mean: Tensor
    std: Tensor
    zca: Zca | None = None

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels [B, C, H, W] -> a network's input, of mean 0 and deviation 1 (whitened: at most 1)."""
        if self.zca:
            return self.zca.apply(pixels)
        return (pixels - self.mean.to(pixels)[:, None, None]) / self.std.to(pixels)[:, None, None]

    def inverse(self, x: Tensor) -> Tensor:
        """The pixels [B, C, H, W] of a network's input."""
        if self.zca:
            return self.zca.invert(x)
        return x * self.std.to(x)[:, None, None] + self.mean.to(x)[:, None, None]

    def to(self, device: torch.device) -> "Normaliser":
        """The same, its matrices on `device`."""
        return Normaliser(self.mean, self.std, self.zca.to(device)) if self.zca else self


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
