"""Subsets of real data that a learned set has to beat: sample ids, `ipc` of every class."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from utils.streams import generator

Pick = Callable[[Tensor], list[int]]


def by_class(members: Sequence[Tensor], ipc: int, order: Callable[[int, Tensor], list[int]]) -> Tensor:
    """Sample ids [n]: of every class the first `ipc` in its order, passing over those that another class has taken
    where enough others are left."""
    taken: set[int] = set()
    for label in sorted(range(len(members)), key=lambda c: len(members[c])):  # rare classes choose first
        ranked = order(label, members[label])
        fresh = [i for i in ranked if i not in taken]
        taken.update((fresh + [i for i in ranked if i in taken])[:ipc])
    return torch.tensor(sorted(taken))


def random_subset(members: Sequence[Tensor], ipc: int, seed: int) -> Tensor:
    """Sample ids [n], at random."""

    def order(label: int, ids: Tensor) -> list[int]:
        return ids[torch.randperm(len(ids), generator=generator(seed, "random subset", label))].tolist()

    return by_class(members, ipc, order)


def herding_subset(members: Sequence[Tensor], ipc: int, features: Tensor) -> Tensor:
    """Sample ids [n]: greedily, those whose running mean of features [N, D] follows the class mean (Welling, 2009)."""

    def order(label: int, ids: Tensor) -> list[int]:
        own = features[ids]
        mean, total, chosen = own.mean(0), torch.zeros(own.shape[1]), list[int]()
        free = torch.ones(len(ids), dtype=torch.bool)
        for count in range(1, min(len(ids), 4 * ipc) + 1):
            distance = (mean - (total + own) / count).norm(dim=1).masked_fill(~free, torch.inf)
            best = int(distance.argmin())
            free[best] = False
            total = total + own[best]
            chosen.append(int(ids[best]))
        return chosen

    return by_class(members, ipc, order)


def k_center_subset(members: Sequence[Tensor], ipc: int, features: Tensor) -> Tensor:
    """Sample ids [n]: the one nearest the class mean, then always the farthest from all chosen (Gonzalez, 1985)."""
    from sklearn.metrics import pairwise_distances

    def order(label: int, ids: Tensor) -> list[int]:
        own = features[ids]
        best = int((own - own.mean(0)).norm(dim=1).argmin())
        chosen, nearest = [int(ids[best])], torch.full((len(ids),), torch.inf)
        for _ in range(min(len(ids), 4 * ipc) - 1):
            distance = torch.from_numpy(pairwise_distances(own, own[best : best + 1])[:, 0]).float()
            nearest = torch.minimum(nearest, distance)
            nearest[best] = -1.0  # never again, even where documents repeat
            best = int(nearest.argmax())
            chosen.append(int(ids[best]))
        return chosen

    return by_class(members, ipc, order)
