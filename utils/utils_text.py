"""Text data as tensors: a corpus, tokenised once, read by sample id in batches no longer than they need to be."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import ConfigError
from utils.corpus import Corpus, Split, with_validation
from utils.data_config import DataConfig
from utils.encoder import TextInput
from utils.text_readers import read_corpus

log = logging.getLogger("distill_lab")


class DatasetConfig(DataConfig):
    """Which documents."""

    is_multilabel: bool = True


@dataclass(frozen=True)
class TextSet:
    """Tokenised documents: token ids end to end, and their labels."""

    flat: Tensor  # [tokens] int32, [CLS] ... [SEP] of every document
    starts: Tensor  # [N]
    lengths: Tensor  # [N]
    targets: Tensor  # [N, C] float multi-hot
    pad: int

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device) -> "TextSet":
        """The same documents with their token ids on `device`."""
        return TextSet(self.flat.to(device), self.starts, self.lengths, self.targets, self.pad)

    def tokens(self, sample: int) -> Tensor:
        """Token ids [S] of one document, [CLS] and [SEP] included."""
        return self.flat[int(self.starts[sample]) : int(self.starts[sample] + self.lengths[sample])]

    def input(self, samples: Tensor, device: torch.device) -> TextInput:
        """Documents [B] as ids [B, S] and mask [B, S], S the longest of them."""
        lengths = self.lengths[samples]
        span = torch.arange(int(lengths.max()))
        mask = span < lengths[:, None]  # [B, S]
        places = (self.starts[samples][:, None] + span).clamp_max(len(self.flat) - 1)
        where = self.flat.device
        mask = mask.to(where)
        ids = torch.where(mask, self.flat[places.to(where)].long(), self.pad)
        return TextInput(ids.to(device), mask.long().to(device))

    def batch(self, samples: Tensor, device: torch.device) -> tuple[TextInput, Tensor]:
        """Documents [B] with their targets [B, C]."""
        return self.input(samples, device), self.targets[samples].to(device)

    def subset(self, samples: Tensor) -> "TextSet":
        """These documents only (their ids stay where they are)."""
        return TextSet(self.flat, self.starts[samples], self.lengths[samples], self.targets[samples], self.pad)

    def members(self) -> list[Tensor]:
        """Sample ids of every class; a document belongs to each of its labels."""
        return [column.nonzero().flatten() for column in self.targets.T]

    @property
    def data_bytes(self) -> int:
        """Bytes of the documents as uint16 token ids."""
        return 2 * int(self.lengths.sum())

    @property
    def nbytes(self) -> int:
        """Bytes of the documents and of their packed multi-hot labels."""
        return self.data_bytes + len(self) * -(-self.targets.shape[1] // 8)


def tokenise(split: Split, nclass: int, tokenizer: Any, max_length: int) -> TextSet:
    """Documents cut to `max_length` tokens, [CLS] and [SEP] included."""
    ids = tokenizer(split.texts, truncation=True, max_length=max_length)["input_ids"]
    lengths = torch.tensor([len(row) for row in ids])
    targets = torch.zeros(len(ids), nclass)
    for row, labels in enumerate(split.labels):
        targets[row, list(labels)] = 1.0
    return TextSet(
        flat=torch.tensor([token for row in ids for token in row], dtype=torch.int32),
        starts=lengths.cumsum(0) - lengths,
        lengths=lengths,
        targets=targets,
        pad=int(tokenizer.pad_token_id),
    )


def load_corpus(dataset: DatasetConfig, cache_dir: Path) -> Corpus:
    """The corpus with a validation part, checked against the config. Raises ConfigError."""
    corpus = with_validation(read_corpus(dataset.dataset, dataset.data_dir, cache_dir), dataset.val_fraction, seed=0)
    if len(corpus.classes) != dataset.nclass:
        raise ConfigError(f"dataset.nclass: {dataset.nclass}, but {corpus.name} has {len(corpus.classes)} classes")
    if corpus.multilabel and not dataset.is_multilabel:
        raise ConfigError(f"dataset.is_multilabel: false, but {corpus.name} has documents with several labels")
    return corpus


def get_loader(corpus: Corpus, tokenizer: Any, max_length: int) -> tuple[TextSet, TextSet, TextSet]:
    """Train, validation and test documents as tensors."""
    if corpus.val is None:
        raise ValueError("get_loader: the corpus has no validation part; see utils.corpus.with_validation")
    parts: Sequence[Split] = (corpus.train, corpus.val, corpus.test)
    train, val, test = (tokenise(part, len(corpus.classes), tokenizer, max_length) for part in parts)
    return train, val, test
