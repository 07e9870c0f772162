"""Batches of a run: one view of a sample an epoch, whatever batch, rank or student; and what methods add."""

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from config import ConfigError
from kd.kd_config import KdConfig
from kd.kd_data import KdData
from kd.methods.contrast import partners
from kd.methods.rotations import TURNS, rotated
from kd.shrinking import Shrinking
from utils.ddp import World
from utils.streams import generator
from utils.views import check_crop, crop_flip, resized_views, view_numbers

SECOND = 2**30  # number of the first of second views, as of epochs that never come


class Batch(NamedTuple):
    """What a step reads: the student's input, class ids and sample ids [B], and the teacher's input where it differs.

    `own`: the rows of a pass that the labels are of. `fresh`: how many samples are new, the others coming again;
    `again`: what a mean over the latter counts for beside one over all.
    """

    x: Tensor
    labels: Tensor
    ids: Tensor
    fresh: int
    of_teacher: Tensor
    own: slice = slice(None)
    again: float = 1.0


class Batches:
    """The training batches of this rank: order and views are streams of (seed, epoch) and of the sample alone.

    What a method needs of them: `turned` images in four rotations; `bags`, an image and one of its neighbours, and
    another view for the teacher; `twice`, beside every batch that of the step before in another view.
    """

    def __init__(self, data: KdData, cfg: KdConfig, world: World, epochs: int | None = None) -> None:
        """For so many epochs, None: those of `cfg`. Raises ConfigError for fewer samples than ranks, images too small
        for the crops, files to be mixed."""
        if world.size > cfg.SOLVER.BATCH_SIZE:
            raise ConfigError(f"SOLVER.BATCH_SIZE: {cfg.SOLVER.BATCH_SIZE} is of {world.size} ranks together; raise it")
        self.data, self.batch, self.seed, self.world = data, cfg.SOLVER.BATCH_SIZE, cfg.SEED, world
        self.fixed = cfg.KD.CACHE_VIEWS  # epochs take so many views in turn; 0 = every epoch its own
        self.views, self.drop_last = cfg.views, cfg.DATASET.DROP_LAST
        self.train = data.train.to(world.device)
        self.labels = data.train.labels.to(world.device)
        self.neighbours: Tensor | None = None  # [N, size] of `bags`
        self.shrinking = Shrinking(cfg.KCD, cfg.share_of_epochs, data.train, world) if cfg.KCD else None
        check_crop(data.train.size, data.size, data.pad)
        counts = [self.shrinking.count(e) if self.shrinking else len(data.train) for e in range(epochs or cfg.epochs)]
        self.starts = [0, *accumulate(-(-self.used(count) // self.batch) for count in counts)]  # steps before an epoch

    def used(self, count: int) -> int:
        """How many of `count` samples an epoch takes: no rank without a sample, no batch norm of one."""
        rest = count % self.batch
        drop = count > self.batch and (self.drop_last or rest < 2 * self.world.size)
        return count - rest if drop else count

    def place(self, step: int) -> tuple[int, int]:
        """Epoch 0, 1, ... of a step, and which step of it; after the last epoch the number of epochs and 0."""
        epoch = bisect_right(self.starts, step) - 1
        return epoch, step - self.starts[epoch]

    def ends(self, step: int) -> bool:
        """Whether a step is the last of its epoch."""
        return step + 1 in self.starts

    def begin(self, epoch: int) -> None:
        """Draw the order and the views of epoch 0, 1, ...; they go to the device at once."""
        self.parts = self.order(epoch)
        self.own = [part[self.world.rank :: self.world.size] for part in self.parts]
        nothing = torch.arange(0)
        self.again = [nothing] * len(self.parts)  # of `twice`
        if self.views == "twice":
            same = epoch and (self.shrinking is None or self.shrinking.count(epoch) == self.shrinking.count(epoch - 1))
            self.again = [self.order(epoch - 1)[-1] if same else nothing, *self.parts[:-1]]  # of the same images
        self.view = epoch % self.fixed if self.fixed else epoch
        self.on_device = torch.cat(self.own).to(self.world.device).split([len(part) for part in self.own])
        self.make, self.remake = self.maker(self.view), self.maker(SECOND + self.view)
        if self.views == "bags" and self.neighbours is not None:
            self.member = partners(self.neighbours, generator(self.seed, "kd bags", epoch)).to(self.world.device)

    def order(self, epoch: int) -> tuple[Tensor, ...]:
        """Sample ids of the epoch's batches over all ranks."""
        members = self.shrinking.members if self.shrinking else torch.arange(len(self.train))
        draw = torch.randperm(len(members), generator=generator(self.seed, "kd order", epoch))
        return members[draw[: self.used(len(members))]].split(self.batch)

    def maker(self, view: int) -> Callable[[Tensor], Tensor]:
        """From sample ids [B] to levels [B, C, size, size] of a view."""
        images = self.shrinking.images if self.shrinking else self.train
        if self.data.resized:
            return resized_views(images, self.seed, view, self.data.size)
        numbers = view_numbers(self.seed, view, len(self.train)).to(self.world.device)
        if not self.data.flip:
            numbers[:, 2] = 1
        return lambda which: crop_flip(
            images.levels(which).to(self.world.device), numbers[which], self.data.size, self.data.pad
        )

    def normalised(self, levels: Tensor) -> Tensor:
        """Inputs of networks."""
        return self.train.normaliser(levels.to(self.world.device).float() / 255)

    def input(self, which: Tensor) -> Tensor:
        """Normalised views [B, C, size, size] of samples [B], which are on the device."""
        return self.normalised(self.make(which))

    def get(self, turn: int) -> Batch:
        """Batch number `turn` of the epoch on this rank."""
        ids = self.on_device[turn]
        x, fresh = self.input(ids), len(ids)
        if self.views == "turned":
            x = rotated(x)
            return Batch(x, self.labels[ids], ids, fresh, x, slice(None, None, TURNS))
        if self.views == "bags":
            both = torch.cat([x, self.input(self.member[ids])])
            return Batch(both, self.labels[ids], ids, fresh, self.normalised(self.remake(ids)), slice(fresh))
        if self.views == "twice":
            again = self.again[turn][self.world.rank :: self.world.size].to(ids.device)
            x, ids = torch.cat([x, self.normalised(self.remake(again))]), torch.cat([ids, again])
            if len(again):
                return Batch(x, self.labels[ids], ids, fresh, x, again=self.counts(self.again[turn]) / self.share(turn))
        return Batch(x, self.labels[ids], ids, fresh, x)

    def counts(self, *parts: Tensor) -> float:
        """What this rank's mean over its rows of parts of a batch counts for in that over all, times the ranks."""
        own = sum(len(part[self.world.rank :: self.world.size]) for part in parts)
        return own * self.world.size / sum(map(len, parts))

    def share(self, turn: int) -> float:
        """What this rank's mean over a batch counts for in that over the whole batch, times the ranks."""
        return self.counts(self.parts[turn], self.again[turn])

    def spread(self, turn: int) -> Callable[[Tensor], Tensor]:
        """From this rank's new rows of a batch to those of all ranks, in the order of the batch."""

        def rows(own: Tensor) -> Tensor:
            if self.world.size == 1:
                return own
            whole = own.new_zeros(len(self.parts[turn]), *own.shape[1:])
            whole[self.world.rank :: self.world.size] = own
            return self.world.sum(whole)

        return rows
