"""Synthetic text: rows of word embeddings, where they start, and how a row becomes training samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from condenser.synthetic_set import SyntheticSet
from utils.encoder import TextInput
from utils.utils_text import TextSet


def decode(data: Tensor, mask: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Cut rows [N, S, D] and masks [N, S] into their `factor` spans: [N * factor, S / factor, D], row by row."""
    count, length, dim = data.shape
    return data.view(count * factor, length // factor, dim), mask.view(count * factor, length // factor)


@dataclass(frozen=True)
class SyntheticText:
    """A synthetic set as a student reads it: decoded, trimmed batches of embeddings."""

    data: Tensor  # [N, S, D]
    mask: Tensor  # [N, S]
    targets: Tensor  # [N, C]

    def __len__(self) -> int:
        return len(self.data)

    @property
    def lengths(self) -> Tensor:
        """Unmasked positions [N]."""
        return self.mask.sum(1)

    def input(self, samples: Tensor, device: torch.device) -> TextInput:
        """Samples [B] as embeddings [B, S, D] and mask [B, S], S the longest of them."""
        longest = int(self.lengths[samples].max())
        return TextInput(self.data[samples, :longest].to(device), self.mask[samples, :longest].long().to(device))

    def batch(self, samples: Tensor, device: torch.device) -> tuple[TextInput, Tensor]:
        """Samples [B] with their targets [B, C]."""
        return self.input(samples, device), self.targets[samples].to(device)


def student_view(found: SyntheticSet) -> SyntheticText:
    """Decode a synthetic set by its own notes; every sample of a row has the row's labels."""
    factor = int(found.meta.get("factor", 1)) if found.meta.get("decode_type") == "single" else 1
    mask = found.attention_mask
    if mask is None:
        mask = torch.ones(found.data.shape[:2], dtype=torch.uint8)
    data, mask = decode(found.data, mask, factor)
    return SyntheticText(data, mask, found.targets.repeat_interleave(factor, 0))


@dataclass(frozen=True)
class RowShape:
    """Shape of a row and the ids that frame a span."""

    length: int  # S
    spans: int  # pieces that a row is made of
    split: bool  # whether decoding cuts the pieces apart, so that each needs its own frame
    cls: int
    sep: int
    pad: int


def framed(pieces: Sequence[Tensor], shape: RowShape) -> tuple[Tensor, Tensor]:
    """Token ids [S] and mask [S] of one row of bare pieces: each framed by [CLS] ... [SEP] if split, else the whole."""
    ids = torch.full((shape.length,), shape.pad)
    mask = torch.zeros(shape.length, dtype=torch.uint8)
    span = shape.length // len(pieces)
    frames = [(i * span, span, piece) for i, piece in enumerate(pieces)]
    if not shape.split:
        room = (shape.length - 2) // len(pieces)
        frames = [(0, shape.length, torch.cat([piece[:room] for piece in pieces]))]
    for start, width, piece in frames:
        body = piece[: width - 2].long()
        ids[start : start + len(body) + 2] = torch.cat([torch.tensor([shape.cls]), body, torch.tensor([shape.sep])])
        mask[start : start + len(body) + 2] = 1
    return ids, mask


def random_row(documents: TextSet, sample: int, shape: RowShape) -> tuple[Tensor, Tensor]:
    """One document over the whole row; where rows are split, consecutive pieces of it (its start again if short)."""
    body = documents.tokens(sample).cpu()[1:-1]
    if not shape.split:
        return framed([body], shape)
    width = shape.length // shape.spans - 2
    pieces = [body[i * width : (i + 1) * width] for i in range(shape.spans)]
    return framed([piece if len(piece) else pieces[0] for piece in pieces], shape)


def mix_row(documents: TextSet, samples: Sequence[int], shape: RowShape) -> tuple[Tensor, Tensor]:
    """The beginnings of several documents, a span each."""
    return framed([documents.tokens(i).cpu()[1:-1] for i in samples], shape)


def first_documents(members: Tensor, count: int, gen: Generator) -> list[int]:
    """`count` members in random order, beginning again when there are fewer."""
    order = members[torch.randperm(len(members), generator=gen)].tolist()
    return [order[i % len(order)] for i in range(count)]


def companions(documents: TextSet, members: Tensor, first: int, count: int, gen: Generator) -> list[int]:
    """`count` further members for the row of `first`: with the same label set if there are any, else of the class."""
    others = members[members != first]
    alike = others[(documents.targets[others] == documents.targets[first]).all(1)]
    pool = alike if len(alike) else others if len(others) else members
    return [int(pool[int(torch.randint(len(pool), (1,), generator=gen))]) for _ in range(count)]


def initial_class(
    init: str,
    label_init: str,
    documents: TextSet,
    label: int,
    members: Tensor,
    ipc: int,
    table: Tensor,
    shape: RowShape,
    gen: Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Data [ipc, S, D], mask [ipc, S] and targets [ipc, C] of one class: `random`, `mix` or `noise`.

    random: one real document a row; mix: spans of `factor` documents; noise: normal, with mean and deviation of the
    word table [V, D]. Targets: the union of the documents' labels, or one-hot.
    """
    first = first_documents(members, ipc, gen)
    sources = [[i] for i in first]
    if init == "mix":
        sources = [[i, *companions(documents, members, i, shape.spans - 1, gen)] for i in first]
        rows = [mix_row(documents, samples, shape) for samples in sources]
    else:
        rows = [random_row(documents, i, shape) for i in first]
    data = table[torch.stack([ids for ids, _ in rows])]
    mask = torch.stack([mask for _, mask in rows])
    if init == "noise":
        data = torch.randn(data.shape, generator=gen) * table.std() + table.mean()
        mask = torch.ones_like(mask)
    targets = torch.zeros(ipc, documents.targets.shape[1])
    if label_init == "onehot":
        targets[:, label] = 1.0
    else:
        targets = torch.stack([documents.targets[samples].amax(0) for samples in sources])
    return data, mask, targets
