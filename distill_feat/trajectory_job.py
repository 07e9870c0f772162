"""What MTT and DATM share: configuration, options, experts with their whitening, and soft labels as they start."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import model_validator
from torch import Tensor

from condenser.feature_student import PASS
from condenser.synthetic_set import SyntheticSet
from condenser.trajectory import set_parameters
from condenser.trajectory_condenser import TrajectoryCondenser, TrajectoryConfig
from config import LocalPath, Option
from distill_feat.feat_job import FeatConfig, FeatJob
from distill_feat.feat_names import OPTIONS
from distill_feat.feat_run import Method
from utils.ddp import World
from utils.expert_buffers import ExpertBuffer, find_experts
from utils.normaliser import Normaliser, load_zca
from utils.run_folder import log, short_hash
from utils.stopping import StopFlag
from utils.streams import generator
from utils.utils_image import ImageSet
from utils.zca import zca_sha256

# The requirement's flags, besides those of every method.
TRAJECTORY_OPTIONS = (
    *OPTIONS,
    Option("zca", "zca", "flag", "whiten the images, as for the experts"),
    Option("buffer_path", "buffer_path", "path", "folder of the experts, or one above it"),
    Option("syn_steps", "condense.syn_steps", "value", "steps of the student"),
    Option("expert_epochs", "condense.expert_epochs", "value", "epochs of the expert that they should be worth"),
    Option("min_start_epoch", "condense.min_start_epoch", "value", "first epoch to start at"),
    Option("max_start_epoch", "condense.max_start_epoch", "value", "end of those epochs"),
    Option("batch_syn", "condense.batch_syn", "value", "samples of a student's step"),
    Option("lr_lr", "condense.lr_lr", "value", "step size of learning the student's step size"),
    Option("lr_teacher", "condense.lr_teacher", "value", "the student's step size as it starts"),
    Option("lr_y", "condense.lr_y", "value", "step size of soft labels"),
    Option("mode", "condense.mode", "value", "gradient of the student's steps", ("exact", "tesla")),
)  # fmt: skip


class TrajectoryRunConfig(FeatConfig):
    """A run of MTT or DATM, which differ in `condense`: window of starts, soft labels, guard."""

    condense: TrajectoryConfig
    zca: bool = False
    buffer_path: LocalPath = Path("../pretrained_models/experts")

    @model_validator(mode="after")
    def something(self) -> "TrajectoryRunConfig":
        """Something is learned from the trajectories, not the step size alone."""
        c = self.condense
        if not (c.learn_images or c.soft_labels or (self.feature and self.feature.learn)):
            raise ValueError(
                "condense.learn_images: false, and neither soft nor feature labels are learned; set it true, "
                "condense.soft_labels: true, or feature.learn: true"
            )
        return self


class TrajectoryJob(FeatJob[TrajectoryRunConfig]):
    """Data, whitened as for the experts, networks and experts of a run on this rank."""

    experts: ExpertBuffer

    def __init__(self, cfg: TrajectoryRunConfig, world: World, flag: StopFlag) -> None:
        """Raises ConfigError where no experts fit data, network and whitening."""
        super().__init__(cfg, world, flag)
        sha256 = zca_sha256(self.train) if cfg.zca else ""
        self.experts = find_experts(cfg.buffer_path, cfg.dataset.dataset, self.fresh(0, "shape"), sha256)
        if cfg.zca:
            old, zca = self.train.normaliser, load_zca(self.experts.folder / "zca.safetensors", sha256)
            norm = Normaliser(old.mean, old.std, zca).to(world.device if cfg.dataset.load_memory else zca.mean.device)
            self.train, self.val, self.test = (
                replace(part, normaliser=norm) for part in (self.train, self.val, self.test)
            )
        self.origin["experts"] = short_hash(self.experts.notes.model_dump(mode="json") | {"count": len(self.experts)})
        log.info(f"experts: {len(self.experts)}, {self.experts.folder}")

    def start_values(self) -> dict[str, object]:
        """Experts, too, where they choose images or label them."""
        c = self.cfg.condense
        asks = c.soft_labels or c.init == "correct"
        return super().start_values() | {"soft": c.soft_labels} | ({"experts": self.origin["experts"]} if asks else {})

    def first_images(self, seed: int) -> SyntheticSet:
        """Images that start a set, with soft labels where they are learned and not loaded."""
        c = self.cfg.condense
        first = super().first_images(seed)
        if c.init == "correct":
            which = self.right_images(seed)
            first = replace(first, data=self.train.pixels(which).cpu())
        hard = bool((first.targets.amax(1) == 1).all())
        if c.soft_labels and hard:
            first = first.with_targets(self.soft_targets(first))
        return first

    def last_logits(self, expert: int, images: ImageSet | Tensor) -> Tensor:
        """Logits [N, classes] of an expert as it ended, of real images or of pixels [N, C, H, W]."""
        net = self.fresh(0, "shape").to(self.world.device).eval()
        set_parameters(net, self.experts.draw(expert, self.experts.notes.last).to(self.world.device))
        rows = list[Tensor]()
        for which in torch.arange(len(images)).split(PASS):
            if isinstance(images, Tensor):
                x = self.train.normaliser(images[which].to(self.world.device))
            else:
                x = images.input(which, self.world.device)
            with torch.no_grad():
                rows.append(net(x).logits.cpu())
        return torch.cat(rows)

    def every_logits(self, pixels: Tensor) -> Iterator[Tensor]:
        """Logits [N, classes] of every expert as it ended."""
        for expert in range(len(self.experts)):
            self.flag.check()
            yield self.last_logits(expert, pixels)

    def right_images(self, seed: int) -> Tensor:
        """Sample ids [N], in class order, of random images that expert 0 gets right as it ended; where a class has too
        few of those, that another one does, and at last any."""
        members, chosen = self.train.members(), {c: list[int]() for c in self.kept}
        order = {
            c: members[c][torch.randperm(len(members[c]), generator=generator(seed, "right images", c))].tolist()
            for c in self.kept
        }
        for expert in range(len(self.experts) + 1):
            short = [c for c in self.kept if len(chosen[c]) < self.ipc]
            if not short:
                break
            last = expert == len(self.experts)
            right = (
                self.train.labels >= 0
                if last
                else self.last_logits(expert, self.train).argmax(1) == (self.train.labels)
            )
            if last:
                log.info(f"{len(short)} classes have too few images that an expert gets right: others fill them up")
            for c in short:
                taken = set(chosen[c])
                fitting = [i for i in order[c] if i not in taken and bool(right[i])]
                chosen[c] += fitting[: self.ipc - len(taken)]
        return torch.tensor([i for c in self.kept for i in chosen[c]])

    def soft_targets(self, first: SyntheticSet) -> Tensor:
        """Probabilities [N, classes]. init: correct: softmax of the mean logits of the experts that are right on an
        image (of all, where none is); otherwise those of expert 0 (as published)."""
        if self.cfg.condense.init != "correct":
            return self.last_logits(0, first.data).softmax(1)
        total, count = torch.zeros_like(first.targets), torch.zeros(len(first.targets), 1)
        whole = torch.zeros_like(first.targets)
        for logits in self.every_logits(first.data):
            right = (logits.argmax(1) == first.owner).float()[:, None]
            total, count, whole = total + right * logits, count + right, whole + logits
        mean = torch.where(count > 0, total / count.clamp_min(1), whole / len(self.experts))
        return mean.softmax(1)


def learner(job: TrajectoryJob, seed: int) -> TrajectoryCondenser:
    """The condenser; it says how much memory it takes."""
    cfg, start = job.cfg, job.start(seed)
    condenser = TrajectoryCondenser(
        settings=cfg.condense, feature=cfg.feature, start=start, normaliser=job.train.normaliser,
        network=job.fresh(seed, "student"), map_shape=job.map_shape, experts=job.experts, seed=seed, world=job.world,
        meta=job.notes(),
    )  # fmt: skip
    log.info(condenser.describe_memory())
    return condenser


def plan(cfg: TrajectoryRunConfig) -> str:
    """The iterations in words."""
    c = cfg.condense
    first = "" if c.first_window == c.max_start_epoch else f"{c.first_window - 1} growing to "
    return (
        f"{c.niter}, each of {c.starts} x {c.syn_steps} steps of {c.batch_syn or 'all'} samples for {c.expert_epochs} "
        f"epochs of an expert from epoch {c.min_start_epoch} to {first}{c.max_start_epoch - 1} on; gradient: {c.mode}"
    )


def method(name: str) -> Method[TrajectoryRunConfig, TrajectoryJob]:
    """MTT or DATM."""
    return Method(name, TrajectoryJob, learner, plan)
