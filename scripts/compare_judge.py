"""The one judge of a comparison: the same students for every row, and the table of what they and the sets are worth."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from condense.arms import WITH_TEACHERS, Arms
from condense.image_job import ImageConfig, ImageJob
from condenser.coresets import herding_subset, k_center_subset, random_subset
from condenser.feature_student import FeatureSet, feature_set, judge_feature_student
from condenser.robust_scores import augmentation_robust_score, label_robust_score
from condenser.students import OnStep, judge_students
from condenser.synthetic_image import image_grid, student_view
from condenser.synthetic_set import SyntheticSet, checked, load_synthetic
from config import ConfigError
from scripts.compare_plan import FIXED, CompareConfig, Line, Run
from utils.checkpoint import atomic_write, load_json
from utils.ddp import World
from utils.image_networks import image_network
from utils.normaliser import Normaliser
from utils.report import Block, Heading, Paragraph, Picture, Table, plain_table, spread, write_report
from utils.run_folder import RunFolder
from utils.stopping import StopFlag
from utils.utils_image import load_images

Variant = Literal["", "plain", "soft", "hard", "F"]  # without augmentation, teachers' labels, class labels, with F
Scores = dict[tuple[str, Variant], list[float]]  # accuracies of a row's students
CAPTION = (
    "Test accuracy in percent, mean ± deviation over sets x students, without feature labels (F), then with them. "
    "Scores are against random images of the scale: 26.9 is no gain; label-robust counts what is lost against the full "
    "data, too. Scale: images a class, or the bytes of so many; bytes: as float32 with soft and feature labels. "
    "s: of the method's own iteration; peak: memory of its process."
)
COLUMNS = {
    "label_robust": ("label-robust", 1), "augmentation_robust": ("augmentation-robust", 1), "bytes": ("bytes", 0),
    "iteration_s": ("s an iteration", 2), "peak": ("peak MiB", 0),
}  # fmt: skip


class Task(NamedTuple):
    """A student: its row, its set's place among the runs and seed, its own number, what it is trained by."""

    line: Line
    place: int
    seed: int
    student: int
    variant: Variant

    @property
    def name(self) -> str:
        """Under which its numbers are kept."""
        return f"{self.line.key}{self.variant and '_' + self.variant}_seed{self.seed}_{self.student}"


class Judge:
    """Students that differ in nothing but what they are trained on."""

    def __init__(self, m: CompareConfig, cfg: ImageConfig, world: World, flag: StopFlag) -> None:
        """All ranks together: missing teachers are trained."""
        corpus = load_images(cfg.dataset)
        self.m, self.job, self.flag = m, ImageJob(cfg, world, corpus), flag
        self.train, self.val, self.test = corpus.train, corpus.val, corpus.test
        self.arms = Arms(self.job, flag, WITH_TEACHERS)

    def learned(self, run: Run) -> SyntheticSet:
        """A learned set. Raises ConfigError for one of other images."""
        path, images = run.folder / "distilled_data" / "syn_data_best.pth", self.train
        if load_json(run.folder / "origin.json")["images"] != self.job.origin["images"]:
            raise ConfigError(f"{path}: learned from other images than those of {self.m.judge}: give both the same")
        return checked(load_synthetic(path), path, (images.channels, images.size, images.size), self.job.cfg.nclass)

    def real(self, line: Line, seed: int) -> Tensor:
        """Sample ids of a row of real images."""
        members = self.arms.members
        if line.method == "full":
            return torch.arange(len(self.train))
        if line.method == "random":
            return random_subset(members, line.images, seed)
        subset = herding_subset if line.method == "herding" else k_center_subset
        return subset(members, line.images, self.arms.features)

    def training_set(self, task: Task) -> tuple[FeatureSet, Normaliser]:
        """What a student is trained on, and what its test images go through."""
        line, norm, soft = task.line, self.train.normaliser, task.variant == "soft"
        if not line.runs:
            real = self.train.subset(self.real(line, task.seed))
            return FeatureSet(real, self.arms.teacher_labels(real) if soft else real.targets), norm
        found = self.learned(line.runs[task.place])
        own = found.normaliser or norm  # whitening is a part of the set
        if task.variant == "F":
            return feature_set(found, True), own
        if task.variant == "hard":
            found = found.with_targets(torch.eye(self.job.cfg.nclass)[found.owner])
        view = student_view(found, own)
        return FeatureSet(view.data, self.arms.teacher_labels(student_view(found, norm)) if soft else view.targets), own

    def tasks(self, lines: Sequence[Line]) -> list[Task]:
        """Every student; those of class labels stand apart where the set's own labels are soft."""
        tasks = []
        for line in lines:
            variants: list[Variant] = ["", "plain", "soft"] if line.scale else [""]
            variants += ["hard"] if line.runs and is_soft(self.learned(line.runs[0])) else []
            variants += ["F"] if line.feature else []
            seeds = self.m.taken[:1] if line.method in FIXED else self.m.taken
            tasks += [
                Task(line, place, seed, student, variant)
                for variant in variants
                for place, seed in enumerate(seeds)
                for student in range(self.m.students.repeat)
            ]
        return tasks

    def one(self, task: Task, on_step: OnStep) -> dict[str, float]:
        """Test accuracy of a student's last state, and seconds of its training."""
        job, settings, device = self.job, self.m.students, self.job.world.device
        data, norm = self.training_set(task)
        val, test = (replace(part, normaliser=norm.to(device)) for part in (self.val, self.test))
        if task.variant == "plain":
            settings = settings.model_copy(update={"aug_type": "none", "cutmix": 0.0, "mixup": 0.0})
        d, stream = job.cfg.dataset, (job.cfg.seed, "student", task.student)
        net = image_network(job.cfg.network, d.channels, d.size, d.nclass, *stream)
        found = judge_feature_student(net, data, task.line.feature, val, test, settings, device, stream, on_step)
        return {"accuracy": found.last, "seconds": found.seconds}

    def numbers(self, line: Line, scores: Scores) -> dict[str, float]:
        """Images and bytes of a row, what its sets cost to learn, and its robust scores."""
        if line.runs:
            found = self.learned(line.runs[0])
            parts = [found.data, found.targets if is_soft(found) else None, found.features]
            got = {
                "images": float(len(found.data)),
                "bytes": 4.0 * sum(part.numel() for part in parts if part is not None),
            }
        else:
            images, count = self.train, len(self.real(line, self.m.taken[0]))
            got = {"images": float(count), "bytes": 4.0 * count * images.channels * images.size**2}
        for name in ("iteration_s", "peak"):
            values = [run.cost[name] for run in line.runs if name in run.cost]
            got |= {name: mean(values)} if values else {}
        if line.scale:
            own = {variant: mean(values) for (key, variant), values in scores.items() if key == line.key}
            random = {v: mean(scores[f"random_{line.scale}_{line.scale}", v]) for v in ("", "plain", "soft")}
            hard, full = own.get("hard", own[""]), mean(scores["full", ""])
            got["label_robust"] = label_robust_score(full, hard, own["soft"], random["soft"])
            got["augmentation_robust"] = augmentation_robust_score(own[""], random[""], own["plain"], random["plain"])
        return got


def is_soft(found: SyntheticSet) -> bool:
    """Whether a set's own labels are soft."""
    return bool((found.targets.amax(1) < 1).any())


def table(lines: Sequence[Line], scores: Scores, numbers: Mapping[str, Mapping[str, float]]) -> Table:
    """A row for every line; of one that crashed only that."""
    rows = []
    for line in lines:
        got = numbers.get(line.key, {})
        cells = [spread(scores.get((line.key, "")) or [], 1) or "CRASHED", spread(scores.get((line.key, "F")) or [], 1)]
        cells += [f"{got[name]:.{digits}f}" if name in got else "" for name, (_, digits) in COLUMNS.items()]
        words = (
            (str(line.scale), line.method, str(line.images), line.equal) if line.scale else ("", "full data", "", "")
        )
        rows.append((*words, *cells))
    header = ("scale", "method", "images", "equal", "accuracy", "with F", *(title for title, _ in COLUMNS.values()))
    return Table(header, tuple(rows), CAPTION)


def judge(judges: Judge, lines: Sequence[Line], died: Mapping[str, str], run: RunFolder) -> None:
    """Train the students that have no numbers yet, each rank its share; report.json, .md and .html, with what died."""
    m, job = judges.m, judges.job
    alive = [line for line in lines if all(one.finished for one in line.runs)]
    tasks = judges.tasks(alive)
    names = [task.name for task in tasks]
    found = judge_students(
        run.folder, names, m.students.steps, lambda i, on_step: judges.one(tasks[i], on_step), job.world, judges.flag
    )
    numbers = dict[str, dict[str, float]]()
    if job.world.main:
        scores: Scores = {}
        for task, own in zip(tasks, found, strict=True):
            scores.setdefault((task.line.key, task.variant), []).append(own["accuracy"])
        numbers = {line.key: judges.numbers(line, scores) for line in alive}
        crashed = [f"{name}: {words}" for name, words in died.items()]
        whole = table(lines, scores, numbers)
        value = {"table": plain_table(whole), "crashed": crashed, "rows": numbers}
        atomic_write(run.folder / "report.json", json.dumps(value, indent=1).encode())
        blocks: list[Block] = [whole, *(Paragraph(f"CRASHED {words}") for words in crashed)]
        for line in alive:
            if line.runs:
                picture = run.folder / "images" / f"{line.key}.png"
                image_grid(judges.learned(line.runs[0]), picture)
                blocks += [Heading(f"{line.method}, {line.images} images a class"), Picture(picture, line.key)]
        write_report(run.folder, f"Condensation methods on {job.cfg.data_name}", blocks)
    if len(alive) == len(lines):
        run.finish(numbers)
