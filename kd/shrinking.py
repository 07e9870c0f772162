"""A training set that shrinks to what its student still has to learn (KCD, with any loss)."""

from typing import Any

import torch
from torch import Tensor

from config import ConfigError
from kd.methods.condensation import (
    Kcd,
    Record,
    Summary,
    empty_record,
    entropy_rows,
    mixed_images,
    next_count,
    note,
    summarise,
    values,
)
from utils.ddp import World
from utils.utils_image import ImageSet


class Shrinking:
    """The samples that a run still trains on (KCD), and what its student made of all so far."""

    def __init__(self, s: Kcd, share_of_epochs: float, data: ImageSet, world: World) -> None:
        """`share_of_epochs`: of the schedule that a short run has. Raises ConfigError for images in files."""
        if not isinstance(data.images, Tensor):
            raise ConfigError("KCD: it mixes images in memory; set DATASET.IN_MEMORY: true and AUGMENT: crop")
        self.s, self.world, self.original = s, world, data
        self.period = max(1, round(s.PERIOD * share_of_epochs))
        self.record, self.epoch = empty_record(len(data)), empty_record(len(data), world.device)
        self.summary: Summary | None = None
        self.set_summary(None)

    def count(self, epoch: int) -> int:
        """Samples of epoch 0, 1, ...: a stage less after every period."""
        kept = len(self.original)
        for _ in range(min(epoch // self.period, self.s.STEPS)):
            kept = next_count(kept, len(self.original), self.s.SHARE, self.s.STEPS)
        return kept

    def set_summary(self, summary: Summary | None) -> None:
        """Train on a summary from now on; None: on all samples as they are."""
        self.summary, data = summary, self.original
        self.members = torch.arange(len(data)) if summary is None else summary.kept.sort().values
        levels = data.images
        if summary is not None and isinstance(levels, Tensor):
            levels = levels.clone()
            mix = mixed_images(levels[summary.mixed], levels[summary.left_out], summary.shares)
            levels[summary.mixed] = mix
        self.images = ImageSet(levels, data.targets, data.size, data.normaliser).to(self.world.device)

    @torch.no_grad()
    def note(self, ids: Tensor, logits: Tensor) -> None:
        """Add what a step's logits [B, K] of samples [B] are worth."""
        note(self.epoch, ids, entropy_rows(logits))

    def end_epoch(self, epochs: int) -> None:
        """Take over the epoch's record after so many epochs; at the end of a period, choose the next samples."""
        self.record = self.total()
        for part in self.epoch:
            part.zero_()
        if self.count(epochs) < self.count(epochs - 1):
            worth = values(self.record, self.period, self.s.COST)
            self.set_summary(summarise(worth, self.count(epochs - 1), self.count(epochs), self.s.MIX))

    def total(self) -> Record:
        """The record of all ranks with that of this epoch."""
        return Record(
            *(old + self.world.sum(new.to("cpu", copy=True)) for old, new in zip(self.record, self.epoch, strict=True))
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps. All ranks together."""
        return {
            "record": [part.clone() for part in self.record],
            "epoch": [self.world.sum(part.to("cpu", copy=True)) for part in self.epoch],
            "summary": None if self.summary is None else list(self.summary),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint kept; the epoch's record goes to rank 0, as sums do."""
        self.record = Record(*state["record"])
        if self.world.main:
            self.epoch = Record(*(part.to(self.world.device) for part in state["epoch"]))
        self.set_summary(None if state["summary"] is None else Summary(*state["summary"]))
