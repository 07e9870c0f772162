"""An evaluation of any modality: fresh students of every row, their numbers kept as they come, table and report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from condense.arms import FIXED, LEARNED, NAMES, Arm, Arms, source
from condense.job import Job
from condenser.evaluator import Row, StudentScore, evaluate_student, summarise
from condenser.robust_scores import augmentation_robust_score, label_robust_score
from condenser.students import OnStep, judge_students
from condenser.synthetic_set import load_synthetic
from config import ConfigError
from utils.checkpoint import atomic_write
from utils.report import Block, Heading, Paragraph, Picture, Table, plain_table, write_report
from utils.run_folder import RESULT, RunFolder, claim, log
from utils.stopping import StopFlag

Task = tuple[str, int, int, str]  # row, condensation or subset seed, number and architecture of the student


def judge_rows(job: Job, run: RunFolder, flag: StopFlag) -> None:
    """Train the students that have no numbers yet, each rank its share, and write the report."""
    check_runs(job, job.cfg.evaluation.rows)
    if job.world.main:
        claim(run.folder, job.origin)
    tasks = tasks_of(job)
    arms = Arms(job, flag, job.cfg.evaluation.rows)

    def judge(number: int, on_step: OnStep) -> dict[str, Any]:
        found, arm = judge_one(job, arms, tasks[number], on_step)
        return found.as_dict() | {"bytes": arm.nbytes, "documents": arm.documents, "labels": arm.labels}

    names = list(map(student_name, tasks))
    rows = collect(job, tasks, judge_students(run.folder, names, job.cfg.evaluation.steps, judge, job.world, flag))
    if job.world.main:
        write(job, run, rows)
    run.finish({"rows": len(rows)})


def show(run: RunFolder) -> None:
    """Print the table of a finished evaluation (rank 0)."""
    if run.world.main:
        found = json.loads((run.folder / "report.json").read_text())
        print(plain_table(table([Row(**row) for row in found["rows"]], found["multilabel"])))
        for line in found["robust_scores"]:
            print(line)
        print(f"report: {run.folder / 'report.html'}", flush=True)


def seeds_of(job: Job, row: str) -> tuple[int, ...]:
    """Condensation or subset seeds of a row."""
    return (job.cfg.seed,) if row in FIXED else job.cfg.evaluation.seeds or (job.cfg.seed,)


def tasks_of(job: Job) -> list[Task]:
    """Every student of every row; a linear classifier has no chance in it and is trained once."""
    e = job.cfg.evaluation
    return [
        (row, seed, student, network)
        for network in job.architectures
        for row in e.rows
        for seed in seeds_of(job, row)
        for student in range(1 if row.startswith("tfidf") else e.repeat)
    ]


def check_runs(job: Job, rows: Sequence[str]) -> None:
    """Raise ConfigError with the command to run for every condensation run that is wanted and not finished, and for
    one that was made from other data."""
    missing: dict[Path, tuple[str, list[str]]] = {}  # run -> its arguments, the rows that read it
    for row in rows:
        for seed in seeds_of(job, row) if row in LEARNED else ():
            folder = source(job, row, seed)
            extra = " condense.dis_metrics=MMD" if row == "mean_matching" else ""
            if (folder / RESULT).exists():
                claim(folder, job.origin, f"run {job.program} with seed={seed}{extra} --overwrite")
            else:
                missing.setdefault(folder, (f"seed={seed}{extra}", []))[1].append(row)
    if missing:
        raise ConfigError(
            "\n".join(
                f"rows: {', '.join(names)}: no finished run {folder}: run {job.program} with the "
                f"same arguments and {arguments}, or leave the rows out"
                for folder, (arguments, names) in missing.items()
            )
        )


def judge_one(job: Job, arms: Arms, task: Task, on_step: OnStep) -> tuple[StudentScore, Arm]:
    """The numbers of one student and its training set."""
    row, seed, student, network = task
    cfg = job.cfg
    if row.startswith("tfidf"):
        which = arms.subset("full" if row == "tfidf_full" else "random", seed)
        found, data = job.linear(which), job.train.subset(which)
        on_step(cfg.evaluation.steps)
        return found, Arm(data, data.nbytes, len(data), "hard")
    arm = arms.get(row, seed)
    # The students of a number are the same in every row: rows differ in their data only.
    net = job.student(network, cfg.seed, "student", student)
    found = evaluate_student(
        net, arm.data, job.val, job.test, (job.parts(job.val), job.parts(job.test)), cfg.evaluation, cfg.multilabel,
        job.world.device, (cfg.seed, "student", student), on_step,
        None if row.endswith("_plain") else job.augmenter(teachers=False),
    )  # fmt: skip
    return found, arm


def student_name(task: Task) -> str:
    """Under which a student's numbers are kept."""
    row, seed, student, network = task
    return f"{row}{network and '_' + network}_seed{seed}_{student}"


def collect(job: Job, tasks: list[Task], found: list[dict[str, Any]]) -> list[Row]:
    """The rows of the table from the students' numbers."""
    rows = []
    for row, network in dict.fromkeys((task[0], task[3]) for task in tasks):
        own = [dict(v) for v, task in zip(found, tasks, strict=True) if (task[0], task[3]) == (row, network)]
        sizes = [(v.pop("bytes"), v.pop("documents"), v.pop("labels")) for v in own]
        nbytes, documents, labels = sizes[0]
        scores = [StudentScore(**v) for v in own]
        rows.append(summarise(row, network, job.cfg.condense.ipc, labels, scores, nbytes, documents))
    return rows


def table(rows: list[Row], multilabel: bool) -> Table:
    """The table of a run. With one label a sample, micro-F1 is accuracy and no threshold plays a part."""
    scores = ("micro", "macro", "micro_half", "macro_half", "map") if multilabel else ("micro", "macro", "map")
    titles = {"micro": "micro-F1" if multilabel else "accuracy", "macro": "macro-F1", "map": "mAP",
              "micro_half": "micro-F1 @.5", "macro_half": "macro-F1 @.5"}  # fmt: skip
    ends = ("threshold", "documents", "bytes", "s")[0 if multilabel else 1 :]

    def line(row: Row) -> tuple[str, ...]:
        values = row.as_dict()
        middle = [f"{values[f'{score}_mean']:.1f} ± {values[f'{score}_std']:.1f}" for score in scores]
        last = (f"{row.threshold:.2f}", str(row.documents), str(row.bytes), f"{row.seconds:.1f}")
        return (NAMES[row.name] + (f", {row.network}" if row.network else ""), *middle, *last[-len(ends) :])

    caption = "mean ± deviation over students; "
    caption += "threshold chosen on validation, then at 0.5; " if multilabel else ""
    header = ("training set", *(titles[score] for score in scores), *ends)
    return Table(header, tuple(map(line, rows)), caption + "seconds of one student's training")


def size_note(job: Job, rows: list[Row]) -> str:
    """How large the learned set is beside the training data."""
    learned = [r.bytes for r in rows if r.name in LEARNED and r.labels == "hard"]
    whole = f"{job.train.nbytes} bytes as {job.unit}"
    if not learned:
        return f"The training data takes {whole}."
    ratio = learned[0] / job.train.nbytes
    word = "LARGER in bytes than" if ratio > 1 else "smaller in bytes than"
    return (
        f"The learned set ({learned[0]} bytes of float32 numbers) is {word} the {len(job.train)} training samples "
        f"({whole}): {ratio:.2f} times their size."
    )


def robust_scores(rows: list[Row]) -> list[str]:
    """Label- and augmentation-robust scores of the configured network's rows, as far as they are there."""
    found = {row.name: row.micro_mean for row in rows if not row.network}
    lines = []
    if {"full", "condensed", "condensed_soft", "random_soft"} <= found.keys():
        value = label_robust_score(found["full"], found["condensed"], found["condensed_soft"], found["random_soft"])
        lines.append(f"Label-robust score (0 ... 100, no gain over random at 26.9 or below): {value:.1f}")
    if {"condensed", "random", "condensed_plain", "random_plain"} <= found.keys():
        value = augmentation_robust_score(
            found["condensed"], found["random"], found["condensed_plain"], found["random_plain"]
        )
        lines.append(f"Augmentation-robust score (0 ... 100, no gain over random at 26.9): {value:.1f}")
    return lines


def write(job: Job, run: RunFolder, rows: list[Row]) -> None:
    """report.json, report.md and report.html."""
    cfg, note = job.cfg, size_note(job, rows)
    value = {
        "dataset": cfg.data_name, "multilabel": cfg.multilabel, "select": cfg.evaluation.select,
        "origin": job.origin, "documents": len(job.train), "corpus_bytes": job.train.nbytes,
        "note": note, "robust_scores": robust_scores(rows), "rows": [row.as_dict() for row in rows],
    }  # fmt: skip
    atomic_write(run.folder / "report.json", json.dumps(value, indent=1).encode())
    title = f"{cfg.data_name}, {cfg.condense.ipc} samples per class; {cfg.evaluation.steps} steps a student."
    blocks: list[Block] = [Paragraph(title), table(rows, cfg.multilabel), Paragraph(note)]
    if cfg.evaluation.select == "best_test":
        blocks.insert(1, Paragraph("**Papers' protocol: every student's best state on the TEST set.**"))
    blocks += [Paragraph(line) for line in robust_scores(rows)]
    if "condensed" in cfg.evaluation.rows:
        folder = source(job, "condensed", seeds_of(job, "condensed")[0])
        curve = folder / "images" / "loss_curve.png"
        if curve.exists():
            blocks += [Heading("Curves of the condensation"), Picture(curve, folder.name)]
        best = load_synthetic(folder / "distilled_data" / "syn_data_best.pth")
        blocks += job.pictures(best, folder, run.folder / "images")
    write_report(run.folder, f"Condensed set judged: {cfg.data_name}", blocks)
    log.info(f"judged: {run.folder}")
