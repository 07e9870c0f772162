"""Files that survive a crash: written beside their place and renamed, read without executing anything."""

import contextlib
import io
import json
import logging
import os
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from config import ConfigError

VIEWS = 16  # times that a .pth file's bytes may be seen: tensors share them, as tied weights do
log = logging.getLogger("distill_lab")


def atomic_write(path: Path, data: bytes, kept: Path | None = None) -> None:
    """Replace `path` by `data` in one step, the old file kept as `kept`; a full disk leaves all. Raises ConfigError."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        if kept and path.exists():
            kept.unlink(missing_ok=True)
            try:
                kept.hardlink_to(path)  # so that `path` is there at any time
            except OSError:  # a file system without links
                path.replace(kept)
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
    """Read a safetensors file. Raises ConfigError for none, a damaged or foreign one."""
    if not path.exists():
        raise ConfigError(f"{path}: no such file")
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError, LookupError, ValueError, RuntimeError) as error:  # also a type unknown to torch
        raise ConfigError(
            f"{path}: not a readable safetensors file ({error}): delete it and run the same command again"
        ) from error


def pth_bytes(value: dict[str, Any]) -> bytes:
    """A dict of tensors and plain values as a .pth file's content."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def save_pth(path: Path, value: dict[str, Any]) -> None:
    """Write a dict of tensors and plain values as .pth, atomically."""
    atomic_write(path, pth_bytes(value))


def load_pth(path: Path) -> Any:
    """Read a .pth file of tensors and plain values; nothing in it is executed. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\3\4"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the protocol, to coders
            # Mapped, a storage ends where the file does, whatever its header says.
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        return unmapped(value, [VIEWS * path.stat().st_size], {})
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except Exception as error:  # torch raises a different type for every way in which a file can be broken
        reason = str(error).split(". ")[0].split("\n")[0][:160] or type(error).__name__  # then advice to coders
        raise ConfigError(f"{path}: not a readable file of tensors ({reason}): delete or replace it") from error


def unmapped(value: Any, left: list[int], known: dict[int, Any]) -> Any:
    """The value with tensors of its own, of `left[0]` bytes at most; each part once. Raises ValueError for more."""
    if id(value) in known:
        return known[id(value)]
    known[id(value)] = value
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise ValueError(f"a tensor of layout {value.layout} on {value.device}")
        left[0] -= value.nbytes
        if left[0] < 0:
            raise ValueError("its tensors are larger than the file")
        known[id(value)] = value.detach().clone()
    elif isinstance(value, dict):
        value.update({key: unmapped(inner, left, known) for key, inner in value.items()})
    elif isinstance(value, list):
        value[:] = [unmapped(inner, left, known) for inner in value]
    elif type(value) is tuple:
        known[id(value)] = tuple(unmapped(inner, left, known) for inner in value)
    return known[id(value)]


def previous(path: Path) -> Path:
    """Where `keep_state` keeps the state before the one at `path`."""
    return path.with_suffix(f".previous{path.suffix}")


def load_checked(path: Path) -> Any:
    """As `load_pth`, every byte checked against the sums in the file."""
    value = load_pth(path)
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (zipfile.BadZipFile, RuntimeError, OSError) as error:
        raise ConfigError(f"{path}: not a saved state ({error}): delete it") from error
    if wrong:
        raise ConfigError(f"{path}: damaged (wrong sum of {wrong}): delete it")
    return value


def keep_state(path: Path, value: dict[str, Any]) -> None:
    """Write what a run goes on from, as `save_pth` does; the one before it is kept."""
    atomic_write(path, pth_bytes(value), previous(path))


def last_state(path: Path) -> Any:
    """The last state of `keep_state`, or None; a damaged or lost one is replaced by the one before, as the log says.

    Raises ConfigError where no file of the two can be read.
    """
    older = previous(path)
    if not older.exists():
        return load_checked(path) if path.exists() else None
    try:
        return load_checked(path)
    except ConfigError:
        try:
            state = load_checked(older)
        except ConfigError as error:
            raise ConfigError(
                f"{path}: not readable, nor is the state before it, {older.name}: delete both to start again"
            ) from error
        log.warning(f"{path}: damaged or lost; the state before it is used, {older.name}")
        older.replace(path)
        return state


def drop_state(path: Path) -> None:
    """Remove what `keep_state` wrote."""
    for file in (path, previous(path)):
        file.unlink(missing_ok=True)


def load_json(path: Path) -> Any:
    """A JSON file's value. Raises ConfigError for one that is absent or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable JSON ({error}): delete it, or start with --overwrite") from error
