"""Supervised losses on logits: pure functions of tensors."""

import torch.nn.functional as F
from torch import Tensor


def task_loss(logits: Tensor, targets: Tensor, multilabel: bool) -> Tensor:
    """Loss of every row [B] for logits [B, C] and hard or soft targets [B, C].

    Multi-label: binary cross-entropy summed over the classes (a mean would shrink it C times against a
    cross-entropy). Single-label: cross-entropy, the rows of `targets` being distributions.
    """
    if multilabel:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
    return F.cross_entropy(logits, targets, reduction="none")
