"""Images, soft labels, feature labels and the step size of a student, learned by matching trajectories of experts: MTT
(Cazenavette et al., CVPR 2022), and with a growing window of starts, soft labels and a guard DATM (Guo et al., ICLR
2024). The student learns from the set by CE(f(x), y) + lbd * MSE(phi(E_L(x)), F) at its own parameters.

An iteration draws `starts` experts, each with an epoch to start at, and moves the set once by the mean of their
gradients. With as many ranks as starts or fewer, ranks share out the starts, otherwise the samples of a student's step:
both only change the order of sums. More starts are another estimator: less noise for as much more work.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from condenser.feature_labels import (
    FeatureConfig,
    Scope,
    Shape,
    discriminability,
    expand,
    feature_logits,
    label_optimizer,
    labelled_loss,
    supervised_contrast,
)
from condenser.loop import Learner, Rows, SetConfig
from condenser.synthetic_set import Note, SyntheticSet
from condenser.trajectory import (
    Match,
    Memory,
    Mode,
    StepLoss,
    flat_network,
    flat_parameters,
    match_trajectory,
    micro_batches,
    raw_step_size,
    set_parameters,
    start_window,
    step_size,
    trajectory_memory,
)
from config import ConfigError
from utils.augment import AugType, draw_augmentation
from utils.ddp import World
from utils.expert_buffers import ExpertBuffer
from utils.image_networks import ImageNetwork
from utils.losses import task_loss
from utils.normaliser import Normaliser
from utils.streams import generator

CPU_GRAPH, GPU_GRAPH = 150 * 10**6, 2 * 10**9  # bytes of a micro-batch's graph, by device
LEAST = 1e-8  # probability of a soft label that starts as 0


class TrajectoryConfig(SetConfig):
    """The student's steps, the expert's, and how what the student sees is learned."""

    niter: int = Field(5000, ge=0)
    lr_img: float = Field(1000.0, gt=0)
    aug_type: AugType = "color/crop/cutout/flip/scale/rotate"
    syn_steps: int = Field(20, ge=1)  # of the student
    batch_syn: int | None = Field(None, ge=1)  # samples of one of them; None: the whole set
    expert_epochs: int = Field(2, ge=1)  # of the expert, which the student's steps should be worth
    lr_teacher: float = Field(0.01, gt=0)  # the student's step size as it starts
    lr_lr: float = Field(1e-5, ge=0)  # of learning it; 0: it stays
    mom_lr: float = Field(0.5, ge=0, lt=1)
    min_start_epoch: int = Field(0, ge=0)  # students start where an expert was after so many epochs ...
    max_start_epoch: int = Field(20, ge=1)  # ... or more, but fewer than these
    current_max_start_epoch: int | None = Field(None, ge=1)  # at first; None: max_start_epoch
    expansion_end_epoch: int = Field(0, ge=0)  # iteration by which it has grown to max_start_epoch
    soft_labels: bool = False  # learn label logits, too
    lr_y: float = Field(2.0, gt=0)
    mom_y: float = Field(0.9, ge=0, lt=1)
    threshold: float | None = Field(None, gt=0)  # a start whose loss is over it moves nothing
    starts: int = Field(1, ge=1)  # experts of an iteration
    mode: Mode = "exact"
    micro_batch: int | None = Field(None, ge=1)  # samples whose graph lives at once; None: CPU_GRAPH or GPU_GRAPH
    memory_budget: float = Field(2.0, ge=0)  # GB; the last steps' graphs that fit in are kept, not computed again

    @model_validator(mode="after")
    def check_window(self) -> "TrajectoryConfig":
        """The window of starts is never empty."""
        if not self.min_start_epoch < self.first_window <= self.max_start_epoch:
            raise ValueError(
                f"min_start_epoch: {self.min_start_epoch}, current_max_start_epoch: {self.first_window} and "
                f"max_start_epoch: {self.max_start_epoch} must rise (the last two may be equal)"
            )
        return self

    @property
    def first_window(self) -> int:
        """The end of the window of starts in the first iteration."""
        return self.max_start_epoch if self.current_max_start_epoch is None else self.current_max_start_epoch


@dataclass(frozen=True)
class Start:
    """One student of an iteration: where it starts and should end, and what its steps see."""

    number: tuple[int, int]  # iteration, start
    theta: Tensor  # [P]
    target: Tensor  # [P]
    batches: list[Tensor]  # of every step, samples [B]


class TrajectoryCondenser(Learner):
    """Images [N, C, H, W] as networks see them, logits of soft labels [N, classes], feature labels [N or classes, K,
    *form] and a step size; every rank has the whole set."""

    settings: TrajectoryConfig

    def __init__(
        self,
        *,
        settings: TrajectoryConfig,
        feature: FeatureConfig | None,
        start: SyntheticSet,
        normaliser: Normaliser,
        network: ImageNetwork,
        map_shape: Shape,
        experts: ExpertBuffer,
        seed: int,
        world: World,
        meta: dict[str, Note],
    ) -> None:
        """`start`: the set as it begins, in class order; `network`: of the experts' kind, with maps (C, H, W) at the
        labelled layer. Raises ConfigError for batch norm and for epochs that the experts have not."""
        self.settings, self.feature, self.normaliser, self.experts = settings, feature, normaliser, experts
        self.map_shape, self.seed, self.world, self.meta = map_shape, seed, world, meta
        self.net = network.to(world.device).eval()
        if any(isinstance(module, _BatchNorm) for module in self.net.modules()):
            raise ConfigError(
                "network.norm_type: batch, but statistics of a batch are not those of its micro-batches, and experts "
                "keep none: set instance"
            )
        last = settings.max_start_epoch - 1 + settings.expert_epochs
        for epoch in (settings.min_start_epoch, last):
            experts.check_epoch(epoch)
        device = world.device
        self.owner = start.owner.to(device)
        _, self.class_places = self.owner.unique(return_inverse=True)
        self.scope: Scope = "sample" if feature is None else feature.scope
        self.data = normaliser(start.data).to(device).requires_grad_(settings.learn_images)
        self.targets = start.targets.to(device)
        self.logits = start.targets.clamp_min(LEAST).log().to(device).requires_grad_(settings.soft_labels)
        raw = raw_step_size(settings.lr_teacher, settings.lr_teacher)
        # In float64: rates of 1e-7 would be lost.
        self.raw_rate = torch.tensor([raw], dtype=torch.float64, device=device).requires_grad_(settings.lr_lr > 0)
        sgd = torch.optim.SGD
        self.rows: dict[str, Rows] = {}
        if settings.learn_images:
            self.rows["data"] = Rows(self.data, sgd([self.data], settings.lr_img, settings.mom_img), None)
        if settings.soft_labels:
            self.rows["logits"] = Rows(self.logits, sgd([self.logits], settings.lr_y, settings.mom_y), None)
        self.labels: Tensor | None = None
        if feature is not None and start.features is not None:
            self.labels = start.features.transpose(0, 1).contiguous().to(device).requires_grad_(feature.learn)
            if feature.learn:
                optimizer = label_optimizer(self.labels, feature, self.batch)
                self.rows["features"] = Rows(self.labels, optimizer, None)
        if settings.lr_lr:
            self.rows["rate"] = Rows(self.raw_rate, sgd([self.raw_rate], settings.lr_lr, settings.mom_lr), None)
        self.leaves = [part.own for name, part in self.rows.items() if name != "rate"]
        self.most = settings.micro_batch or self.fitting_samples()
        tensors = self.measure_memory(self.micro(self.batch) or [slice(0, 1)])
        self.memory = tensors if device.type == "cuda" else tensors.resident()
        budget = int(1e9 * settings.memory_budget)
        self.keep = self.memory.keep(budget)

    @property
    def learned(self) -> dict[str, Rows]:
        """What of images, label logits, feature labels and step size is learned."""
        return self.rows

    @property
    def batch(self) -> int:
        """Samples of a student's step."""
        return min(self.settings.batch_syn or len(self.owner), len(self.owner))

    @property
    def alpha(self) -> Tensor:
        """The student's step size []."""
        return step_size(self.raw_rate, self.settings.lr_teacher)[0]

    @property
    def shares_samples(self) -> bool:
        """Whether ranks share out the samples of a step, there being fewer starts than ranks."""
        return self.settings.starts < self.world.size

    def micro(self, size: int) -> list[slice]:
        """A batch in this rank's micro-batches, or in all where ranks share out the starts."""
        if not self.shares_samples:
            return micro_batches(size, self.most)
        parts = micro_batches(size, max(1, min(self.most, -(-size // self.world.size))))
        return parts[self.world.rank :: self.world.size]

    def iterate(self, done: int) -> dict[str, float]:
        """A step by the mean gradient of the students that start in this iteration."""
        s, world = self.settings, self.world
        found, skipped = {"match": 0.0, "alpha": 0.0, "count": 0.0}, 0
        sums = [torch.zeros_like(leaf) for leaf in (*self.leaves, self.raw_rate)]
        mine = self.own_starts
        for number in mine:
            start = self.draw(done, number)
            match = self.match(start)
            found["match"] += match.loss
            found["alpha"] += float(self.alpha.detach())
            found["count"] += 1
            if match.gradients is None:
                skipped += 1
                continue
            for whole, share in zip(sums, match.gradients, strict=True):
                whole += share.to(whole)
            if world.main or not self.shares_samples:
                self.add_label_objective(sums, start)
        moved = torch.tensor([found["count"] - skipped], dtype=torch.float64)
        if world.size > 1:
            for whole in sums:
                world.sum(whole)
            if not self.shares_samples:
                world.sum(moved)
        if moved and not all(bool(whole.isfinite().all()) for whole in sums):
            found["match"] = math.nan  # the loop says so, before anything has moved
        elif moved:
            self.move([whole / moved.to(whole) for whole in sums])
        return found if s.threshold is None else found | {"skipped": float(skipped)}

    def match(self, start: Start) -> Match:
        """Loss of a student and the gradients of the leaves and of the step size."""
        s, world = self.settings, self.world
        return match_trajectory(
            self.step_loss(start), start.theta, start.target, self.alpha.detach().to(start.theta), self.leaves,
            [self.rows_of(ids) for ids in start.batches], [self.micro(len(ids)) for ids in start.batches],
            s.mode, self.keep, math.inf if s.threshold is None else s.threshold,
            world.sum if self.shares_samples and world.size > 1 else Tensor.detach,
        )  # fmt: skip

    def move(self, slopes: list[Tensor]) -> None:
        """One step of all that is learned, by gradients of the leaves and of the step size."""
        *leaves, rate = slopes
        for leaf, slope in zip(self.leaves, leaves, strict=True):
            leaf.grad = slope
        if "rate" in self.rows:
            (self.raw_rate.grad,) = torch.autograd.grad(self.alpha, self.raw_rate, rate[0])
        for part in self.rows.values():
            part.optimizer.step()
            part.own.grad = None

    @property
    def own_starts(self) -> Sequence[int]:
        """Numbers of the students of an iteration that this rank follows."""
        every = self.settings.starts
        return range(every) if self.shares_samples else self.world.share([1.0] * every)

    def seen(self, done: int) -> dict[str, Any]:
        """Of every student the expert, its epoch and, by step, the learned samples and their classes."""
        drawn = [self.choose(done, number) for number in self.own_starts]
        return {
            "starts": [
                {"expert": expert, "epoch": epoch, "samples": [ids.tolist() for ids in batches],
                 "classes": [self.owner[ids].tolist() for ids in batches]}
                for expert, epoch, batches in drawn
            ]
        }  # fmt: skip

    def draw(self, done: int, number: int) -> Start:
        """A student of an iteration, with the snapshots that it lies between."""
        expert, epoch, batches = self.choose(done, number)
        theta, target = (
            self.experts.draw(expert, t).to(self.world.device) for t in (epoch, epoch + self.settings.expert_epochs)
        )
        return Start((done, number), theta, target, batches)

    def choose(self, done: int, number: int) -> tuple[int, int, list[Tensor]]:
        """Expert, epoch and batches of a student."""
        s = self.settings
        gen = generator(self.seed, "trajectory", done, number)
        expert = int(torch.randint(len(self.experts), (1,), generator=gen))
        window = start_window(
            done, s.min_start_epoch, s.first_window, s.max_start_epoch, max(1, s.expansion_end_epoch),
            s.first_window < s.max_start_epoch,
        )  # fmt: skip
        epoch = window[int(torch.randint(len(window), (1,), generator=gen))]
        return expert, epoch, list(self.batches(gen))

    def batches(self, gen: torch.Generator) -> Iterator[Tensor]:
        """Samples [B] of every step: parts of one shuffled set after another, the last part of each maybe smaller."""
        left = list[Tensor]()
        for _ in range(self.settings.syn_steps):
            left = left or list(torch.randperm(len(self.owner), generator=gen).split(self.batch))
            yield left.pop(0).to(self.world.device)

    def rows_of(self, ids: Tensor) -> list[Tensor]:
        """Rows [B] of every leaf for samples [B]."""
        by_class = self.scope == "class"
        return [self.class_places[ids] if leaf is self.labels and by_class else ids for leaf in self.leaves]

    def step_loss(self, start: Start) -> StepLoss:
        """What the student goes down in its steps."""
        s, f = self.settings, self.feature
        streams = [generator(self.seed, "student's view", *start.number, step) for step in range(s.syn_steps)]
        views = [draw_augmentation(s.aug_type, len(ids), g) for ids, g in zip(start.batches, streams, strict=True)]
        chosen: list[Tensor] = []  # of several labels, by sample and step
        if f is not None and f.use_feature == "random":
            chosen = [
                torch.randint(f.n_feat, (len(ids),), generator=g).to(ids.device)
                for ids, g in zip(start.batches, streams, strict=True)
            ]
        places = {id(leaf): i for i, leaf in enumerate(self.leaves)}

        def losses(net: ImageNetwork, x: Tensor, targets: Tensor, labels: Tensor | None = None) -> Tensor:
            if f is None or labels is None:
                return task_loss(net(x).logits, targets, multilabel=False)
            return labelled_loss(net, x, targets, labels, f.lbd, f.form, f.pooling, f.layer_idx)

        body = flat_network(self.net, losses)

        def loss(theta: Tensor, step: int, part: slice, *rows: Tensor) -> Tensor:
            ids = start.batches[step][part]

            def of(whole: Tensor, which: Tensor) -> Tensor:
                return rows[places[id(whole)]] if id(whole) in places else whole[which]

            x = views[step].part(part)(of(self.data, ids))
            targets = of(self.logits, ids).softmax(1) if s.soft_labels else self.targets[ids]
            samples = [x, targets]
            if self.labels is not None:
                several = of(self.labels, self.class_places[ids] if self.scope == "class" else ids)  # [B, K, *form]
                every = torch.arange(len(ids), device=ids.device)
                samples.append(several[every, chosen[step][part]] if chosen else several.mean(1))
            return body(theta, *samples).sum() / len(start.batches[step])

        return loss

    def add_label_objective(self, sums: list[Tensor], start: Start) -> None:
        """Add the gradient of feat_lbd * sum over steps of CE(C(F), y), C the target expert's later layers, and of
        lbd_contrast * the labels' contrast, to that of the feature labels."""
        f = self.feature
        if f is None or "features" not in self.rows or self.labels is None or not (f.feat_lbd or f.lbd_contrast):
            return
        labels = self.labels.detach().requires_grad_()
        several = expand(labels.transpose(0, 1), self.class_places, self.scope)  # [K, N, *form]
        objective = labels.new_zeros(())
        if f.feat_lbd:
            # A sample counts 1 / B for every step that has it in its batch of B.
            weights = labels.new_zeros(len(self.owner))
            for ids in start.batches:
                weights.index_add_(0, ids, weights.new_full(ids.shape, 1 / len(ids)))
            targets = self.logits.detach().softmax(1) if self.settings.soft_labels else self.targets
            set_parameters(self.net, start.target)
            for rows in several:
                logits = feature_logits(self.net, rows, f.form, f.pooling, f.layer_idx, self.map_shape)
                ce = task_loss(logits, targets, multilabel=False)
                objective = objective + f.feat_lbd / len(several) * (weights * ce).sum()
        if f.lbd_contrast:
            owner = self.owner if f.scope == "sample" else self.owner.unique()
            objective = objective + f.lbd_contrast * supervised_contrast(labels.transpose(0, 1), owner, f.form)
        place = next(i for i, leaf in enumerate(self.leaves) if leaf is self.labels)
        sums[place] += torch.autograd.grad(objective, labels)[0]

    def fitting_samples(self) -> int:
        """Samples of a micro-batch whose graph, a vector [P] and as much for each, is as large as suits the device."""
        each = self.measure_memory([slice(0, 1)]).graph - sum(p.nbytes for p in self.net.parameters())
        return max(1, (GPU_GRAPH if self.world.device.type == "cuda" else CPU_GRAPH) // each)

    def measure_memory(self, parts: list[slice]) -> Memory:
        """What an iteration takes whose steps have these micro-batches, found by two on the first rows."""
        s, theta = self.settings, flat_parameters(self.net)  # values do not matter
        ids = torch.arange(self.batch, device=self.world.device)
        start = Start((0, 0), theta, theta, [ids] * s.syn_steps)
        rows = [self.rows_of(ids)] * s.syn_steps
        return trajectory_memory(self.step_loss(start), theta, self.leaves, rows, [parts] * s.syn_steps, s.mode)

    def describe_memory(self) -> str:
        """The estimate in words."""
        m, s = self.memory, self.settings
        sizes = sorted({part.stop - part.start for part in self.micro(self.batch)}) or [0]
        return (
            f"memory of an iteration: {1e-9 * m.peak(self.keep):.2f} GB on each rank beside the process; {m.steps} "
            f"steps of {self.batch} samples in {m.count} micro-batches of {sizes[-1]}, the graphs of the last "
            f"{self.keep} steps kept (memory_budget: {s.memory_budget:g} GB)"
        )

    def logged(self) -> dict[str, float]:
        """How far labels of a class are from each other, over those of different classes."""
        if self.labels is None or "features" not in self.rows:
            return {}
        value = discriminability(
            expand(self.labels.detach().transpose(0, 1), self.class_places, self.scope), self.owner
        )
        return {"label_spread": value} if value == value else {}

    def gather(self) -> SyntheticSet | None:
        """The whole set on rank 0, as pixels."""
        if not self.world.main:
            return None
        targets = self.logits.detach().softmax(1) if self.settings.soft_labels else self.targets
        features = None if self.labels is None else self.labels.detach().transpose(0, 1).contiguous().cpu()
        pixels = self.normaliser.inverse(self.data.detach()).cpu()
        meta = self.meta | {"lr": float(self.alpha.detach())}
        return SyntheticSet(pixels, targets.cpu(), self.owner.cpu(), None, meta, features, self.normaliser)
