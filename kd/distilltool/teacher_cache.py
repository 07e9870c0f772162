"""Teacher results kept by sample index, so that a teacher sees each sample once."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from config import ConfigError
from kd.distilltool.adaptors import Results


class TeacherCache:
    """Rows of Results on the CPU by (teacher's name, sample's index); never by the order of batches."""

    def __init__(self, key: str | int) -> None:
        """`key`: where in a batch the indices [B] stand."""
        self.key = key
        self.rows: dict[tuple[str, int], dict[Any, Tensor]] = {}

    def split(self, batch: Any) -> tuple[Any, list[int]]:
        """A batch without its indices, and these. Raises ConfigError where it has none."""
        key, found = self.key, None
        if isinstance(batch, Mapping) and key in batch:
            found, batch = batch[key], {name: item for name, item in batch.items() if name != key}
        elif isinstance(batch, list | tuple) and isinstance(key, int) and -len(batch) <= key < len(batch):
            found = batch[key]
            batch = [item for place, item in enumerate(batch) if place != key % len(batch)]
        if not isinstance(found, Tensor) or found.dim() != 1 or found.is_floating_point():
            raise ConfigError(f"cache_teacher: {key!r} is not where a batch has its samples' indices, integers [B]")
        return batch, found.tolist()

    def results(self, name: str, index: list[int], device: torch.device, compute: Callable[[], Results]) -> Results:
        """The results for these samples, computed unless all of them are here."""
        if any((name, i) not in self.rows for i in index):
            fresh = compute()
            parts = {("logits", i): x for i, x in enumerate(fresh.logits)}
            parts |= {("logits_mask", i): x for i, x in enumerate(fresh.logits_mask)}
            parts |= {} if fresh.inputs_mask is None else {("inputs_mask", 0): fresh.inputs_mask}
            parts |= {("feature", place): x for place, x in fresh.features.items()}  # type: ignore[misc]
            for part, x in parts.items():
                if len(x) != len(index):
                    raise ConfigError(f"cache_teacher: {len(index)} indices, but {part[0]} is {list(x.shape)}")
            for row, i in enumerate(index):  # copies: a view would keep its whole batch
                self.rows[name, i] = {part: x[row].detach().to("cpu", copy=True) for part, x in parts.items()}
            return fresh
        rows = [self.rows[name, i] for i in index]
        for part, x in rows[0].items():
            if any(row[part].shape != x.shape for row in rows):
                raise ConfigError(f"cache_teacher: samples of different lengths in {part[0]}: pad all to one length")
        kept = {part: torch.stack([row[part] for row in rows]).to(device) for part in rows[0]}

        def several(name: str) -> tuple[Tensor, ...]:
            return tuple(x for (kind, _), x in kept.items() if kind == name)

        features = {place: x for (kind, place), x in kept.items() if kind == "feature"}
        return Results(several("logits"), several("logits_mask"), (), kept.get(("inputs_mask", 0)), features)
