"""Supervised and distillation losses on logits: pure functions of tensors."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

WIDEST = 1e15  # of bfloat16 logits: float32 holds its squares and their sums
FLOOR = -1e30  # a logit without weight: unlike -inf, 0 times it is 0


def task_loss(logits: Tensor, targets: Tensor, multilabel: bool) -> Tensor:
    """Loss of every row [B] for logits [B, C] and hard or soft targets [B, C].

    Multi-label: binary cross-entropy summed over the classes (a mean would shrink it C times against a
    cross-entropy). Single-label: cross-entropy, the rows of `targets` being distributions.
    """
    if multilabel:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
    return F.cross_entropy(logits, targets, reduction="none")


def widened(logits: Tensor) -> Tensor:
    """Logits of any shape and float type in float32 at least, where no loss of finite 16-bit logits overflows."""
    if logits.dtype == torch.bfloat16:  # the range of float32 itself
        logits = logits.clamp(-WIDEST, WIDEST)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def squared(temperature: float | Tensor) -> float | Tensor:
    """T^2 of a number, or of [..., 1] beside logits [..., K] as [...] beside their rows."""
    return temperature.square().squeeze(-1) if isinstance(temperature, Tensor) else temperature**2


def kl_rows(student: Tensor, teacher: Tensor, temperature: float | Tensor) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of every row: logits [..., K] -> [...] (Hinton 2015).

    T: a number, or [..., 1], which may have a gradient.
    """
    log_s, log_t = ((widened(z) * (1 / temperature)).log_softmax(-1) for z in (student, teacher))
    return squared(temperature) * (log_t.exp() * (log_t - log_s)).sum(-1)


def cross_entropy_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """-sum p log q of every row, p = softmax(teacher / T), q = softmax(student / T): logits [..., K] -> [...].

    As KL / T^2 plus the teacher's entropy. Logits may be -inf in both.
    """
    student, teacher = (widened(z).clamp_min(FLOOR) for z in (student, teacher))
    log_t = (teacher / temperature).log_softmax(-1)
    return kl_rows(student, teacher, temperature) / temperature**2 - (log_t.exp() * log_t).sum(-1)


def selected(values: Tensor, mask: Tensor | None, fill: float = 0.0) -> Tensor:
    """Values with `fill` wherever a mask, broadcast to their shape, is 0; what stood there has no part, even nan."""
    return values if mask is None else values.masked_fill(mask == 0, fill)


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean [] of the values where a mask, broadcast to their shape, is not 0; 0 where there are none."""
    kept = max(values.numel(), 1) if mask is None else (mask != 0).expand_as(values).sum().clamp_min(1)
    return selected(values, mask).sum() / kept


def similarity(x: Tensor, y: Tensor, over: Literal["tokens", "channels"], mask: Tensor | None = None) -> Tensor:
    """Dot products of rows x, y [B, L, D] per sample: of tokens x y^T / D [B, L, L], of channels x^T y / n [B, D, D].

    n: the rows that a mask [B, L] keeps, without a mask L (flow of solution matrices, Yim et al. 2017).
    """
    rows = None if mask is None else mask[..., None]
    x, y = selected(widened(x), rows), selected(widened(y), rows)
    if over == "tokens":
        return x @ y.mT / x.shape[-1]
    count = x.shape[1] if mask is None else (mask != 0).sum(1)[:, None, None].clamp_min(1)
    return x.mT @ y / count
