"""The one artefact of condensation: learned samples, their labels, and the class that each was learned for."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import TensorDataset

from config import ConfigError
from utils.checkpoint import load_pth, save_pth
from utils.normaliser import Normaliser, load_zca

Note = str | int | float
ZCA_FILE = "zca.safetensors"  # beside whitened sets: the transform, once for all that stand in a folder


@dataclass(frozen=True)
class SyntheticSet:
    """N learned samples. Text: data [N, S, D] word embeddings with attention_mask [N, S]; images: no mask.

    A feature set's notes are form, pooling, layer_idx (0 = last), lbd, use_feature, scope and net (in one line). Data
    of images are pixels, about 0 ... 1, also where the normaliser whitens them.
    """

    data: Tensor
    targets: Tensor  # [N, C] multi-hot, one-hot or soft
    owner: Tensor  # [N] class that the sample was learned for (a multi-hot row has several labels, one owner)
    attention_mask: Tensor | None = None
    meta: dict[str, Note] = field(default_factory=dict)  # how to read it: decode_type, factor, word table, dataset
    features: Tensor | None = None  # [K, N, *form]: K feature labels a sample; scope: class has [K, classes, *form]
    normaliser: Normaliser | None = None  # that the labels and the students are meant for

    def save(self, path: Path) -> None:
        """Write as a .pth of plain tensors, a whitening beside it."""
        value = {"data": self.data, "targets": self.targets, "owner": self.owner, "meta": self.meta}
        optional = {"attention_mask": self.attention_mask, "features": self.features}
        if self.normaliser is not None:
            optional |= {"mean": self.normaliser.mean, "std": self.normaliser.std}
            if self.normaliser.zca:
                value["zca"] = self.normaliser.zca.sha256
                if not (path.parent / ZCA_FILE).exists():
                    self.normaliser.zca.save(path.parent / ZCA_FILE)
        save_pth(path, value | {name: tensor for name, tensor in optional.items() if tensor is not None})

    @property
    def nbytes(self) -> int:
        """Bytes of samples, masks and feature labels as stored (labels counted apart)."""
        mask = 0 if self.attention_mask is None else -(-self.attention_mask.numel() // 8)
        return self.data.nbytes + mask + (0 if self.features is None else self.features.nbytes)

    def with_targets(self, targets: Tensor) -> "SyntheticSet":
        """The same samples with other labels [N, C]."""
        return replace(self, targets=targets)


def load_synthetic(path: Path) -> SyntheticSet:
    """Read an artefact, or a public `[data, targets]` file. Raises ConfigError for anything else."""
    value = load_pth(path)
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, Tensor) for v in value):
        data, targets = value
        value = {
            "data": data,
            "targets": targets,
            "owner": targets.argmax(1) if targets.ndim == 2 else targets.long(),
            "meta": {},
        }
    if not isinstance(value, dict) or not {"data", "targets", "owner"} <= value.keys():
        raise ConfigError(f"{path}: holds neither a synthetic set nor a [data, targets] list")
    meta = value.get("meta", {})
    mask, features, mean, std = (value.get(name) for name in ("attention_mask", "features", "mean", "std"))
    optional = [v for v in (mask, features, mean, std) if v is not None]
    tensors = [value["data"], value["targets"], value["owner"], *optional]
    plain = isinstance(meta, dict) and all(isinstance(k, str) and isinstance(v, Note) for k, v in meta.items())
    if not all(isinstance(v, Tensor) and v.ndim for v in tensors) or not plain or (mean is None) != (std is None):
        raise ConfigError(f"{path}: holds fields of another kind than a synthetic set's")
    if mask is not None and mask.shape != value["data"].shape[:2]:
        raise ConfigError(f"{path}: mask of shape {tuple(mask.shape)} for rows of {tuple(value['data'].shape)}")
    if not len(value["data"]) == len(value["targets"]) == len(value["owner"]):
        raise ConfigError(f"{path}: {len(value['data'])} samples but {len(value['targets'])} labels")
    white = value.get("zca", "")
    zca = load_zca(path.parent / ZCA_FILE, white) if isinstance(white, str) and white else None
    normaliser = None if mean is None or std is None else Normaliser(mean, std, zca)
    found = SyntheticSet(value["data"], value["targets"], value["owner"], mask, meta, features, normaliser)
    check_labelling(found, path)
    return found


def check_labelling(found: SyntheticSet, path: Path) -> None:
    """Raises ConfigError unless features are floats with as many rows as samples (scope: class, as classes), and the
    normaliser has a mean and a positive deviation for every channel."""
    if found.normaliser is not None:
        mean, std, zca = found.normaliser.mean, found.normaliser.std, found.normaliser.zca
        if not mean.shape == std.shape == found.data.shape[1:2]:
            raise ConfigError(f"{path}: normaliser of {len(mean)} channels for data of {tuple(found.data.shape)}")
        if not (mean.isfinite() & (std > 0) & std.isfinite()).all():
            raise ConfigError(f"{path}: normaliser with mean {mean.tolist()} and deviation {std.tolist()}")
        if zca and zca.mean.shape != found.data.shape[1:]:
            raise ConfigError(f"{path}: whitening of {tuple(zca.mean.shape)} for data of {tuple(found.data.shape)}")
    if found.features is None:
        return
    scope = found.meta.get("scope", "sample")
    if scope not in ("sample", "class"):
        raise ConfigError(f"{path}: features of scope {scope!r}, which is neither sample nor class")
    if not found.features.is_floating_point() or found.features.ndim < 3 or not len(found.features):
        kind, shape = str(found.features.dtype).removeprefix("torch."), tuple(found.features.shape)
        raise ConfigError(f"{path}: features of shape {shape} and type {kind}; they are [labels, rows, ...] of floats")
    classes = len(found.owner.unique())  # of all those that the samples were learned for
    rows, owners = (classes, "classes") if scope == "class" else (len(found.data), "samples")
    if found.features.shape[1] != rows:
        raise ConfigError(f"{path}: features of {found.features.shape[1]} rows for {rows} {owners} (scope: {scope})")


def load_dataset(path: Path) -> TensorDataset:
    """The artefact as a torch Dataset of (data, mask, targets), or (data, targets) without a mask; rows as stored."""
    found = load_synthetic(path)
    masks = () if found.attention_mask is None else (found.attention_mask,)
    return TensorDataset(found.data, *masks, found.targets)


def checked(
    found: SyntheticSet, path: Path, shape: tuple[int, ...], nclass: int, word_table: str | None = None
) -> SyntheticSet:
    """The set with targets [N, nclass], class ids made one-hot. Raises ConfigError unless samples have `shape`, targets
    fit and, for text, the word table is the one that it was learned for."""
    if tuple(found.data.shape[1:]) != shape:
        raise ConfigError(
            f"{path}: samples of shape {tuple(found.data.shape[1:])}, this config has {shape}: check the length or size"
        )
    targets = found.targets
    if targets.ndim == 1:
        wrong = targets[(targets < 0) | (targets >= nclass) | (targets != targets.long())]
        if len(wrong):
            raise ConfigError(f"{path}: class {wrong[0].item()}, this config has classes 0 to {nclass - 1}")
        targets = one_hot(targets.long(), nclass)
    if targets.shape[1:] != (nclass,):
        raise ConfigError(f"{path}: {targets.shape[-1]} classes, this config has {nclass}")
    if not all(torch.isfinite(v).all() for v in (found.data, found.features) if v is not None):
        raise ConfigError(f"{path}: holds values that are not finite")
    if word_table and found.meta.get("word_table", word_table) != word_table:
        raise ConfigError(f"{path}: learned for another word table: use the encoder it was made with")
    return found.with_targets(targets.float())
