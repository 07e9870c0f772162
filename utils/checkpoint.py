"""Files that survive a crash: written beside their place and renamed, read without executing anything."""

import contextlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from config import ConfigError


def atomic_write(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step; a full disk leaves the old file. Raises ConfigError."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        if temporary:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}, {len(data)} bytes): free space or choose another "
            "save_dir, then run the same command again"
        ) from error


def save_tensors(path: Path, tensors: dict[str, Tensor], notes: dict[str, str] | None = None) -> None:
    """Write named tensors and text notes as one safetensors file, atomically."""
    atomic_write(path, save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, notes))


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file. Raises ConfigError for a damaged or foreign one."""
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path}: not a readable safetensors file ({error}): delete it and run the same command again"
        ) from error


def save_pth(path: Path, value: dict[str, Any]) -> None:
    """Write a dict of tensors and plain values as .pth, atomically."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    atomic_write(path, buffer.getvalue())


def load_pth(path: Path) -> Any:
    """Read a .pth file of tensors and plain values; nothing in it is executed. Raises ConfigError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except Exception as error:  # torch raises a different type for every way in which a file can be broken
        reason = str(error).split(". ")[0].split("\n")[0][:160] or type(error).__name__  # then advice to coders
        raise ConfigError(f"{path}: not a readable file of tensors ({reason}): delete or replace it") from error
