"""Contrast with remembered features: CRD, and BINGO for students without labels. The memories are plain tensors."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from config import ConfigError, Section
from kd.methods.relations import unit
from utils.losses import widened


class Crd(Section):
    """Contrastive representation distillation."""

    WEIGHT: float = Field(0.8, ge=0)
    WIDTH: int = Field(128, ge=1)  # of the embeddings
    NEGATIVES: int = Field(16384, ge=1)  # of other classes, drawn with replacement
    TEMPERATURE: float = Field(0.07, gt=0)
    MOMENTUM: float = Field(0.5, ge=0, le=1)


class Bingo(Section):
    """Bags of instances; the temperature is that of ResNets (EfficientNet 0.12)."""

    BAG: int = Field(5, ge=1)  # the nearest images under the teacher
    QUEUE: int = Field(65536, ge=1)  # teacher keys; 4096 is enough for CIFAR
    TEMPERATURE: float = Field(0.2, gt=0)
    INTRA: float = Field(1.0, ge=0)  # two views of an image
    INTER: float = Field(1.0, ge=0)  # an image and one of its bag


class UnitEmbedding(nn.Module):
    """A linear layer onto the sphere, for features of student or teacher."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, width)

    def forward(self, x: Tensor) -> Tensor:
        """Unit rows [B, width] of features [B, ...]."""
        return unit(self.linear(x.flatten(1)))


class CrdMemory(NamedTuple):
    """Embeddings [N, D] of all samples by student and teacher; normalisers [2] against either, 0 before the first
    batch."""

    student: Tensor
    teacher: Tensor
    scale: Tensor


def crd_memory(samples: int, width: int, gen: Generator) -> CrdMemory:
    """A memory before training: uniform in a cube of unit second moment a row, as published."""
    bound = math.sqrt(3 / width)
    student, teacher = (2 * bound * torch.rand(2, samples, width, generator=gen, device=gen.device) - bound).unbind()
    return CrdMemory(student, teacher, torch.zeros(2, device=gen.device))


class ClassGaps(NamedTuple):
    """Sample ids [N] in the order of their classes; first place and size [K] of every class in it."""

    order: Tensor
    first: Tensor
    size: Tensor


def class_gaps(labels: Tensor) -> ClassGaps:
    """Of labels [N]. ConfigError: one class only."""
    size = labels.bincount()
    if len(labels) == int(size.max()):
        raise ConfigError("CRD: all samples are of one class, so there are no negatives; take another method")
    return ClassGaps(labels.argsort(stable=True), size.cumsum(0) - size, size)


def crd_negatives(gaps: ClassGaps, labels: Tensor, count: int, gen: Generator) -> Tensor:
    """Ids [B, count] of samples of other classes than `labels` [B], uniform with replacement."""
    size, first = (x[labels][:, None] for x in (gaps.size, gaps.first))
    draws = torch.rand(len(labels), count, generator=gen, device=gen.device, dtype=torch.float64).to(labels.device)
    place = (draws * (len(gaps.order) - size)).long()
    return gaps.order[torch.where(place >= first, place + size, place)]


def crd_loss(
    student: Tensor, teacher: Tensor, memory: CrdMemory, ids: Tensor, negatives: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """NCE of either network's embeddings [B, D] against the other's memory: [], and normalisers [2] to be kept.

    Odds exp(x . y / T) / Z to M / N: ids [B] the positives, negatives [B, M] (Tian et al., ICLR 2020). Z is estimated
    from the first batch. Similarities to all N are cheaper than the embeddings of B M negatives.
    """
    samples, drawn = len(memory.student), negatives.shape[1]
    chosen = torch.cat([ids[:, None], negatives], 1)
    losses, scales = [], []
    for x, bank, known in ((student, memory.teacher, memory.scale[0]), (teacher, memory.student, memory.scale[1])):
        odds = (widened(x) @ bank.T).gather(1, chosen) / temperature
        with torch.no_grad():
            scales.append(torch.where(known > 0, known, samples * odds.exp().mean()))
        odds = odds - scales[-1].log() - math.log(drawn / samples)
        losses.append(-F.logsigmoid(odds[:, 0]) - F.logsigmoid(-odds[:, 1:]).sum(1))
    return (losses[0] + losses[1]).mean(), torch.stack(scales)


@torch.no_grad()
def crd_remember(
    memory: CrdMemory, student: Tensor, teacher: Tensor, ids: Tensor, scale: Tensor, momentum: float
) -> None:
    """Move rows `ids` [B] of the memory towards embeddings [B, D], keep the first normalisers [2]: in place, after
    backward."""
    for bank, x in ((memory.student, student), (memory.teacher, teacher)):
        bank[ids] = unit(momentum * bank[ids] + (1 - momentum) * x.to(bank.dtype))
    memory.scale.copy_(torch.where(memory.scale > 0, memory.scale, scale))


def bags(features: Tensor, size: int, chunk: int = 1024) -> Tensor:
    """Ids [N, size] of the nearest others by cosine of features [N, D], nearest first. ConfigError: not enough."""
    if len(features) <= size:
        raise ConfigError(f"BINGO.BAG: {size} of {len(features)} images; take fewer")
    rows = unit(widened(features))
    found = []
    for ids in torch.arange(len(rows), device=rows.device).split(chunk):
        near = (rows[ids] @ rows.T).scatter(1, ids[:, None], -math.inf)  # a twin of the image is not the image
        found.append(near.topk(size, 1).indices)
    return torch.cat(found)


def partners(neighbours: Tensor, gen: Generator) -> Tensor:
    """One id [N] out of every bag [N, size], to be drawn once an epoch."""
    picks = torch.randint(neighbours.shape[1], (len(neighbours), 1), generator=gen, device=gen.device)
    return neighbours.gather(1, picks).squeeze(1)


class KeyQueue(NamedTuple):
    """Teacher keys [K, D], and where the next is written []."""

    keys: Tensor
    place: Tensor


def key_queue(length: int, width: int, gen: Generator) -> KeyQueue:
    """A queue of random unit keys."""
    keys = unit(torch.randn(length, width, generator=gen, device=gen.device))
    return KeyQueue(keys, torch.zeros((), dtype=torch.long, device=gen.device))


@torch.no_grad()
def push(queue: KeyQueue, keys: Tensor) -> None:
    """Write keys [B, D], B <= K, over the oldest, in place, after backward; B need not divide K."""
    ids = (queue.place + torch.arange(len(keys), device=keys.device)) % len(queue.keys)
    queue.keys[ids] = keys.to(queue.keys.dtype)
    queue.place.add_(len(keys)).remainder_(len(queue.keys))


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """-log of the key's share of exp(q . k / T) among itself and the queue [K, D]: [B] for unit rows [B, D]."""
    query = widened(query)
    own, others = (query * key).sum(1, keepdim=True), query @ queue.T.to(query.dtype)
    odds = torch.cat([own, others], 1) / temperature
    return odds.logsumexp(1) - odds[:, 0]


def bingo_loss(anchor: Tensor, member: Tensor, key: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Intra and inter terms [], []: the student's anchor and bag member [B, D] to the teacher's key of the anchor.

    Xu et al., ICLR 2022: views of the anchor differ between student and teacher.
    """
    return info_nce(anchor, key, queue, temperature).mean(), info_nce(member, key, queue, temperature).mean()
