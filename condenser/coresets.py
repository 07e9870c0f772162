"""Subsets of real data that a learned set has to beat: sample ids, `ipc` of every class."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from utils.streams import generator

Order = Callable[[int, Tensor], Iterable[int]]  # (class, its sample ids) -> the ids, best first


def by_class(members: Sequence[Tensor], ipc: int, order: Order) -> Tensor:
    """Sample ids [n]: of every class the first `ipc` in its order, passing over those that another class has taken
    where enough others are left."""
    taken: set[int] = set()
    for label in sorted(range(len(members)), key=lambda c: len(members[c])):  # rare classes choose first
        fresh, others = list[int](), list[int]()
        for i in order(label, members[label]):
            (others if i in taken else fresh).append(i)
            if len(fresh) == ipc:
                break
        taken.update((fresh + others)[:ipc])
    return torch.tensor(sorted(taken))


def random_subset(members: Sequence[Tensor], ipc: int, seed: int) -> Tensor:
    """Sample ids [n], at random."""

    def order(label: int, ids: Tensor) -> list[int]:
        return ids[torch.randperm(len(ids), generator=generator(seed, "random subset", label))].tolist()

    return by_class(members, ipc, order)


def herding_subset(members: Sequence[Tensor], ipc: int, features: Tensor) -> Tensor:
    """Sample ids [n]: greedily, those whose running mean of features [N, D] follows the class mean (Welling, 2009)."""

    def order(label: int, ids: Tensor) -> Iterator[int]:
        own = features[ids]
        mean, total = own.mean(0), torch.zeros(own.shape[1])
        free = torch.ones(len(ids), dtype=torch.bool)
        for count in range(1, len(ids) + 1):
            distance = (mean - (total + own) / count).norm(dim=1).masked_fill(~free, torch.inf)
            best = int(distance.argmin())
            free[best] = False
            total = total + own[best]
            yield int(ids[best])

    return by_class(members, ipc, order)


def k_center_subset(members: Sequence[Tensor], ipc: int, features: Tensor) -> Tensor:
    """Sample ids [n]: the one nearest the class mean, then always the farthest from all chosen (Gonzalez, 1985)."""
    from sklearn.metrics import pairwise_distances

    def order(label: int, ids: Tensor) -> Iterator[int]:
        own = features[ids]
        best = int((own - own.mean(0)).norm(dim=1).argmin())
        nearest = torch.full((len(ids),), torch.inf)
        yield int(ids[best])
        for _ in range(len(ids) - 1):
            distance = torch.from_numpy(pairwise_distances(own, own[best : best + 1])[:, 0]).float()
            nearest = torch.minimum(nearest, distance)
            nearest[best] = -1.0  # never again, even where samples repeat
            best = int(nearest.argmax())
            yield int(ids[best])

    return by_class(members, ipc, order)
