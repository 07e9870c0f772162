"""The table of feature labels: {no F, F} x {no views, views} of the learned set beside what costs as many bytes."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condenser.feature_labels import fair_ipc, float_count
from condenser.feature_student import PASS, FeatureScore, FeatureSet, feature_set, judge_feature_student
from condenser.students import OnStep, judge_students
from condenser.synthetic_image import image_grid
from condenser.synthetic_set import SyntheticSet, load_synthetic
from distill_feat.feat_job import FeatConfig, FeatJob
from distill_feat.feat_names import NAMES, RowName
from utils.checkpoint import atomic_write
from utils.image_networks import ImageNetwork, NetType
from utils.report import Block, Heading, Picture, Table, plain_table, write_report
from utils.run_folder import RunFolder, log

Task = tuple[RowName, int, int, NetType | None]  # row, seed of the set, number and architecture of the student
SOFT = ("distilled_soft", "random_soft")
WITH_LABELS = ("distilled_feature", "start_feature")
OF_SET = (*WITH_LABELS, "distilled", "start")  # with the labels that the set itself has
SCORES = {"last": "last", "last_views": "last, views", "selected": "selected", "selected_views": "selected, views"}


class FeatRows:
    """Makes the training sets of the rows and judges students on them."""

    def __init__(self, job: FeatJob[FeatConfig], runs: dict[int, Path]) -> None:
        """`runs`: the folder of every seed's learned set. All ranks together: missing networks are trained."""
        self.job, self.runs, cfg = job, runs, job.cfg
        self.rows = [row for row in cfg.evaluation.rows if cfg.feature is not None or row not in WITH_LABELS]
        self.teacher = job.trained(1, cfg.pretrain.epochs)[0] if set(self.rows) & set(SOFT) else None

    @cached_property
    def label_shape(self) -> tuple[int, ...]:
        """Of a feature label."""
        return self.job.label_shape

    @cached_property
    def soft(self) -> bool:
        """Whether the sets have soft labels, learned or brought along."""
        first = load_synthetic(self.runs[self.job.cfg.seed] / "distilled_data" / "syn_data_0.pth")
        return not bool((first.targets.amax(1) == 1).all())

    def floats(self, row: RowName, ipc: int) -> float:
        """Float32 numbers a class of a row with `ipc` images."""
        job, f = self.job, self.job.cfg.feature
        count = f.n_feat if f and row in WITH_LABELS else 0
        soft = job.cfg.dataset.nclass if row in SOFT or (row in OF_SET and self.soft) else 0
        return float_count(job.image_shape, self.label_shape, count, ipc, f.scope if f else "sample", soft)

    def ipc(self, row: RowName) -> int:
        """Images a class of a row: those of random rows take no more bytes than the learned set with its labels."""
        job = self.job
        if row == "full":
            return max(len(ids) for ids in job.train.members())
        if not row.startswith("random"):
            return job.ipc
        budget = self.floats("distilled_feature", job.ipc) / math.prod(job.image_shape)
        soft = job.cfg.dataset.nclass if row in SOFT else 0
        return max(1, fair_ipc(budget, job.image_shape, (), 0, "sample", soft))

    def get(self, row: RowName, seed: int) -> FeatureSet:
        """The training set of a row."""
        job = self.job
        if row in ("full", "random", "random_soft"):
            real = job.real(self.ipc(row), seed) if row != "full" else job.real(len(job.train), seed)
            found = FeatureSet(real, real.targets)
        else:
            which = "0" if row.startswith("start") else "best"
            learned = load_synthetic(self.runs[seed] / "distilled_data" / f"syn_data_{which}.pth")
            found = feature_set(learned, row in WITH_LABELS)
        return replace(found, targets=self.soft_labels(found)) if row in SOFT else found

    def soft_labels(self, found: FeatureSet) -> Tensor:
        """Probabilities [N, classes] of the trained teacher."""
        if self.teacher is None:
            raise ValueError("FeatRows: the teacher was not prepared for this row")
        found, rows = found.to(self.job.world.device), []
        with torch.no_grad():
            for which in torch.arange(len(found.targets)).split(PASS):
                rows.append(self.teacher(found.input(which)).logits.softmax(1).cpu())
        return torch.cat(rows)

    def tasks(self) -> list[Task]:
        """Every student; other architectures read labels only where their maps have the labels' shape."""
        job, e = self.job, self.job.cfg.evaluation
        kinds: list[NetType | None] = [None, *e.architectures]
        return [
            (row, seed, student, kind)
            for kind in kinds
            for row in self.rows
            if row not in WITH_LABELS or kind is None or self.reads_labels(job.fresh(0, "shape", kind=kind))
            for seed in (job.cfg.seeds if row != "full" else job.cfg.seeds[:1])
            for student in range(e.repeat)
        ]

    def reads_labels(self, net: ImageNetwork) -> bool:
        """Whether a network's maps have the shape that the labels were made for."""
        f = self.job.cfg.feature
        inside = f is None or f.layer_idx is None or f.layer_idx <= len(net.blocks)
        return inside and self.job.map_shape_of(net) == self.job.map_shape

    def judge_one(self, task: Task, on_step: OnStep) -> FeatureScore:
        """The numbers of one student."""
        row, seed, student, kind = task
        job, cfg = self.job, self.job.cfg
        # A number's student is the same in every row: rows differ in their data only.
        net = job.fresh(cfg.seed, "student", student, kind=kind)
        stream = (cfg.seed, "student", student)
        return judge_feature_student(
            net, self.get(row, seed), cfg.feature, job.val, job.test, cfg.evaluation, job.world.device, stream, on_step
        )

    def judge(self, run: RunFolder) -> None:
        """Train the students that have no numbers yet, each rank its share, and write the report."""
        job, tasks = self.job, self.tasks()

        def one(number: int, on_step: OnStep) -> dict[str, Any]:
            return self.judge_one(tasks[number], on_step).as_dict()

        names = [f"{row}{'_' + kind if kind else ''}_seed{seed}_{student}" for row, seed, student, kind in tasks]
        found = judge_students(run.folder, names, job.cfg.evaluation.steps, one, job.world, job.flag)
        if job.world.main:
            self.write(run, tasks, found)
        run.finish({"students": len(tasks)})

    def table(self, tasks: Sequence[Task], found: Sequence[dict[str, Any]]) -> Table:
        """Mean and deviation over sets and students."""
        lines = []
        for row, kind in dict.fromkeys((task[0], task[3]) for task in tasks):
            own = [v for v, task in zip(found, tasks, strict=True) if (task[0], task[3]) == (row, kind)]
            cells = [[v[name] for v in own] for name in SCORES]
            shown = [f"{mean(c):.1f} ± {stdev(c) if len(c) > 1 else 0:.1f}" for c in cells]
            ipc, size = self.ipc(row), self.floats(row, self.ipc(row))
            equal = f"{size / math.prod(self.job.image_shape):.2f}"
            seconds = f"{mean(v['seconds'] for v in own):.1f}"
            lines.append(
                (NAMES[row] + (f", {kind}" if kind else ""), *shown, str(ipc), equal, f"{4 * size:.0f}", seconds)
            )
        e = self.job.cfg.evaluation
        views = f"views: mean logits of {e.tta_mode}" if e.tta else "no views"
        caption = (
            f"test accuracy in percent, mean ± deviation over {len(self.job.cfg.seeds)} sets x {e.repeat} students; "
            f"last: after {e.steps} steps; selected: best state on validation; {views}; "
            "sizes are those of a class, as float32"
        )
        header = ("training set", *SCORES.values(), "images", "image-equivalents", "bytes", "s")
        return Table(header, tuple(lines), caption)

    def write(self, run: RunFolder, tasks: Sequence[Task], found: Sequence[dict[str, Any]]) -> None:
        """report.json, report.md and report.html."""
        cfg = self.job.cfg
        table = self.table(tasks, found)
        rows = [
            dict(zip(("row", "seed", "student", "network"), task, strict=True)) | v
            for task, v in zip(tasks, found, strict=True)
        ]
        atomic_write(
            run.folder / "report.json", json.dumps({"students": rows, "table": plain_table(table)}, indent=1).encode()
        )
        folder = self.runs[cfg.seed]
        blocks: list[Block] = [table]
        curve = folder / "images" / "loss_curve.png"
        if curve.exists():
            blocks += [Heading("Curves of the first set"), Picture(curve, folder.name)]
        blocks.append(Heading("Its images, a row a class"))
        for name, file in (("before", "0"), ("after", "best")):
            learned = load_synthetic(folder / "distilled_data" / f"syn_data_{file}.pth")
            image_grid(learned, run.folder / "images" / f"{name}.png")
            blocks.append(Picture(run.folder / "images" / f"{name}.png", name))
        if pairs := beside_labels(learned):
            picture = run.folder / "images" / "labels.png"
            image_grid(pairs, picture)
            caption = "each image with its label to its right: a block a place of the map, in it a square a channel"
            blocks += [Heading("Its images with their feature labels"), Picture(picture, caption)]
        write_report(run.folder, f"Feature labels: {cfg.dataset.dataset}, {self.job.ipc} images a class", blocks)
        log.info(f"judged: {run.folder}")


def beside_labels(found: SyntheticSet) -> SyntheticSet | None:
    """A set [2 N, C, S, S] of every image followed by its label as a picture, black to white over the set; None: no F.

    A place of the label's map is a block, in which a channel is a square.
    """
    if found.features is None:
        return None
    labels = found.features.float().mean(0)[found.owner if found.meta.get("scope") == "class" else slice(None)]
    maps = labels.reshape(len(labels), *{2: (-1, 1, 1), 3: (1, *labels.shape[1:])}.get(labels.ndim, labels.shape[1:]))
    side = math.isqrt(maps.shape[1] - 1) + 1  # the smallest square that holds all channels
    maps = (maps - maps.min()) / (maps.max() - maps.min()).clamp_min(1e-12)
    drawn = F.pixel_shuffle(F.pad(maps, (0, 0, 0, 0, 0, side * side - maps.shape[1])), side)
    size = max(64, found.data.shape[-1])
    pair = [F.interpolate(x, size, mode="nearest") for x in (found.data, drawn.expand(-1, found.data.shape[1], -1, -1))]
    return SyntheticSet(
        torch.stack(pair, 1).flatten(0, 1), found.targets.repeat_interleave(2, 0), found.owner.repeat_interleave(2)
    )


def held_out_numbers(job: FeatJob[FeatConfig], found: SyntheticSet, seed: int) -> dict[str, float]:
    """Validation accuracy of one student without and, where there are labels, with them; each with views, too."""
    cfg, numbers = job.cfg, dict[str, float]()
    for name, labelled in (("no F", False), ("F", True)):
        if labelled and found.features is None:
            continue
        net = job.fresh(seed, "held-out student")
        stream = (seed, "held-out student", 0)
        score = judge_feature_student(
            net, feature_set(found, labelled), cfg.feature, job.val, job.val, cfg.evaluation, job.world.device, stream,
            job.flag.check,
        )  # fmt: skip
        numbers |= {name: score.last, f"{name}, views": score.last_views}
    return numbers


def show(run: RunFolder) -> None:
    """Print the table of a finished run (rank 0)."""
    if run.world.main:
        print(json.loads((run.folder / "report.json").read_text())["table"])
        print(f"report: {run.folder / 'report.html'}", flush=True)
