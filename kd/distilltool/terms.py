"""The terms of an objective, each with its weight and the shapes that it compares."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from config import ConfigError
from kd.distilltool.adaptors import Results
from kd.distilltool.matches import KD_LOSS_MAP
from kd.distilltool.settings import DistillationConfig
from utils.losses import widened


@dataclass(frozen=True)
class Term:
    """weight * value, value [] without its weight."""

    name: str
    weight: float
    value: Tensor
    student: str = ""  # shapes
    teacher: str = ""


def shapes(values: Sequence[Tensor]) -> str:
    """`[8, 3]`, several joined by `+`."""
    return " + ".join(str(list(value.shape)) for value in values)


def hard_term(weight: float, results: Results, name: str = "losses") -> Term:
    """The sum of a model's own losses; a vector of them, one per replica, counts by its mean."""
    value = sum((widened(loss).mean() for loss in results.losses), torch.zeros(()))
    return Term(name, weight, value, shapes(results.losses))


def logit_term(weight: float, settings: DistillationConfig, student: Results, teacher: Results) -> Term:
    """The logit loss, summed over the tensors of both lists. Raises ConfigError where these do not fit."""
    name = f"{settings.kd_loss_type} logits, T {settings.temperature:g}"
    found = f"'logits': student {shapes(student.logits) or 'none'}, teacher {shapes(teacher.logits) or 'none'}"
    if [x.shape for x in student.logits] != [x.shape for x in teacher.logits]:
        raise ConfigError(f"{found}: both adaptors must give the same labels (or vocabulary) and positions")
    value, masks = torch.zeros(()), student.logits_mask or teacher.logits_mask
    for number, (s, t) in enumerate(zip(student.logits, teacher.logits, strict=True)):
        if masks and s.dim() == 3:
            mask = masks[number % len(masks)]
            if mask.shape != s.shape[:2]:
                raise ConfigError(f"'logits_mask': {list(mask.shape)}, but 'logits' is {list(s.shape)}: give [B, L]")
            s, t = s[mask != 0], t[mask != 0]
        value = value + KD_LOSS_MAP[settings.kd_loss_type](s, t, settings.temperature)
    return Term(name, weight, value, shapes(student.logits), shapes(teacher.logits))


def output_terms(settings: DistillationConfig, student: Results, teacher: Results, prefix: str = "") -> list[Term]:
    """Logit loss and the student's own losses, as far as they have a weight and adaptors give them."""
    terms = []
    if settings.kd_loss_weight and (student.logits or teacher.logits):
        terms.append(logit_term(settings.kd_loss_weight, settings, student, teacher))
    if settings.hard_label_weight and student.losses:
        terms.append(hard_term(settings.hard_label_weight, student))
    return [Term(prefix + t.name, t.weight, t.value, t.student, t.teacher) for t in terms] if prefix else terms


def total(terms: Sequence[Term]) -> Tensor:
    """Weighted sum [], in float32 at least."""
    return sum((term.weight * term.value for term in terms), torch.zeros(()))
