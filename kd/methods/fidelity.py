"""Does a student do what its teacher does? (Stanton et al., NeurIPS 2021); divergences and their inequality.

f is convex where f(v + t (w - v)) <= f(v) + t (f(w) - f(v)) for 0 <= t <= 1. Jensen, for weights w_i >= 0 that sum to
1: f(sum w_i x_i) <= sum w_i f(x_i). With f = -log over {P > 0}: KL(P || Q) = sum P (-log Q / P) >= -log sum Q >= 0,
where the sums run over P > 0, so that Q's may be less than 1; equal only for P = Q.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kd.scoring import Score, score
from utils.losses import kl_rows, widened


@dataclass(frozen=True)
class Said:
    """What a network says of samples: logits [N, K], and what its head reads [n, D] of some of them, for CKA."""

    logits: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Fidelity:
    """Of a pair on the same samples: agreement and CKA in percent, KL of teacher to student and JS in nats, scores."""

    agreement: float
    kl: float
    js: float
    cka: float
    student: Score
    teacher: Score

    @property
    def pair(self) -> dict[str, float]:
        """Name -> value of what both together give, as results have it."""
        return {
            "agreement": self.agreement, "kl_to_teacher": self.kl, "js_to_teacher": self.js, "cka": self.cka,
        }  # fmt: skip

    def as_dict(self) -> dict[str, float]:
        """What a student's result says beside its own scores: of the pair, and, as `teacher_nll`, of the teacher."""
        return self.pair | {f"teacher_{name}": value for name, value in self.teacher.as_dict().items()}


def js_rows(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon divergence of softmax(a), softmax(b): logits [..., K] -> [...], in [0, log 2]."""
    log_a, log_b = widened(a).log_softmax(-1), widened(b).log_softmax(-1)
    middle = torch.logaddexp(log_a, log_b)  # up to a constant
    return (kl_rows(middle, log_a, 1.0) + kl_rows(middle, log_b, 1.0)) / 2


def fidelity(student: Said, teacher: Said, labels: Tensor) -> Fidelity:
    """All numbers of two networks that saw the same samples, labels [N]; means over samples, at T = 1."""
    s, t = student.logits.double(), teacher.logits.double()
    same = (s.argmax(1) == t.argmax(1)).double().mean()
    return Fidelity(
        100 * float(same), float(kl_rows(s, t, 1.0).mean()), float(js_rows(s, t).mean()),
        100 * linear_cka(student.rows, teacher.rows), score(s, labels), score(t, labels),
    )  # fmt: skip


def ensemble_logits(logits: Tensor) -> Tensor:
    """Log of the mean probabilities [N, K] of networks' logits [M, N, K]."""
    return widened(logits).log_softmax(-1).logsumexp(0) - math.log(len(logits))


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Linear CKA of features [N, ...] of the same samples: 1 up to rotation and scale, 0 where one is constant.

    |B^T A|^2 / (|A^T A| |B^T B|) of centred columns (Kornblith et al., ICML 2019), by D x D or N x N products.
    """
    x, y = (f - f.mean(0) for f in (a.flatten(1).double(), b.flatten(1).double()))
    if any(c.norm() <= 1e-12 * f.double().norm() for c, f in ((x, a), (y, b))):
        return 0.0  # rounding errors of the mean
    if len(x) > max(x.shape[1], y.shape[1]):
        return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))
    k, m = x @ x.T, y @ y.T
    return float((k * m).sum() / (k.norm() * m.norm()))
