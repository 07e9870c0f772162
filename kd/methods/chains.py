"""Teachers that are not one fixed network: assistants (TAKD, DGKD), and the student one batch ago (DLB)."""

from typing import NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Generator, Tensor

from config import Section
from utils.kd_networks import known_network
from utils.losses import kl_rows, masked_mean


class Assistants(Section):
    """Networks between teacher and student, large first; all train with the run's method and schedule.

    TAKD: Mirzadeh et al., AAAI 2020. DGKD: Son et al., ICCV 2021; cross-entropy counts once beside all teachers.
    """

    NETWORKS: tuple[str, ...] = ()
    DENSE: bool = True  # every larger network teaches (DGKD), else only the next larger (TAKD)
    DROP: int = Field(1, ge=0)  # teachers left out at random in a step, never all

    @field_validator("NETWORKS")
    @classmethod
    def networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Networks that exist."""
        return tuple(map(known_network, value))


class Dlb(Section):
    """Consistency with the last mini-batch; every image is seen twice an epoch."""

    TEMPERATURE: float = Field(3.0, gt=0)
    WEIGHT: float = Field(1.0, ge=0)


def kept_teachers(teachers: int, drop: int, gen: Generator) -> Tensor:
    """Which [M], bool, teach in a step: all but `drop` at random, at least one."""
    order = torch.rand(teachers, generator=gen, device=gen.device).argsort().argsort()
    return order >= min(drop, teachers - 1)


class LastBatch(NamedTuple):
    """What a step of DLB hands to the next: sample ids [B], and logits [B, K] of their other view."""

    ids: Tensor
    logits: Tensor


def last_batch_loss(logits: Tensor, last: Tensor, temperature: float = 3.0, known: Tensor | None = None) -> Tensor:
    """T^2 KL of a new view's logits [B, K] to those of one step before, detached: [] (Shen et al., CVPR 2022).

    `known` [B]: which rows have such logits.
    """
    return masked_mean(kl_rows(logits, last.detach(), temperature), known)
