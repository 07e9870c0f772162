"""What a learned row says: the word piece nearest to each of its embeddings."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from condenser.synthetic_set import SyntheticSet


def nearest_words(
    found: SyntheticSet, table: Tensor, tokenizer: Any, classes: Sequence[str], rows_per_class: int = 1
) -> tuple[tuple[str, str, str], ...]:
    """(class, labels, words) of the first rows of every class; nearest by cosine in the word table [V, D]."""
    unit = torch.nn.functional.normalize(table.cpu(), dim=1)
    lines = []
    for label in found.owner.unique().tolist():
        for row in (found.owner == label).nonzero().flatten()[:rows_per_class].tolist():
            mask = slice(None) if found.attention_mask is None else found.attention_mask[row].bool()
            near = (found.data[row][mask].float() @ unit.T).argmax(1)
            words = " ".join(tokenizer.convert_ids_to_tokens(near.tolist())).replace(" ##", "").removeprefix("##")
            names = ", ".join(classes[i] for i in (found.targets[row] > 0.5).nonzero().flatten().tolist())
            lines.append((classes[label], names, words))
    return tuple(lines)
