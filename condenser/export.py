"""A synthetic image set as a folder that anyone can read: set.safetensors, set.json that describes it, and load.py.

set.safetensors has images [N, C, H, W] float32, about 0 ... 1 (learned ones reach over); labels int64 [N], or
soft_labels [N, classes] where a row is not one-hot; features [K, N, *form], or [K, classes, *form] with scope: class;
and owner int64 [N], the class that each sample was learned for, where it is not the label. set.json has normaliser,
notes, shapes and bytes by part. zca.safetensors stands beside it where images are whitened. load.py (`LOADER`) needs
torch and safetensors only.
"""

import hashlib
from pathlib import Path

from pydantic import Field, ValidationError
from torch import Tensor, tensor

from condenser.synthetic_set import ZCA_FILE, Note, SyntheticSet, check_labelling, checked
from config import ConfigError, Section
from utils.checkpoint import atomic_write, load_tensors, save_tensors
from utils.normaliser import Normaliser, load_zca

LOADER = """\
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

def load(folder=Path(__file__).parent):  # images [N, C, H, W] normalised, labels [N] or [N, classes], features or None
    parts, notes = load_file(folder / "set.safetensors"), json.loads((folder / "set.json").read_bytes())
    mean, std = (torch.tensor(notes[name])[:, None, None] for name in ("mean", "std"))
    images = (parts["images"] - mean) / std
    if notes["zca"]:
        zca = load_file(folder / "zca.safetensors")
        images = ((parts["images"] - zca["mean"]).flatten(1) @ zca["transform"]).view_as(images)
    return images, parts.get("labels", parts.get("soft_labels")), parts.get("features")
"""


class Part(Section):
    """One tensor of the file."""

    shape: tuple[int, ...]
    dtype: str
    elements: int
    bytes: int


class Description(Section):
    """What set.json says."""

    classes: int = Field(ge=1)
    mean: tuple[float, ...]  # of the normaliser, a channel
    std: tuple[float, ...]
    zca: str = ""  # hash of the whitening that networks see instead, in zca.safetensors
    meta: dict[str, Note]  # form, pooling, layer_idx, lbd, use_feature, scope, net
    parts: dict[str, Part]
    bytes: int  # of all parts
    sha256: str  # of set.safetensors


def export(found: SyntheticSet, folder: Path) -> None:
    """Write a checked set of images. Raises ConfigError without a normaliser, or for what load.py could not read."""
    if found.data.ndim != 4 or found.targets.ndim != 2:
        raise ConfigError(f"export: samples of shape {tuple(found.data.shape[1:])}; it is of images with labels [N, C]")
    if found.normaliser is None:
        raise ConfigError("export: the set has no normaliser, without which its images cannot be used: make it anew")
    if found.meta.get("factor", 1) != 1:
        raise ConfigError(f"export: factor {found.meta['factor']}, but an exported image is one sample: set factor: 1")
    check_labelling(found, folder)
    labels, (count, classes) = found.targets.argmax(1), found.targets.shape
    hard = int((found.targets != 0).sum()) == count and bool((found.targets.amax(1) == 1).all())
    parts = {"images": found.data.float()} | ({"labels": labels} if hard else {"soft_labels": found.targets.float()})
    if found.features is not None:
        parts["features"] = found.features
    if not found.owner.equal(labels):
        parts["owner"] = found.owner
    save_tensors(folder / "set.safetensors", parts)
    zca = found.normaliser.zca
    if zca:
        zca.save(folder / ZCA_FILE)
    description = Description(
        classes=classes, mean=tuple(found.normaliser.mean.tolist()), std=tuple(found.normaliser.std.tolist()),
        zca=zca.sha256 if zca else "",
        meta=dict(found.meta), parts={name: part(value) for name, value in parts.items()},
        bytes=sum(value.nbytes for value in parts.values()), sha256=sha256(folder / "set.safetensors"),
    )  # fmt: skip
    atomic_write(folder / "load.py", LOADER.encode())
    # Last, as its digest vouches for the tensors.
    atomic_write(folder / "set.json", description.model_dump_json(indent=2).encode())


def part(value: Tensor) -> Part:
    """The description of a tensor."""
    kind = str(value.dtype).removeprefix("torch.")
    return Part(shape=tuple(value.shape), dtype=kind, elements=value.numel(), bytes=value.nbytes)


def sha256(path: Path) -> str:
    """Digest of a file, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_export(folder: Path) -> SyntheticSet:
    """The set that `export` wrote. Raises ConfigError where a file is missing, damaged or of another export."""
    path = folder / "set.json"
    try:
        known = Description.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: does not describe an export ({where}: {first['msg']}); export again") from error
    parts = load_tensors(folder / "set.safetensors")
    if sha256(folder / "set.safetensors") != known.sha256:
        raise ConfigError(f"{path}: describes another set.safetensors, or that is damaged; export again")
    targets = parts["labels"] if "labels" in parts else parts["soft_labels"]
    owner = parts.get("owner", targets if targets.ndim == 1 else targets.argmax(1))
    zca = load_zca(folder / ZCA_FILE, known.zca) if known.zca else None
    normaliser = Normaliser(tensor(known.mean), tensor(known.std), zca)
    found = SyntheticSet(parts["images"], targets, owner, None, known.meta, parts.get("features"), normaliser)
    found = checked(found, path, tuple(found.data.shape[1:]), known.classes)
    check_labelling(found, path)
    return found
