"""Judge a condensed text set beside the sets it has to beat: fresh students of each, tested on real documents.

    torchrun --nproc_per_node=2 condense/evaluate_script_text.py --config_path config/ipc5/docstrings.yaml

The condensed rows are those of the condensation runs of the same configuration. Students are shared out over the
ranks; each one's numbers are kept in the run folder, so the same command goes on where it was stopped.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from condense.dry_run_text import dry_run
from condense.text_job import (
    OPTIONS,
    TextConfig,
    TextJob,
    condense_folder,
    ensure_teachers,
    evaluate_folder,
    fresh_teacher,
    open_text,
)
from condense.words import nearest_words
from condenser.Condenser_text import table_name
from condenser.coresets import herding_subset, k_center_subset, random_subset
from condenser.evaluator import (
    Row,
    StudentScore,
    TrainingSet,
    evaluate_student,
    linear_baseline,
    logits_of,
    soft_labels,
    summarise,
)
from condenser.synthetic_set import SyntheticSet, check_compatible, load_synthetic
from condenser.synthetic_text import student_view
from config import CommandLine, ConfigError, Resolved
from config.loader import flatten
from utils.checkpoint import atomic_write
from utils.ddp import World
from utils.init_script import init_script
from utils.metrics import probabilities
from utils.program import run_program
from utils.progress import Progress
from utils.report import Block, Heading, Paragraph, Picture, Table, plain_table, write_report
from utils.run_folder import RESULT, RunFolder, log
from utils.sampling import buckets
from utils.stopping import StopFlag, Stopped, stop_flag
from utils.teachers import load_bank

NAMES = {
    "full": "full data", "condensed": "condensed", "mean_matching": "condensed (mean matching)",
    "initial": "its start (0 iterations)", "random": "random subset", "herding": "herding subset",
    "k_center": "k-center subset", "tfidf_full": "TF-IDF + linear, full data",
    "tfidf_random": "TF-IDF + linear, random subset", "condensed_soft": "condensed, soft labels",
    "random_soft": "random subset, soft labels",
}  # fmt: skip
FIXED = ("full", "tfidf_full", "herding", "k_center")  # rows that no condensation seed changes


@dataclass(frozen=True)
class Arm:
    """One training set of one row and seed."""

    data: TrainingSet
    nbytes: int
    documents: int
    labels: Literal["hard", "soft"]


def evaluate(resolved: Resolved[TextConfig], command: CommandLine) -> None:
    """Train the students of every row and write the report."""
    cfg = resolved.config
    if command.dry_run:
        dry_run(resolved)
        return
    with init_script(command.gpu, cfg.tf32, cfg.seed, cfg.debug) as world, stop_flag() as flag:
        run = RunFolder(evaluate_folder(cfg), flatten(cfg), world, command.overwrite)
        if not run.finished():
            check_runs(cfg)
            job = open_text(cfg, world)
            judge_rows(cfg, job, world, run, flag)
            rows = collect(cfg, run)
            if world.main:
                write(cfg, job, run, rows)
            run.finish({"rows": len(rows)})
        else:
            log.info("finished already (--overwrite starts again)")
        if world.main:
            print(
                plain_table(table([Row(**row) for row in json.loads((run.folder / "report.json").read_text())["rows"]]))
            )
            print(f"report: {run.folder / 'report.html'}", flush=True)


def seeds_of(cfg: TextConfig, row: str) -> tuple[int, ...]:
    """Condensation or subset seeds of a row."""
    return (cfg.seed,) if row in FIXED else cfg.evaluation.seeds or (cfg.seed,)


def source(cfg: TextConfig, row: str, seed: int) -> Path:
    """The condensation run that a row reads: of this seed, and for mean_matching with dis_metrics MMD."""
    metric = "MMD" if row == "mean_matching" else cfg.condense.dis_metrics
    other = cfg.condense.model_copy(update={"dis_metrics": metric})
    return condense_folder(cfg.model_copy(update={"condense": other, "seed": seed}))


def check_runs(cfg: TextConfig) -> None:
    """Raise ConfigError with the command to run for every condensation run that is wanted and not finished."""
    wanted = [r for r in cfg.evaluation.rows if r in ("condensed", "mean_matching", "initial", "condensed_soft")]
    missing: dict[Path, tuple[str, list[str]]] = {}  # run -> its arguments, the rows that read it
    for row in wanted:
        for seed in seeds_of(cfg, row):
            folder = source(cfg, row, seed)
            if not (folder / RESULT).exists():
                extra = " condense.dis_metrics=MMD" if row == "mean_matching" else ""
                missing.setdefault(folder, (f"seed={seed}{extra}", []))[1].append(row)
    if missing:
        raise ConfigError(
            "\n".join(
                f"evaluation.rows: {', '.join(rows)}: no finished run {folder}: run condense_script_text.py "
                f"with the same arguments and {arguments}, or leave the rows out"
                for folder, (arguments, rows) in missing.items()
            )
        )


def judge_rows(cfg: TextConfig, job: TextJob, world: World, run: RunFolder, flag: StopFlag) -> None:
    """Train this rank's share of the students that have no numbers yet."""
    e = cfg.evaluation
    tasks = [
        (row, seed, student)
        for row in e.rows
        for seed in seeds_of(cfg, row)
        for student in range(1 if row.startswith("tfidf") else e.repeat)
    ]
    open_tasks = world.broadcast([task for task in tasks if not student_file(run, *task).exists()])
    arms = Arms(cfg, job, world, flag)
    parts = tuple(buckets(data.lengths.tolist(), cfg.condense.token_budget) for data in (job.val, job.test))
    mine = world.share([1.0] * len(open_tasks))
    progress = Progress("students", len(mine) * e.steps, shown=world.main)
    for i in mine:
        row, seed, student = open_tasks[i]
        if row.startswith("tfidf"):
            found, arm = linear(cfg, job, arms, row, seed)
            progress.step(e.steps)
        else:
            arm = arms.get(row, seed)
            # The students of a number are the same in every row: rows differ in their data only.
            net = job.factory.fresh(cfg.seed, "student", student)
            found = evaluate_student(
                net, arm.data, job.val, job.test, (parts[0], parts[1]), e, cfg.dataset.is_multilabel, world.device,
                (cfg.seed, "student", student), progress.step,
            )  # fmt: skip
        value = found.as_dict() | {"bytes": arm.nbytes, "documents": arm.documents, "labels": arm.labels}
        atomic_write(student_file(run, row, seed, student), json.dumps(value).encode())
        if flag.number:
            raise Stopped(flag.number)
    progress.close()
    world.barrier()


def student_file(run: RunFolder, row: str, seed: int, student: int) -> Path:
    """Where a student's numbers are kept."""
    return run.folder / "students" / f"{row}_seed{seed}_{student}.json"


class Arms:
    """Makes the training sets of the rows, each when it is first asked for."""

    def __init__(self, cfg: TextConfig, job: TextJob, world: World, flag: StopFlag) -> None:
        self.cfg, self.job, self.world = cfg, job, world
        self.members = job.train.members()
        soft = any(row.endswith("_soft") or row in ("herding", "k_center") for row in cfg.evaluation.rows)
        self.teachers = ensure_teachers(cfg, job, world, flag) if soft else None

    def get(self, row: str, seed: int) -> Arm:
        """The training set of a row and seed."""
        if row in ("condensed", "mean_matching", "initial", "condensed_soft"):
            return self.learned(row, seed)
        which = self.subset(row, seed)
        data = self.job.train.subset(which)
        if row == "random_soft":
            labels = self.teacher_labels(data)
            return Arm(soft_labels(data, labels), 2 * int(data.lengths.sum()) + 4 * labels.numel(), len(data), "soft")
        return Arm(data, data.nbytes, len(data), "hard")

    def learned(self, row: str, seed: int) -> Arm:
        """A condensed set."""
        which = (
            "0" if row == "initial" else "best" if self.cfg.evaluation.which == "best" else str(self.cfg.condense.niter)
        )
        path = source(self.cfg, row, seed) / "distilled_data" / f"syn_data_{which}.pth"
        found = load_synthetic(path)
        table = self.job.factory.word_table
        shape = (self.cfg.network.max_length, table.shape[1])
        check_compatible(found, path, shape, self.cfg.dataset.nclass, table_name(table))
        data = student_view(found)
        if row == "condensed_soft":
            labels = self.teacher_labels(data)
            return Arm(soft_labels(data, labels), found.nbytes + 4 * labels.numel(), len(found.data), "soft")
        packed = -(-found.targets.shape[1] // 8) * len(found.data)
        return Arm(data, found.nbytes + packed, len(found.data), "hard")

    def subset(self, row: str, seed: int) -> Tensor:
        """Ids of the real documents of a row."""
        ipc = self.cfg.condense.ipc
        if row == "herding":
            return herding_subset(self.members, ipc, self.features())
        if row == "k_center":
            return k_center_subset(self.members, ipc, self.features())
        if row in ("full", "tfidf_full"):
            return torch.arange(len(self.job.train))
        return random_subset(self.members, ipc, seed)

    def networks(self) -> list[Any]:
        """The trained teachers."""
        cfg, device = self.cfg, self.world.device
        if self.teachers is None:
            raise ValueError("Arms: teachers were not prepared for this row")
        like = fresh_teacher(cfg, self.job, 0).to(device)
        bank = load_bank(self.teachers, cfg.condense.num_premodel, cfg.condense.teacher_model_epoch, like, device)
        nets = []
        for member in range(len(bank)):
            net = fresh_teacher(cfg, self.job, 0).to(device).eval()
            bank.interpolate(net, member, 0.0)
            nets.append(net)
        return nets

    def teacher_labels(self, data: TrainingSet) -> Tensor:
        """Mean probabilities [N, C] of the teachers."""
        cfg = self.cfg
        parts = buckets(data.lengths.tolist(), cfg.condense.token_budget)
        found = [
            probabilities(logits_of(net, data, parts, self.world.device), cfg.dataset.is_multilabel)
            for net in self.networks()
        ]
        return torch.stack(found).mean(0)

    @torch.no_grad()
    def features(self) -> Tensor:
        """Pooled features [N, D] of the training documents under the first teacher."""
        net, train = self.networks()[0], self.job.train
        rows: list[Tensor] = [torch.empty(0)] * len(train)
        for part in buckets(train.lengths.tolist(), self.cfg.condense.token_budget):
            x = train.input(torch.tensor(part), self.world.device)
            for i, row in zip(part, net.get_feature_single(x.tokens, x.mask).cpu(), strict=True):
                rows[i] = row
        return torch.stack(rows)


def linear(cfg: TextConfig, job: TextJob, arms: Arms, row: str, seed: int) -> tuple[StudentScore, Arm]:
    """The TF-IDF rows."""
    which = arms.subset("full" if row == "tfidf_full" else "random", seed)
    data, texts = job.train.subset(which), job.corpus.train.texts
    if job.corpus.val is None:
        raise ValueError("linear: the corpus has no validation part")
    found = linear_baseline(
        [texts[i] for i in which.tolist()], data.targets, texts, (job.corpus.val.texts, job.val.targets),
        (job.corpus.test.texts, job.test.targets), cfg.dataset.is_multilabel,
    )  # fmt: skip
    return found, Arm(data, data.nbytes, len(data), "hard")


def collect(cfg: TextConfig, run: RunFolder) -> list[Row]:
    """The rows of the table from the students' files."""
    rows = []
    for row in cfg.evaluation.rows:
        repeat = 1 if row.startswith("tfidf") else cfg.evaluation.repeat
        values = [
            json.loads(student_file(run, row, seed, student).read_text())
            for seed in seeds_of(cfg, row)
            for student in range(repeat)
        ]
        sizes = [(v.pop("bytes"), v.pop("documents"), v.pop("labels")) for v in values]
        nbytes, documents, labels = sizes[0]
        rows.append(summarise(row, cfg.condense.ipc, labels, [StudentScore(**v) for v in values], nbytes, documents))
    return rows


def table(rows: list[Row]) -> Table:
    """The table of a run."""
    header = (
        "training set",
        "micro-F1",
        "macro-F1",
        "micro-F1 @.5",
        "macro-F1 @.5",
        "mAP",
        "threshold",
        "documents",
        "bytes",
        "s",
    )

    def both(mean: float, std: float) -> str:
        return f"{mean:.1f} ± {std:.1f}"

    lines = [
        (
            NAMES[r.name], both(r.micro_mean, r.micro_std), both(r.macro_mean, r.macro_std),
            both(r.micro_half_mean, r.micro_half_std), both(r.macro_half_mean, r.macro_half_std),
            both(r.map_mean, r.map_std), f"{r.threshold:.2f}", str(r.documents), str(r.bytes), f"{r.seconds:.1f}",
        )
        for r in rows
    ]  # fmt: skip
    caption = (
        "mean ± deviation over students; threshold chosen on validation, then at 0.5; seconds of one student's training"
    )
    return Table(header, tuple(lines), caption)


def size_note(job: TextJob, rows: list[Row]) -> str:
    """How large the learned set is beside the corpus."""
    learned = [r.bytes for r in rows if r.name in ("condensed", "mean_matching", "initial")]
    if not learned:
        return f"The corpus takes {job.train.nbytes} bytes as uint16 token ids."
    ratio = learned[0] / job.train.nbytes
    word = "LARGER in bytes than" if ratio > 1 else "smaller in bytes than"
    return (
        f"The learned set ({learned[0]} bytes of embeddings) is {word} the {len(job.train)} training documents "
        f"({job.train.nbytes} bytes as uint16 token ids): {ratio:.2f} times their size."
    )


def write(cfg: TextConfig, job: TextJob, run: RunFolder, rows: list[Row]) -> None:
    """report.json, report.md and report.html."""
    note = size_note(job, rows)
    value = {
        "dataset": cfg.dataset.dataset, "corpus": job.corpus.fingerprint, "documents": len(job.train),
        "corpus_bytes": job.train.nbytes, "note": note, "rows": [row.as_dict() for row in rows],
    }  # fmt: skip
    atomic_write(run.folder / "report.json", json.dumps(value, indent=1).encode())
    blocks: list[Block] = [
        Paragraph(
            f"{cfg.dataset.dataset}, {cfg.condense.ipc} documents per class; {cfg.evaluation.steps} steps a student."
        ),
        table(rows),
        Paragraph(note),
    ]
    if "condensed" in cfg.evaluation.rows:
        folder = source(cfg, "condensed", seeds_of(cfg, "condensed")[0])
        if (folder / "images" / "loss_curve.png").exists():
            blocks += [
                Heading("Curves of the condensation"),
                Picture(folder / "images" / "loss_curve.png", folder.name),
            ]
        blocks += [
            Heading("Nearest words of the learned rows"),
            words(job, load_synthetic(folder / "distilled_data" / "syn_data_best.pth")),
        ]
    write_report(run.folder, f"Condensed text judged: {cfg.dataset.dataset}", blocks)


def words(job: TextJob, found: SyntheticSet) -> Table:
    """Nearest words of the first row of every class."""
    return Table(
        ("class", "labels", "words"),
        nearest_words(found, job.factory.word_table, job.tokenizer, job.corpus.classes),
    )


def main() -> int:
    """Exit status."""
    return run_program(__doc__ or "", Path(__file__).resolve().parent, TextConfig, OPTIONS, evaluate)


if __name__ == "__main__":
    sys.exit(main())
