"""KCD: keep the samples of which a student still has something to learn (Li et al., ECCV 2022). Pure functions.

Values come from the student's entropies of the usual forward pass (OGVE); every stage keeps fewer samples, whole ones
and ones enriched with what is left out (VAKS). The loss is any.
"""

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from config import Section
from utils.losses import widened


class Kcd(Section):
    """How the set shrinks: to SHARE in STEPS, one every PERIOD epochs."""

    SHARE: float = Field(0.7, gt=0, le=1)
    STEPS: int = Field(6, ge=1)
    PERIOD: int = Field(40, ge=1)
    COST: float = Field(0.03, ge=0)  # power of the visits in a value
    MIX: float = Field(0.3, ge=0, le=1)  # share of a left-out image in the least kept one


class Record(NamedTuple):
    """Sums of entropies [N] and visits [N] of all samples so far."""

    entropies: Tensor
    visits: Tensor


def empty_record(samples: int, device: torch.device | str = "cpu") -> Record:
    """Nothing seen of N samples."""
    return Record(
        torch.zeros(samples, dtype=torch.float64, device=device), torch.zeros(samples, dtype=torch.long, device=device)
    )


def entropy_rows(logits: Tensor) -> Tensor:
    """Entropy [B] in nats of softmax of logits [B, K]; 0, not NaN, for a sure one."""
    log_p = widened(logits).log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def note(record: Record, ids: Tensor, entropies: Tensor) -> None:
    """Add entropies [B] of samples `ids` [B], in place."""
    record.entropies.index_add_(0, ids, entropies.to(record.entropies))
    record.visits.index_add_(0, ids, torch.ones_like(ids))


def values(record: Record, period: int, power: float) -> Tensor:
    """Cost-aware values [N]: mean entropy times (visits / period)^power; 0 of a sample never seen."""
    mean = record.entropies / record.visits.clamp_min(1)
    return mean * (record.visits / period) ** power


def next_count(current: int, samples: int, share: float, steps: int) -> int:
    """How many to keep after `current`: floor(N (1 - share) / steps) fewer, not below floor(N share)."""
    return max(current - int(samples * (1 - share) / steps + 1e-9), int(samples * share + 1e-9))


class Summary(NamedTuple):
    """Ids kept [M], the most valuable first, of which the last [R] are mixed with those left out [R], by shares [R]."""

    kept: Tensor
    mixed: Tensor
    left_out: Tensor
    shares: Tensor


def summarise(worth: Tensor, current: int, count: int, mix: float) -> Summary:
    """The `count` most valuable of all N samples, values [N], where `current` were kept before.

    Of R = current - count left out (at most count), the r-th goes into the r-th of the last R kept with a share of
    mix r / R, r = 0, 1, ...: nothing at the best, nearly `mix` at the least.
    """
    order = worth.argsort(descending=True, stable=True)
    out = min(current - count, count)
    shares = mix * torch.arange(out, dtype=torch.float64, device=worth.device) / max(out, 1)
    return Summary(order[:count], order[count - out : count], order[count : count + out], shares)


def mixed_images(images: Tensor, left_out: Tensor, shares: Tensor) -> Tensor:
    """(1 - share) image + share left out, of [R, ...] and shares [R]; rounded for integers."""
    shares = shares.reshape(-1, *[1] * (images.dim() - 1))
    mix = (1 - shares) * images + shares * left_out
    return (mix if images.is_floating_point() else mix.round()).to(images.dtype)
