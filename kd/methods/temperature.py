"""CTKD: a temperature that learns against the student, easy first (Li et al., AAAI 2023)."""

import math
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from config import Section

PUBLISHED_START = 1 + 20 / (1 + math.exp(-1))  # 15.62: the parameter starts at 1


class Ctkd(Section):
    """A temperature LOWEST + RANGE sigmoid(parameter), learned for all samples (global) or of each."""

    INSTANCE: bool = False
    LOWEST: float = Field(1.0, gt=0)
    RANGE: float = Field(20.0, gt=0)
    START: float = Field(PUBLISHED_START, gt=0)  # within the range; 4 if it runs away in the first epochs
    EPOCHS: int = Field(10, ge=1)  # of the curriculum; ImageNet 5
    LAMBDA: float = Field(1.0, ge=0)  # at its end

    @model_validator(mode="after")
    def check(self) -> "Ctkd":
        """The start can be reached."""
        highest = self.LOWEST + self.RANGE
        if not self.LOWEST < self.START < highest:
            raise ValueError(f"START: {self.START}, but temperatures lie between {self.LOWEST} and {highest}; set one")
        return self


class GradientReversalFunction(torch.autograd.Function):
    """x, whose gradient g becomes -|lambda| g: a lambda negated by the caller, as in the public code, does the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lambda_: float) -> Tensor:
        """A copy of x."""
        ctx.lambda_ = abs(lambda_)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """-|lambda| g, and nothing for lambda."""
        return -ctx.lambda_ * grads[0], None


class GradientReversal(nn.Module):
    """`GradientReversalFunction` as a layer."""

    def forward(self, x: Tensor, lambda_: float) -> Tensor:
        """x with reversed gradient."""
        reversed_: Tensor = GradientReversalFunction.apply(x, lambda_)
        return reversed_


def logit_of(start: float, lowest: float, span: float) -> float:
    """The parameter at which lowest + span sigmoid(parameter) = start."""
    share = (start - lowest) / span
    return math.log(share / (1 - share))


class GlobalTemperature(nn.Module):
    """One temperature for all samples. Its parameter wants no weight decay."""

    def __init__(self, lowest: float = 1.0, span: float = 20.0, start: float = PUBLISHED_START) -> None:
        super().__init__()
        self.lowest, self.span, self.reverse = lowest, span, GradientReversal()
        self.raw = nn.Parameter(torch.tensor([logit_of(start, lowest, span)]))

    def forward(self, student: Tensor, teacher: Tensor, lambda_: float) -> Tensor:
        """Temperature [1], whose gradient is reversed, for logits [B, K]."""
        return self.reverse(self.lowest + self.span * self.raw.sigmoid(), lambda_)


class InstanceTemperature(nn.Module):
    """A temperature of each sample from both networks' detached logits, by two layers; all begin at `start`.

    Detached, since a reversed gradient through the student's logits would teach the student to be worse.
    """

    def __init__(
        self, classes: int, lowest: float = 1.0, span: float = 20.0, start: float = PUBLISHED_START, width: int = 32
    ) -> None:
        super().__init__()
        self.lowest, self.span, self.reverse = lowest, span, GradientReversal()
        self.layers = nn.Sequential(nn.Linear(2 * classes, width), nn.ReLU(), last := nn.Linear(width, 1))
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, logit_of(start, lowest, span))

    def forward(self, student: Tensor, teacher: Tensor, lambda_: float) -> Tensor:
        """Temperatures [B], whose gradient is reversed, for logits [B, K]."""
        raw = self.layers(torch.cat([student, teacher], 1).detach()).squeeze(1)
        return self.reverse(self.lowest + self.span * raw.sigmoid(), lambda_)


def curriculum(epoch: int, epochs: int, end: float = 1.0) -> float:
    """lambda of an epoch, the first being 1: end (1 - cos(pi min(epoch / epochs, 1))) / 2."""
    return end * (1 - math.cos(math.pi * min(epoch / epochs, 1))) / 2
