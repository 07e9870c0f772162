"""Which samples come next: pure functions of a name, so that any step can be drawn without the ones before."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.streams import generator


@dataclass(frozen=True)
class ClassSampler:
    """Draws members of a class without replacement, reshuffled every epoch."""

    members: Sequence[Tensor]  # members[c]: sorted sample ids of class c
    batch: int
    seed: int

    def draw(self, label: int, index: int) -> Tensor:
        """Draw `index` of class `label`: min(n_c, batch) distinct ids; the whole class in ceil(n_c / batch) draws."""
        ids = self.members[label]
        if len(ids) <= self.batch:
            return ids
        per_epoch = -(-len(ids) // self.batch)
        epoch, turn = divmod(index, per_epoch)
        order = torch.randperm(len(ids), generator=generator(self.seed, "real", label, epoch))
        # The last batch of an epoch is filled up from the epoch's beginning: still distinct samples.
        places = torch.arange(turn * self.batch, (turn + 1) * self.batch) % len(ids)
        return ids[order[places]]


def training_batch(lengths: Tensor, batch: int, step: int, seed: int, *name: int) -> Tensor:
    """Sample ids of training step `step`: epochs of shuffled batches, samples of like length [N] together."""
    count = len(lengths)
    batch = min(batch, count)
    per_epoch = -(-count // batch)
    epoch, turn = divmod(step, per_epoch)
    gen = generator(seed, "training order", *name, epoch)
    # Like lengths share a batch, up to a random jitter that makes every epoch's batches new ones.
    noisy = lengths.float() * (1 + 0.2 * torch.rand(count, generator=gen)) + torch.rand(count, generator=gen)
    order = noisy.argsort()
    start = int(torch.randperm(per_epoch, generator=gen)[turn]) * batch
    return order[torch.arange(start, start + batch) % count]


def buckets(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Positions of items, sorted by length and cut so that (items x longest) stays within the budget."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    parts: list[list[int]] = []
    for i in order:
        if not parts or lengths[i] * (len(parts[-1]) + 1) > token_budget:
            parts.append([])
        parts[-1].append(i)
    return parts
