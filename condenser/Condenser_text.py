"""Condensation of text: what this rank's classes are matched against, and the gradients of their rows."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from condenser.compute_loss_text import compute_calib_loss, compute_match_loss
from condenser.loop import LoopConfig, Losses, Problem, condense_loop
from condenser.synthetic_set import SyntheticSet, check_compatible, load_synthetic
from condenser.synthetic_text import RowShape, decode, initial_class
from config import ConfigError, LocalPath
from NCFM.cf_loss import CFLossFunc, Distance, MeanLossFunc, frequencies
from NCFM.NCFM_text import real_embedding
from NCFM.sampling_net import SamplingNet
from utils.ddp import World
from utils.encoder import TextInput
from utils.sampling import ClassSampler, buckets
from utils.streams import generator
from utils.teachers import TeacherBank, update_feature_extractor
from utils.utils_text import TextSet


class CondenseConfig(LoopConfig):
    """What is learned, against what."""

    ipc: int = Field(ge=1)
    num_premodel: int = Field(ge=1)
    teacher_model_epoch: int = Field(ge=1)  # the trained end of the teachers
    interpolation: tuple[float, float] = (0.0, 1.0)  # range of l: 0 = trained teacher, 1 = its random start
    init: Literal["random", "noise", "mix", "load"] = "mix"
    load_path: LocalPath | None = None
    label_init: Literal["multihot", "onehot"] = "multihot"
    factor: int = Field(2, ge=1)  # real documents in a row of `mix`
    decode_type: Literal["single", "whole"] = "single"  # single: every span of a row is a sample; whole: the row is
    dis_metrics: Literal["NCFM", "MMD"] = "NCFM"
    num_freqs: int = Field(4096, ge=1)
    freq_scales: tuple[float, ...] = (1.0,)  # deviations of the frequencies, dealt round-robin
    alpha_for_loss: float = Field(0.5, ge=0)
    beta_for_loss: float = Field(0.5, ge=0)
    match_weight: float = Field(300.0, ge=0)
    calib_weight: float = Field(1.0, ge=0)
    sampling_net: bool = False
    refresh: int = Field(1, ge=1)  # iterations for which one teacher state and its real side are kept; 1 = exact
    teacher_states: int = Field(0, ge=0)  # 0: a new state at every refresh; n: n states, whose real sides are kept
    token_budget: int = Field(16384, ge=64)  # tokens of one forward pass

    @model_validator(mode="after")
    def check(self) -> "CondenseConfig":
        """Cross-field rules."""
        if self.init == "load" and self.load_path is None:
            raise ValueError("load_path: required for init: load; name a syn_data_*.pth")
        if self.alpha_for_loss == self.beta_for_loss == 0:
            raise ValueError("alpha_for_loss: 0 and beta_for_loss: 0 leave no loss; set one above 0")
        if not self.freq_scales or min(self.freq_scales) <= 0:
            raise ValueError(f"freq_scales: {self.freq_scales} must be numbers above 0")
        a, b = self.interpolation
        if not 0 <= a <= b <= 1:
            raise ValueError(f"interpolation: {self.interpolation} must be two rising numbers between 0 and 1")
        return self

    def distance(self) -> Distance:
        """The distance that dis_metrics names."""
        return CFLossFunc(self.alpha_for_loss, self.beta_for_loss) if self.dis_metrics == "NCFM" else MeanLossFunc()


@dataclass(frozen=True)
class RealSide:
    """The real classes under one teacher state: mean embeddings [L, K, M], or features to embed anew [L, B_c, D]."""

    t: Tensor  # frequencies [L, F, D], or the noise that the sampling net scales
    means: Tensor | None
    features: list[Tensor]


def table_name(table: Tensor) -> str:
    """Short name of a word table [V, D]."""
    return hashlib.sha256(table.contiguous().numpy().tobytes()).hexdigest()[:16]


class Condenser(Problem):
    """The rows of this rank's classes, and how their gradients are made."""

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
        """`nclass_list[r]`: classes of rank r; `networks`: two encoders of the bank's kind; `frame`: [CLS], [SEP]."""
        self.settings, self.documents, self.bank, self.world = settings, documents, bank, world
        self.device, self.seed, self.multilabel, self.dataset = (
            torch.device(device),
            seed,
            multilabel,
            dataset,
        )
        self.model_interval, self.model_final = (net.to(self.device).eval().requires_grad_(False) for net in networks)
        self.nclass_list = [list(part) for part in nclass_list]
        self.classes = self.nclass_list[world.rank]
        self.nclass = documents.targets.shape[1]
        self.every_class = sorted(c for part in self.nclass_list for c in part)
        self.table, self.max_length = table.cpu(), max_length
        self.sampler = ClassSampler(documents.members(), batch_real, seed)
        empty = [c for c in self.every_class if not len(self.sampler.members[c])]
        if empty:
            raise ConfigError(f"dataset: class {empty[0]} has no training document: remove it or add documents")
        factor = settings.factor
        if settings.decode_type == "single" and (max_length % factor or max_length // factor < 3):
            raise ConfigError(
                f"condense.factor: {factor} must divide network.max_length: {max_length} into spans of >= 3"
            )
        self.spans = factor if settings.decode_type == "single" else 1
        self.shape = RowShape(max_length, factor, settings.decode_type == "single", *frame, documents.pad)
        data, self.mask, self.targets = self.start()
        self.data = data.to(self.device).requires_grad_()
        self.loss_func = settings.distance()
        layers = max(1, len(getattr(self.model_final, "layers", ())))
        self.feature_shape = (layers, settings.num_freqs, table.shape[1])
        self.sampling = None
        if settings.sampling_net and settings.dis_metrics == "NCFM":
            self.sampling = SamplingNet(layers, settings.num_freqs, settings.freq_scales).to(self.device)
        self.key = -1
        self.kept: dict[int, RealSide] = {}

    @property
    def row_owners(self) -> list[list[int]]:
        """Positions in the whole set of every rank's rows; rows are in class order."""
        place = {c: i * self.settings.ipc for i, c in enumerate(self.every_class)}
        return [[place[c] + i for c in part for i in range(self.settings.ipc)] for part in self.nclass_list]

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
        found = load_synthetic(path)
        check_compatible(found, path, shape, self.nclass, table_name(self.table))
        rows = [(found.owner == c).nonzero().flatten() for c in self.classes]
        for c, own in zip(self.classes, rows, strict=True):
            if len(own) != self.settings.ipc:
                raise ConfigError(f"{path}: class {c} has {len(own)} rows, condense.ipc is {self.settings.ipc}")
        which = torch.cat(rows)
        mask = found.attention_mask
        mask = torch.ones(len(found.data), shape[0], dtype=torch.uint8) if mask is None else mask
        targets = found.targets
        if targets.ndim == 1:
            targets = nn.functional.one_hot(targets, self.nclass)
        return found.data[which].float(), mask[which].to(torch.uint8), targets[which].float()

    # One iteration: teacher state and real side, then the two losses.

    def prepare(self, iteration: int) -> None:
        """Load the teacher state of an iteration and its real side, unless it is the one at hand."""
        s, block = self.settings, iteration // self.settings.refresh
        key = block
        if s.teacher_states:
            key = int(torch.randint(s.teacher_states, (1,), generator=generator(self.seed, "state", block)))
        if key == self.key:
            return
        self.key = key
        stream = generator(self.seed, "teacher", key)
        update_feature_extractor(self.bank, self.model_final, self.model_interval, stream, *s.interpolation)
        if key not in self.kept:
            if not s.teacher_states:
                self.kept.clear()
            self.kept[key] = self.real_side(key)

    @torch.no_grad()
    def real_side(self, key: int) -> RealSide:
        """Embed this rank's real classes with draw number `key` of documents and frequencies."""
        gen = generator(self.seed, "frequencies", key, device=self.device)
        like = self.data.detach()
        scales = (1.0,) if self.sampling else self.settings.freq_scales
        t = frequencies(self.feature_shape, scales, gen, like)
        draws = {c: self.sampler.draw(c, key) for c in self.every_class}
        unique = torch.cat(list(draws.values())).unique()
        features = self.real_features(unique)  # [L, U, D]
        own = [features[:, torch.searchsorted(unique, draws[c]).to(self.device)] for c in self.classes]
        if self.sampling:
            return RealSide(t, None, own)
        means = [real_embedding(part, t, self.loss_func) for part in own]
        return RealSide(t, torch.stack(means, 1) if means else None, [])

    def real_features(self, samples: Tensor) -> Tensor:
        """Features [L, U, D] of documents [U]: computed once each, by length, shared out over the ranks."""
        lengths = self.documents.lengths[samples].tolist()
        parts = buckets(lengths, self.settings.token_budget)
        features = self.data.new_zeros(self.feature_shape[0], len(samples), self.feature_shape[2])
        for i in self.world.share([float(sum(lengths[j] for j in part)) for part in parts]):
            rows = self.documents.input(samples[parts[i]], self.device)
            features[:, parts[i]] = self.model_interval(rows).features.to(features.dtype)
        return self.world.sum(features) if self.world.size > 1 else features

    def match(self) -> Losses:
        """Add the gradient of the matching loss to the rows; returns its sum over this rank's classes."""
        side, total = self.kept[self.key], 0.0
        t = side.t
        if self.sampling:
            scaled = self.sampling(side.t)
            t = scaled.detach().requires_grad_()
        for tile in self.tiles():
            rows, _ = self.tile_rows(tile)
            if side.means is None:
                real = torch.stack([real_embedding(side.features[i], t, self.loss_func) for i in tile], 1)
            else:
                real = side.means[:, tile]
            loss = compute_match_loss(self.model_interval, rows, pad_classes(real, self.tile_size), t, self.loss_func,
                                      self.settings.match_weight)  # fmt: skip
            total += self.backward(loss[: len(tile)])
        if self.sampling:
            grad = t.grad if t.grad is not None else torch.zeros_like(t)
            self.sampling.ascend(scaled, self.world.sum(grad))
        return Losses(total, len(self.classes))

    def calibrate(self) -> Losses:
        """Add the gradient of the calibration loss to the rows; returns its sum over this rank's classes."""
        total = 0.0
        for tile in self.tiles():
            rows, targets = self.tile_rows(tile)
            loss = compute_calib_loss(self.model_final, rows, targets, self.tile_size, self.multilabel,
                                      self.settings.calib_weight)  # fmt: skip
            total += self.backward(loss[: len(tile)])
        return Losses(total, len(self.classes))

    @staticmethod
    def backward(losses: Tensor) -> float:
        """Backward pass of summed class losses [k]; their sum as a number."""
        loss = losses.sum()
        loss.backward()
        return float(loss.detach())

    # A forward pass always has the same shape, so that a row's result does not depend on how many ranks there are.

    @property
    def tile_size(self) -> int:
        """Classes in one forward pass: within the token budget, in passes of even size over all classes."""
        most = max(1, self.settings.token_budget // (self.settings.ipc * self.max_length))
        passes = -(-len(self.every_class) // most)
        return -(-len(self.every_class) // passes)

    def tiles(self) -> list[list[int]]:
        """Positions of this rank's classes, a forward pass each."""
        places = list(range(len(self.classes)))
        return [places[i : i + self.tile_size] for i in range(0, len(places), self.tile_size)]

    def tile_rows(self, tile: list[int]) -> tuple[TextInput, Tensor]:
        """Decoded rows and targets of a tile, filled up with empty rows to its full size."""
        ipc = self.settings.ipc
        where = slice(tile[0] * ipc, (tile[-1] + 1) * ipc)
        data, mask = self.data[where], self.mask[where].to(self.device)
        targets = self.targets[where].to(self.device)
        short = self.tile_size * ipc - len(data)
        if short:
            blank = torch.zeros(short, self.max_length, dtype=mask.dtype, device=self.device)
            blank[:, :: self.max_length // self.spans] = 1  # one position a span, as attention needs one
            data = torch.cat([data, data.new_zeros(short, *data.shape[1:])])
            mask = torch.cat([mask, blank])
            targets = torch.cat([targets, targets.new_zeros(short, targets.shape[1])])
        data, mask = decode(data, mask, self.spans)
        return TextInput(data, mask.long()), targets.repeat_interleave(self.spans, 0)

    def assemble(self, data: Tensor, mask: Tensor, targets: Tensor) -> SyntheticSet:
        """The whole set from its parts, in class order."""
        s = self.settings
        owner = torch.tensor(self.every_class).repeat_interleave(s.ipc)
        meta: dict[str, str | int | float] = {
            "dataset": self.dataset, "decode_type": s.decode_type, "factor": s.factor, "ipc": s.ipc,
            "word_table": table_name(self.table),
        }  # fmt: skip
        return SyntheticSet(data, targets, owner, mask, meta)

    condense = condense_loop


def pad_classes(real: Tensor, size: int) -> Tensor:
    """Mean embeddings [L, k, M] filled up with zeros to [L, size, M]."""
    return nn.functional.pad(real, (0, 0, 0, size - real.shape[1]))
