"""How much of a score the data earned, and how much the recipe: DD-Ranking's two scores (Li et al., 2025).

Both compare with a random subset under the same recipe. Accuracies are in percent, scores 0 ... 100; a set that is no
better than random and, for labels, as good as the full data has 26.9.
"""

import math


def squeeze(gain: float) -> float:
    """A gain between -1 and 1 on a scale of 0 to 100, growing faster the larger it is."""
    return 100 * (math.exp(gain) - math.exp(-1)) / (math.e - math.exp(-1))


def label_robust_score(
    full_hard: float, learned_hard: float, learned_soft: float, random_soft: float, weight: float = 0.5
) -> float:
    """Gain over random under soft labels, less what hard labels lose against the full data; accuracies in percent."""
    gain, loss = (learned_soft - random_soft) / 100, (full_hard - learned_hard) / 100
    return squeeze(weight * gain - (1 - weight) * loss)


def augmentation_robust_score(
    learned: float, random: float, learned_plain: float, random_plain: float, weight: float = 0.5
) -> float:
    """Gain over random with augmentation and without it (`_plain`); accuracies in percent."""
    return squeeze(weight * (learned - random) / 100 + (1 - weight) * (learned_plain - random_plain) / 100)
