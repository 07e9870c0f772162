"""Scores against scikit-learn called directly."""

import torch
from sklearn.metrics import accuracy_score, average_precision_score, f1_score

from utils.losses import task_loss
from utils.metrics import THRESHOLDS, best_threshold, probabilities, score


def sample(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    targets = (torch.rand(80, 6, generator=gen) < 0.25).float()
    targets[:, 5] = 0  # a class without positives
    return (targets * 0.4 + torch.rand(80, 6, generator=gen) * 0.6), targets


def test_best_threshold_is_the_best_of_an_exhaustive_search() -> None:
    probs, targets = sample(0)
    found = {t: f1_score(targets.numpy(), (probs >= t).numpy(), average="micro", zero_division=0) for t in THRESHOLDS}
    assert found[best_threshold(probs, targets)] == max(found.values())


def test_scores_equal_sklearn_and_absent_classes_count_in_macro_only() -> None:
    probs, targets = sample(1)
    ours, chosen = score(probs, targets, True, 0.5), (probs >= 0.5).numpy()
    assert abs(ours.micro - 100 * f1_score(targets.numpy(), chosen, average="micro")) < 1e-9
    assert abs(ours.macro - 100 * f1_score(targets.numpy(), chosen, average="macro", zero_division=0)) < 1e-9
    mean = sum(average_precision_score(targets[:, c].numpy(), probs[:, c].numpy()) for c in range(5)) / 5
    assert abs(ours.map - 100 * mean) < 1e-9


def test_micro_f1_of_single_labels_is_accuracy() -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    labels = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(3))
    ours = score(probabilities(logits, False), torch.nn.functional.one_hot(labels, 4).float(), False, 0.5)
    assert abs(ours.micro - 100 * accuracy_score(labels, logits.argmax(1))) < 1e-9


def test_task_loss_is_the_log_likelihood_of_the_labels() -> None:
    logits, targets = torch.randn(5, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[[0, 1, 2, 1, 0]]
    p = logits.sigmoid()
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(1)
    torch.testing.assert_close(task_loss(logits, targets, True), expected)
    torch.testing.assert_close(task_loss(logits, targets, False), -(targets * logits.softmax(1).log()).sum(1))


def test_exact_match_is_the_share_of_rows_that_are_right_throughout() -> None:
    probs, targets = sample(2)
    ours = score(probs, targets, True, 0.4).exact
    assert abs(ours - 100 * accuracy_score(targets.numpy(), (probs >= 0.4).numpy())) < 1e-9


def test_a_tie_of_single_label_classes_is_one_decision() -> None:
    targets = torch.nn.functional.one_hot(torch.arange(8) % 4, 4).float()
    assert score(torch.full((8, 4), 0.25), targets, False, 0.5).micro == 25


def test_a_threshold_is_found_where_nothing_is_positive() -> None:
    assert best_threshold(torch.rand(5, 3), torch.zeros(5, 3)) in THRESHOLDS
