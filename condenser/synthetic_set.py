"""The one artefact of condensation: learned samples, their labels, and the class that each was learned for."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import TensorDataset

from config import ConfigError
from utils.checkpoint import load_pth, save_pth

Note = str | int | float


@dataclass(frozen=True)
class SyntheticSet:
    """N learned samples. Text: data [N, S, D] word embeddings with attention_mask [N, S]; images: no mask."""

    data: Tensor
    targets: Tensor  # [N, C] multi-hot, one-hot or soft
    owner: Tensor  # [N] class that the sample was learned for (a multi-hot row has several labels, one owner)
    attention_mask: Tensor | None = None
    meta: dict[str, Note] = field(default_factory=dict)  # how to read it: decode_type, factor, word table, dataset

    def save(self, path: Path) -> None:
        """Write as a .pth of plain tensors."""
        value = {"data": self.data, "targets": self.targets, "owner": self.owner, "meta": self.meta}
        if self.attention_mask is not None:
            value["attention_mask"] = self.attention_mask
        save_pth(path, value)

    @property
    def nbytes(self) -> int:
        """Bytes of samples and masks as stored (labels counted apart)."""
        mask = 0 if self.attention_mask is None else -(-self.attention_mask.numel() // 8)
        return self.data.numel() * self.data.element_size() + mask

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
    mask, meta = value.get("attention_mask"), value.get("meta", {})
    tensors = [value["data"], value["targets"], value["owner"], *([] if mask is None else [mask])]
    if not all(isinstance(v, Tensor) and v.ndim for v in tensors) or not isinstance(meta, dict):
        raise ConfigError(f"{path}: holds fields of another kind than a synthetic set's")
    if mask is not None and mask.shape != value["data"].shape[:2]:
        raise ConfigError(f"{path}: mask of shape {tuple(mask.shape)} for rows of {tuple(value['data'].shape)}")
    if not len(value["data"]) == len(value["targets"]) == len(value["owner"]):
        raise ConfigError(f"{path}: {len(value['data'])} samples but {len(value['targets'])} labels")
    return SyntheticSet(value["data"], value["targets"], value["owner"], mask, meta)


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
    if not torch.isfinite(found.data).all():
        raise ConfigError(f"{path}: holds values that are not finite")
    if word_table and found.meta.get("word_table", word_table) != word_table:
        raise ConfigError(f"{path}: learned for another word table: use the encoder it was made with")
    return found.with_targets(targets.float())
