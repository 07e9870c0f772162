"""Scores of a classifier on a held-out set, by scikit-learn."""

import warnings
from dataclasses import asdict, dataclass

import numpy as np
from torch import Tensor
from torch.nn.functional import one_hot

THRESHOLDS = tuple(i / 40 for i in range(1, 40))  # 0.025 ... 0.975


@dataclass(frozen=True)
class Scores:
    """All in percent."""

    micro: float
    macro: float
    map: float
    exact: float

    def as_dict(self) -> dict[str, float]:
        """Name -> percent."""
        return asdict(self)


def probabilities(logits: Tensor, multilabel: bool) -> Tensor:
    """Class probabilities [N, C] of logits [N, C]: sigmoid, or softmax for single-label."""
    return logits.float().sigmoid() if multilabel else logits.float().softmax(1)


def decide(probs: Tensor, multilabel: bool, threshold: float) -> Tensor:
    """0/1 decisions [N, C] of probabilities [N, C]: all classes over the threshold, or the largest one."""
    if multilabel:
        return (probs >= threshold).int()
    return one_hot(probs.argmax(1), probs.shape[1]).int()


def best_threshold(probs: Tensor, targets: Tensor) -> float:
    """The threshold of THRESHOLDS with the highest micro-F1 on probs [N, C] against targets [N, C]."""
    p, y = probs.numpy(), targets.numpy() > 0.5
    cut = np.array(THRESHOLDS)[:, None, None]
    chosen = p[None] >= cut  # [T, N, C]
    hits = (chosen & y[None]).sum((1, 2))
    f1 = 2 * hits / np.maximum(chosen.sum((1, 2)) + y.sum(), 1)
    return THRESHOLDS[int(f1.argmax())]


def score(probs: Tensor, targets: Tensor, multilabel: bool, threshold: float) -> Scores:
    """Micro-F1, macro-F1 (all classes, 0 where undefined), mAP (classes with positives), exact match."""
    from sklearn.metrics import average_precision_score, f1_score

    y = (targets > 0.5).int().numpy()
    chosen = decide(probs, multilabel, threshold).numpy()
    present = y.any(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class that is never chosen is worth 0, as stated
        return Scores(
            micro=100 * float(f1_score(y, chosen, average="micro", zero_division=0)),
            macro=100 * float(f1_score(y, chosen, average="macro", zero_division=0)),
            map=100 * float(average_precision_score(y[:, present], probs.numpy()[:, present], average="macro")),
            exact=100 * float((y == chosen).all(1).mean()),
        )
