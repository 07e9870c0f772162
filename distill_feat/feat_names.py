"""Rows of the tables of feature labels, and what they are called."""

from typing import Literal

RowName = Literal[
    "full", "distilled", "distilled_feature", "start", "start_feature", "random", "distilled_soft", "random_soft",
]  # fmt: skip
NAMES: dict[RowName, str] = {
    "full": "full data", "distilled": "learned, no F", "distilled_feature": "learned, with F",
    "start": "its start, no F", "start_feature": "its start, with F", "random": "random, equal bytes",
    "distilled_soft": "learned, soft labels", "random_soft": "random, soft labels, equal bytes",
}  # fmt: skip
