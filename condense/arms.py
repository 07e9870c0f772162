"""The training sets that students are compared on: learned sets, real subsets, and either with teachers' labels."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from condense.job import Job, condense_folder, ensure_teachers, fresh_teacher, read_teachers
from condenser.coresets import herding_subset, k_center_subset, random_subset
from condenser.evaluator import TrainingSet, logits_of, soft_labels
from condenser.synthetic_set import load_synthetic
from utils.metrics import probabilities
from utils.stopping import StopFlag

NAMES = {
    "full": "full data", "condensed": "condensed", "mean_matching": "condensed (mean matching)",
    "initial": "its start (0 iterations)", "random": "random subset", "herding": "herding subset",
    "k_center": "k-center subset", "tfidf_full": "TF-IDF + linear, full data",
    "tfidf_random": "TF-IDF + linear, random subset", "condensed_soft": "condensed, soft labels",
    "random_soft": "random subset, soft labels", "condensed_plain": "condensed, no augmentation",
    "random_plain": "random subset, no augmentation",
}  # fmt: skip
LEARNED = ("condensed", "mean_matching", "initial", "condensed_soft", "condensed_plain")
WITH_TEACHERS = ("herding", "k_center", "condensed_soft", "random_soft")
FIXED = ("full", "tfidf_full", "herding", "k_center")  # rows that no condensation seed changes


@dataclass(frozen=True)
class Arm:
    """One training set of one row and seed."""

    data: TrainingSet
    nbytes: int
    documents: int
    labels: Literal["hard", "soft"]


def source(job: Job, row: str, seed: int) -> Path:
    """The condensation run that a row reads: of this seed, and for mean_matching with dis_metrics MMD."""
    cfg = job.cfg
    metric = "MMD" if row == "mean_matching" else cfg.condense.dis_metrics
    other = cfg.condense.model_copy(update={"dis_metrics": metric})
    return condense_folder(cfg.model_copy(update={"condense": other, "seed": seed}))


class Arms:
    """Makes the training sets of the rows, each when it is first asked for."""

    def __init__(self, job: Job, flag: StopFlag, rows: Iterable[str]) -> None:
        self.job, self.members = job, job.train.members()
        self.teachers = ensure_teachers(job, flag) if set(rows) & set(WITH_TEACHERS) else None

    def get(self, row: str, seed: int) -> Arm:
        """The training set of a row and seed."""
        if row in LEARNED:
            return self.learned(row, seed)
        data = self.job.train.subset(self.subset(row, seed))
        if row == "random_soft":
            labels = self.teacher_labels(data)
            return Arm(soft_labels(data, labels), data.data_bytes + 4 * labels.numel(), len(data), "soft")
        return Arm(data, data.nbytes, len(data), "hard")

    def learned(self, row: str, seed: int) -> Arm:
        """A condensed set."""
        cfg = self.job.cfg
        which = "0" if row == "initial" else "best" if cfg.evaluation.which == "best" else str(cfg.condense.niter)
        path = source(self.job, row, seed) / "distilled_data" / f"syn_data_{which}.pth"
        found = load_synthetic(path)
        data = self.job.student_view(found, path)
        if row == "condensed_soft":
            labels = self.teacher_labels(data)
            return Arm(soft_labels(data, labels), found.nbytes + 4 * labels.numel(), len(found.data), "soft")
        packed = -(-cfg.nclass // 8) * len(found.data)
        return Arm(data, found.nbytes + packed, len(found.data), "hard")

    def subset(self, row: str, seed: int) -> Tensor:
        """Ids of the real samples of a row."""
        ipc = self.job.cfg.condense.ipc
        if row == "herding":
            return herding_subset(self.members, ipc, self.features)
        if row == "k_center":
            return k_center_subset(self.members, ipc, self.features)
        if row in ("full", "tfidf_full"):
            return torch.arange(len(self.job.train))
        return random_subset(self.members, ipc, seed)

    @cached_property
    def networks(self) -> list[nn.Module]:
        """The trained teachers."""
        job, nets = self.job, list[nn.Module]()
        if self.teachers is None:
            raise ValueError("Arms: teachers were not prepared for this row")
        bank = read_teachers(job, self.teachers, fresh_teacher(job, 0))
        for member in range(len(bank)):
            nets.append(fresh_teacher(job, 0).to(job.world.device).eval())
            bank.interpolate(nets[-1], member, 0.0)
        return nets

    def teacher_labels(self, data: TrainingSet) -> Tensor:
        """Mean probabilities [N, C] of the teachers."""
        job = self.job
        logits = [logits_of(net, data, job.parts(data), job.world.device) for net in self.networks]
        return torch.stack([probabilities(part, job.cfg.multilabel) for part in logits]).mean(0)

    @cached_property
    def features(self) -> Tensor:
        """Last features [N, D] of the training samples under the first teacher."""
        net, train, device = self.networks[0], self.job.train, self.job.world.device
        rows: list[Tensor] = [torch.empty(0)] * len(train)
        with torch.no_grad():
            for part in self.job.parts(train):
                features = net(train.input(torch.tensor(part), device)).features[-1].cpu()
                for i, row in zip(part, features, strict=True):
                    rows[i] = row
        return torch.stack(rows)
