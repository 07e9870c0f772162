"""The two scores that tell data from recipe."""

import pytest

from condenser.robust_scores import augmentation_robust_score, label_robust_score, squeeze


def test_the_scale_ends_at_0_and_100() -> None:
    assert squeeze(-1) == pytest.approx(0) and squeeze(1) == pytest.approx(100)


def test_a_perfect_set_beside_a_useless_random_one() -> None:
    assert label_robust_score(100, 100, 100, 0, weight=1.0) == pytest.approx(100)
    assert augmentation_robust_score(100, 0, 100, 0) == pytest.approx(100)


def test_what_the_labels_give_to_both_sets_is_not_counted() -> None:
    one = label_robust_score(80, 60, learned_soft=70, random_soft=50)
    assert label_robust_score(80, 60, learned_soft=75, random_soft=55) == pytest.approx(one)
    assert label_robust_score(80, 65, learned_soft=70, random_soft=50) > one


def test_what_augmentation_gives_to_both_sets_is_not_counted() -> None:
    one = augmentation_robust_score(60, 40, 50, 35)
    assert augmentation_robust_score(70, 50, 50, 35) == pytest.approx(one)
    assert augmentation_robust_score(60, 40, 55, 35) > one
    assert augmentation_robust_score(50, 50, 30, 30) == pytest.approx(26.894, abs=1e-3)  # 1 / (1 + e)
