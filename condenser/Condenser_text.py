"""Condensation of text: rows of word embeddings, matched under encoders in passes within a token budget."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from condenser.compute_loss_text import compute_calib_loss, compute_match_loss
from condenser.matching import ClassCondenser, MatchConfig
from condenser.synthetic_set import SyntheticSet, checked, load_synthetic
from condenser.synthetic_text import RowShape, decode, initial_class
from config import ConfigError
from utils.ddp import World
from utils.encoder import TextInput
from utils.sampling import buckets
from utils.streams import generator
from utils.teachers import TeacherBank
from utils.utils_text import TextSet


class CondenseConfig(MatchConfig):
    """What is learned, against what; the part that is text."""

    label_init: Literal["multihot", "onehot"] = "multihot"
    factor: int = Field(2, ge=1)  # real documents in a row of `mix`
    decode_type: Literal["single", "whole"] = "single"  # single: every span of a row is a sample; whole: the row is
    token_budget: int = Field(16384, ge=64)  # tokens of one forward pass


def table_name(table: Tensor) -> str:
    """Short name of a word table [V, D]."""
    return hashlib.sha256(table.contiguous().numpy().tobytes()).hexdigest()[:16]


class Condenser(ClassCondenser):
    """Text rows of this rank's classes."""

    settings: CondenseConfig

    def __init__(
        self,
        *,
        nclass_list: Sequence[Sequence[int]],
        device: torch.device | str,
        settings: CondenseConfig,
        documents: TextSet,
        networks: tuple[nn.Module, nn.Module],
        bank: TeacherBank,
        table: Tensor,
        frame: tuple[int, int],
        max_length: int,
        batch_real: int,
        multilabel: bool,
        seed: int,
        world: World,
        dataset: str,
    ) -> None:
        """`table` [V, D]: the word table; `frame`: ids of [CLS] and [SEP]; the rest as in ClassCondenser."""
        factor = settings.factor
        if settings.decode_type == "single" and (max_length % factor or max_length // factor < 3):
            raise ConfigError(
                f"condense.factor: {factor} must divide network.max_length: {max_length} into spans of >= 3"
            )
        self.documents, self.multilabel, self.dataset = documents, multilabel, dataset
        self.table, self.max_length = table.cpu(), max_length
        self.spans = factor if settings.decode_type == "single" else 1
        self.shape = RowShape(max_length, factor, settings.decode_type == "single", *frame, documents.pad)
        super().__init__(
            nclass_list=nclass_list, device=device, settings=settings, samples=documents, networks=networks, bank=bank,
            layers=max(1, len(getattr(networks[1], "layers", ()))), width=table.shape[1], batch_real=batch_real,
            seed=seed, world=world,
        )  # fmt: skip

    @property
    def row_mask(self) -> Tensor:
        """Attention mask [n, S] of the rows."""
        if self.mask is None:
            raise ValueError("Condenser: text rows have a mask")
        return self.mask

    @property
    def scale(self) -> float:
        """Standard deviation of the word table: the unit of a relative learning rate."""
        return float(self.table.std())

    def start(self) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's initial data [n, S, D], mask [n, S] and targets [n, C]."""
        s = self.settings
        shape = (self.max_length, self.table.shape[1])
        if not self.classes:
            return (
                torch.zeros(0, *shape),
                torch.zeros(0, shape[0], dtype=torch.uint8),
                torch.zeros(0, self.nclass),
            )
        if s.init == "load" and s.load_path:
            return self.load_condensed_data(s.load_path, shape)
        parts = [
            initial_class(
                s.init, s.label_init, self.documents, c, self.sampler.members[c], s.ipc, self.table, self.shape,
                generator(self.seed, "init", c),
            )
            for c in self.classes
        ]  # fmt: skip
        data, mask, targets = (torch.cat(list(part)) for part in zip(*parts, strict=True))
        return data, mask, targets

    def load_condensed_data(self, path: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's rows of a saved set. Raises ConfigError where they do not fit."""
        found = checked(load_synthetic(path), path, shape, self.nclass, table_name(self.table))
        which = self.loaded_rows(found.owner, path)
        mask = found.attention_mask
        mask = torch.ones(len(found.data), shape[0], dtype=torch.uint8) if mask is None else mask
        return found.data[which].float(), mask[which].to(torch.uint8), found.targets[which]

    def real_features(self, samples: Tensor) -> Tensor:
        """Features [L, U, D] of documents [U]: computed once each, by length, shared out over the ranks."""
        lengths = self.documents.lengths[samples].tolist()
        parts = buckets(lengths, self.settings.token_budget)
        features = self.data.new_zeros(self.feature_shape[0], len(samples), self.feature_shape[2])
        for i in self.world.share([float(sum(lengths[j] for j in part)) for part in parts]):
            rows = self.documents.input(samples[parts[i]], self.device)
            features[:, parts[i]] = self.model_interval(rows).features.to(features.dtype)
        return self.world.sum(features) if self.world.size > 1 else features

    @property
    def tile_size(self) -> int:
        """Classes in one forward pass, within the token budget."""
        return self.even_tiles(self.settings.token_budget // (self.settings.ipc * self.max_length))

    def as_input(self, rows: Tensor, where: slice) -> TextInput:
        """Decoded rows and their mask; an empty row keeps one position a span, as attention needs one."""
        mask = self.row_mask[where].to(self.device)
        blank = torch.zeros(len(rows) - len(mask), self.max_length, dtype=mask.dtype, device=self.device)
        blank[:, :: self.max_length // self.spans] = 1
        data, mask = decode(rows, torch.cat([mask, blank]), self.spans)
        return TextInput(data, mask.long())

    def match_losses(self, x: TextInput, real: Tensor, t: Tensor) -> Tensor:
        """Matching loss [K] at the wanted layers."""
        return compute_match_loss(self.model_interval, x, real, t, self.loss_func, self.settings.match_weight)

    def calib_losses(self, x: TextInput, targets: Tensor) -> Tensor:
        """Calibration loss [K]; every sample of a row has the row's labels."""
        targets = targets.repeat_interleave(self.spans, 0)
        return compute_calib_loss(
            self.model_final, x, targets, self.tile_size, self.multilabel, self.settings.calib_weight
        )

    def assemble(self, data: Tensor, mask: Tensor | None, targets: Tensor) -> SyntheticSet:
        """The whole set from its parts, in class order."""
        s = self.settings
        owner = torch.tensor(self.every_class).repeat_interleave(s.ipc)
        meta: dict[str, str | int | float] = {
            "dataset": self.dataset, "decode_type": s.decode_type, "factor": s.factor, "ipc": s.ipc,
            "word_table": table_name(self.table),
        }  # fmt: skip
        return SyntheticSet(data, targets, owner, mask, meta)
