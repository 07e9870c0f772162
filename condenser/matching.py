"""Class-by-class matching of any modality: what a rank's classes are matched against, and their rows' gradients."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from condenser.loop import Learner, LoopConfig, Rows, Score, learning_loop
from condenser.optimization import OptimizationConfig, make_optimizer
from condenser.synthetic_set import SyntheticSet
from config import ConfigError, LocalPath
from NCFM.cf_loss import CFLossFunc, Distance, MeanLossFunc, frequencies, real_embedding
from NCFM.sampling_net import SamplingNet
from utils.ddp import World
from utils.run_folder import RunFolder
from utils.sampling import ClassSampler
from utils.stopping import StopFlag
from utils.streams import generator
from utils.teachers import TeacherBank, update_feature_extractor


class MatchConfig(LoopConfig):
    """What is learned, against what."""

    ipc: int = Field(ge=1)
    num_premodel: int = Field(ge=1)
    teacher_model_epoch: int = Field(ge=1)  # the trained end of the teachers
    interpolation: tuple[float, float] = (0.0, 1.0)  # range of l: 0 = trained teacher, 1 = its random start
    init: Literal["random", "noise", "mix", "load"] = "mix"
    load_path: LocalPath | None = None
    dis_metrics: Literal["NCFM", "MMD"] = "NCFM"
    num_freqs: int = Field(4096, ge=1)
    freq_scales: tuple[float, ...] = (1.0,)  # deviations of the frequencies, dealt round-robin
    alpha_for_loss: float = Field(0.5, ge=0)
    beta_for_loss: float = Field(0.5, ge=0)
    match_weight: float = Field(300.0, ge=0)
    calib_weight: float = Field(1.0, ge=0)
    iter_calib: int = Field(1, ge=0)  # calibration steps an iteration
    joint_step: bool = False  # one step on the sum of both losses instead of one step for each
    sampling_net: bool = False
    refresh: int = Field(1, ge=1)  # iterations for which one teacher state and its real side are kept; 1 = exact
    teacher_states: int = Field(0, ge=0)  # 0: a new state at every refresh; n: n states, whose real sides are kept

    @model_validator(mode="after")
    def check(self) -> "MatchConfig":
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
class Losses:
    """Sum of a loss over the classes of one rank, and their number."""

    total: float
    count: int


@dataclass(frozen=True)
class RealSide:
    """The real classes under one teacher state: mean embeddings [L, K, M], or features to embed anew [L, B_c, D]."""

    t: Tensor  # frequencies [L, F, D], or the noise that the sampling net scales
    means: Tensor | None
    features: list[Tensor]


class Samples(Protocol):
    """The real training samples."""

    @property
    def targets(self) -> Tensor: ...

    def members(self) -> list[Tensor]: ...


Start = tuple[Tensor, Tensor | None, Tensor]  # data [n, ...], mask [n, ...] (text), targets [n, C]


class ClassCondenser(Learner):
    """The rows of this rank's classes, and how their gradients are made."""

    settings: MatchConfig

    def __init__(
        self,
        *,
        nclass_list: Sequence[Sequence[int]],
        device: torch.device | str,
        settings: MatchConfig,
        samples: Samples,
        networks: tuple[nn.Module, nn.Module],
        bank: TeacherBank,
        layers: int,
        width: int,
        batch_real: int,
        seed: int,
        world: World,
    ) -> None:
        """`nclass_list[r]`: classes of rank r; `networks`: two of the bank's kind; features are [layers, B, width]."""
        self.settings, self.bank, self.world, self.seed = settings, bank, world, seed
        self.device = torch.device(device)
        self.model_interval, self.model_final = (net.to(self.device).eval().requires_grad_(False) for net in networks)
        self.nclass_list = [list(part) for part in nclass_list]
        self.classes = self.nclass_list[world.rank]
        self.nclass = samples.targets.shape[1]
        self.every_class = sorted(c for part in self.nclass_list for c in part)
        self.sampler = ClassSampler(samples.members(), batch_real, seed)
        empty = [c for c in self.every_class if not len(self.sampler.members[c])]
        if empty:
            raise ConfigError(f"dataset: class {empty[0]} has no training sample: remove it or add some")
        data, self.mask, self.targets = self.start()
        self.data = data.to(self.device).requires_grad_()
        self.loss_func = settings.distance()
        self.feature_shape = (layers, settings.num_freqs, width)
        self.sampling = None
        if settings.sampling_net and settings.dis_metrics == "NCFM":
            self.sampling = SamplingNet(layers, settings.num_freqs, settings.freq_scales).to(self.device)
        self.key = -1
        self.kept: dict[int, RealSide] = {}

    @abstractmethod
    def start(self) -> Start:
        """This rank's initial rows."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """Unit of a relative learning rate."""

    @abstractmethod
    def assemble(self, data: Tensor, mask: Tensor | None, targets: Tensor) -> SyntheticSet:
        """The whole set from its gathered parts."""

    @abstractmethod
    def real_features(self, samples: Tensor) -> Tensor:
        """Features [L, U, D] of real samples [U] under `model_interval`, the same on every rank."""

    def embed_real(self, features: Tensor, t: Tensor) -> Tensor:
        """Mean embedding [L, M] of one class's features [L, B, D] at frequencies t [L, F, D]."""
        return real_embedding(features, t, self.loss_func)

    @property
    @abstractmethod
    def tile_size(self) -> int:
        """Classes in one forward pass, the same on any number of ranks."""

    @abstractmethod
    def as_input(self, rows: Tensor, where: slice) -> Any:
        """What a network reads of a tile: the rows at `where`, then empty ones, [n, ...] in all."""

    @abstractmethod
    def match_losses(self, x: Any, real: Tensor, t: Tensor) -> Tensor:
        """Matching loss [K] of a tile's classes against mean embeddings [L, K, M]."""

    @abstractmethod
    def calib_losses(self, x: Any, targets: Tensor) -> Tensor:
        """Calibration loss [K] of a tile's classes; targets [K * ipc, C]."""

    @property
    def row_owners(self) -> list[list[int]]:
        """Positions in the whole set of every rank's rows; rows are in class order."""
        place = {c: i * self.settings.ipc for i, c in enumerate(self.every_class)}
        return [[place[c] + i for c in part for i in range(self.settings.ipc)] for part in self.nclass_list]

    def loaded_rows(self, owner: Tensor, path: Path) -> Tensor:
        """Positions [n] of this rank's rows in a loaded set with owners [N]. Raises ConfigError for another ipc."""
        rows = [(owner == c).nonzero().flatten() for c in self.classes]
        for c, own in zip(self.classes, rows, strict=True):
            if len(own) != self.settings.ipc:
                raise ConfigError(f"{path}: class {c} has {len(own)} rows, condense.ipc is {self.settings.ipc}")
        return torch.cat(rows)

    # One iteration: teacher state and real side, then the two losses.

    def state_key(self, iteration: int) -> int:
        """Number of the teacher state of an iteration, and of its draw of real samples."""
        block, states = iteration // self.settings.refresh, self.settings.teacher_states
        return int(torch.randint(states, (1,), generator=generator(self.seed, "state", block))) if states else block

    def seen(self, done: int) -> dict[str, Any]:
        """The teacher state's number, and of every class of this rank its real samples."""
        key = self.state_key(done)
        return {"teacher_state": key, "classes": {c: self.sampler.draw(c, key).tolist() for c in self.classes}}

    def prepare(self, iteration: int) -> None:
        """Load the teacher state of an iteration and its real side, unless it is the one at hand."""
        key = self.state_key(iteration)
        if key == self.key:
            return
        self.key = key
        self.draw_state(key)
        if key not in self.kept:
            if not self.settings.teacher_states:
                self.kept.clear()
            self.kept[key] = self.real_side(key)

    def draw_state(self, key: int) -> None:
        """Set the networks to teacher state number `key`."""
        stream = generator(self.seed, "teacher", key)
        update_feature_extractor(self.bank, self.model_final, self.model_interval, stream, *self.settings.interpolation)

    @torch.no_grad()
    def real_side(self, key: int) -> RealSide:
        """Embed this rank's real classes with draw number `key` of samples and frequencies."""
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
        means = [self.embed_real(part, t) for part in own]
        return RealSide(t, torch.stack(means, 1) if means else None, [])

    def match(self) -> Losses:
        """Add the gradient of the matching loss to the rows; returns its sum over this rank's classes."""
        side, total = self.kept[self.key], 0.0
        t = side.t
        if self.sampling:
            scaled = self.sampling(side.t)
            t = scaled.detach().requires_grad_()
        for tile in self.tiles():
            if side.means is None:
                real = torch.stack([self.embed_real(side.features[i], t) for i in tile], 1)
            else:
                real = side.means[:, tile]
            real = nn.functional.pad(real, (0, 0, 0, self.tile_size - len(tile)))  # empty classes up to a full tile
            total += self.backward(self.match_losses(self.tile_input(tile), real, t)[: len(tile)])
        if self.sampling:
            grad = t.grad if t.grad is not None else torch.zeros_like(t)
            self.sampling.ascend(scaled, self.world.sum(grad))
        return Losses(total, len(self.classes))

    def calibrate(self) -> Losses:
        """Add the gradient of the calibration loss to the rows; returns its sum over this rank's classes."""
        total = 0.0
        for tile in self.tiles():
            targets = self.filled(self.targets[self.place(tile)].to(self.device))
            total += self.backward(self.calib_losses(self.tile_input(tile), targets)[: len(tile)])
        return Losses(total, len(self.classes))

    @staticmethod
    def backward(losses: Tensor) -> float:
        """Backward pass of summed class losses [k]; their sum as a number."""
        loss = losses.sum()
        loss.backward()
        return float(loss.detach())

    # A forward pass always has the same shape, so that a row's result does not depend on how many ranks there are.

    def even_tiles(self, most: int) -> int:
        """Classes in a pass when at most `most` fit: passes of even size over all classes."""
        passes = -(-len(self.every_class) // max(1, most))
        return -(-len(self.every_class) // passes)

    def tiles(self) -> list[list[int]]:
        """Positions of this rank's classes, a forward pass each."""
        places = list(range(len(self.classes)))
        return [places[i : i + self.tile_size] for i in range(0, len(places), self.tile_size)]

    def place(self, tile: list[int]) -> slice:
        """Rows of a tile's classes."""
        return slice(tile[0] * self.settings.ipc, (tile[-1] + 1) * self.settings.ipc)

    def filled(self, rows: Tensor) -> Tensor:
        """Rows [n, ...] of a tile, filled up with zeros to its full size."""
        short = self.tile_size * self.settings.ipc - len(rows)
        return torch.cat([rows, rows.new_zeros(short, *rows.shape[1:])]) if short else rows

    def tile_input(self, tile: list[int]) -> Any:
        """A tile as the networks read it."""
        where = self.place(tile)
        return self.as_input(self.filled(self.data[where]), where)

    # The loop's view of all this.

    def condense(
        self, optimization: OptimizationConfig, run: RunFolder, flag: StopFlag, score: Score, debug: bool = False
    ) -> dict[str, float]:
        """Learn the rows; see `learning_loop`."""
        self.optimization, self.rate = optimization, optimization.rate(self.scale)
        self.optimizer = make_optimizer(self.data, optimization, self.rate)
        self.ascent = None
        if self.sampling:
            self.ascent = torch.optim.Adam(self.sampling.parameters(), lr=optimization.lr_sampling_net)
        return learning_loop(self, run, flag, score, debug)

    @property
    def learned(self) -> dict[str, Rows]:
        """The samples."""
        return {"data": Rows(self.data, self.optimizer, self.row_owners)}

    def iterate(self, done: int) -> dict[str, float]:
        """One iteration: a step on each loss, or one on both."""
        s, optimizer = self.settings, self.optimizer
        self.prepare(done)
        share = 0.5 * (1 + math.cos(math.pi * done / s.niter)) if self.optimization.scheduler == "cosine" else 1.0
        for group in optimizer.param_groups:
            group["lr"] = self.rate * share
        optimizer.zero_grad()
        match = self.match()
        if not s.joint_step:
            optimizer.step()
            optimizer.zero_grad()
        calib = Losses(0.0, match.count)
        for i in range(s.iter_calib):
            calib = self.calibrate()
            if not s.joint_step or i + 1 == s.iter_calib:
                optimizer.step()
                optimizer.zero_grad()
        if s.joint_step and not s.iter_calib:
            optimizer.step()
        if self.ascent:
            self.ascent.step()
            self.ascent.zero_grad()
        return {"match": match.total, "calib": calib.total, "count": match.count}

    def gather(self) -> SyntheticSet | None:
        """The whole set on rank 0."""
        parts = (self.data, self.targets) if self.mask is None else (self.data, self.targets, self.mask)
        whole = [part for part in (self.world.gather_rows(part, self.row_owners) for part in parts) if part is not None]
        return self.assemble(whole[0], whole[2] if len(whole) > 2 else None, whole[1]) if whole else None

    def logged(self) -> dict[str, float]:
        """Scales of the sampling net."""
        if not self.sampling:
            return {}
        scales = self.sampling.scales().detach()
        return {
            "scale_low": float(scales.min()), "scale_mean": float(scales.mean()), "scale_high": float(scales.max()),
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Of the sampling net."""
        if not self.sampling or not self.ascent:
            return {}
        return {"sampling": self.sampling.state_dict(), "ascent": self.ascent.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Of the sampling net."""
        if self.sampling and self.ascent:
            self.sampling.load_state_dict(state["sampling"])
            self.ascent.load_state_dict(state["ascent"])
