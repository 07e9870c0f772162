"""A corpus: texts and class ids in a train, a validation and a test part."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from utils.streams import generator


@dataclass(frozen=True)
class Split:
    """Documents and the sorted class ids of each."""

    texts: list[str]
    labels: list[tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, which: Sequence[int]) -> "Split":
        """These documents only."""
        return Split([self.texts[i] for i in which], [self.labels[i] for i in which])


@dataclass(frozen=True)
class Corpus:
    """A data set of texts; a class id is a position in `classes`."""

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split | None
    test: Split
    multilabel: bool

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any text, label or class name."""
        parts = [[part.texts, part.labels] for part in (self.train, self.val, self.test) if part is not None]
        return hashlib.sha256(json.dumps([self.classes, parts]).encode()).hexdigest()[:16]


def stratified_split(
    labels: Sequence[tuple[int, ...]], fraction: float, gen: torch.Generator
) -> tuple[list[int], list[int]]:
    """Positions to keep and to hold out, every class in proportion and with at least one document kept.

    Iterative stratification, rarest label first (Sechidis, Tsoumakas, Vlahavas, 2011).
    """
    members: dict[int, set[int]] = {}
    for position, own in enumerate(labels):
        for label in own:
            members.setdefault(label, set()).add(position)
    wanted = {label: round(fraction * len(ids)) for label, ids in members.items()}
    kept_left = {label: len(ids) for label, ids in members.items()}  # documents not yet held out
    order = torch.randperm(len(labels), generator=gen).tolist()
    rank = {position: i for i, position in enumerate(order)}
    held: set[int] = set()
    open_labels = {label for label in members if wanted[label] > 0}
    while open_labels:
        label = min(open_labels, key=lambda c: (len(members[c]), c))
        open_labels.remove(label)
        for position in sorted(members[label], key=rank.__getitem__):
            if wanted[label] <= 0:
                break
            own = labels[position]
            # Not if it is taken, a class's last document, or would give a co-label more than its share.
            if position in held or any(kept_left[c] <= 1 or wanted[c] <= 0 for c in own):
                continue
            held.add(position)
            for c in own:
                wanted[c] -= 1
                kept_left[c] -= 1
    return [i for i in range(len(labels)) if i not in held], sorted(held)


def with_validation(corpus: Corpus, fraction: float, seed: int) -> Corpus:
    """The corpus with a validation part, cut from train where it has none."""
    if corpus.val is not None:
        return corpus
    kept, held = stratified_split(corpus.train.labels, fraction, generator(seed, "validation"))
    return replace(corpus, train=corpus.train.select(kept), val=corpus.train.select(held))
