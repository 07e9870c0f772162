"""A condensation run of any modality: teachers, the loop with its held-out score, the report."""

from pathlib import Path

from condense.job import Job, ensure_teachers, make_condenser
from condenser.evaluator import held_out_micro, logits_of, train_student
from condenser.loop import Score
from condenser.synthetic_set import SyntheticSet, load_synthetic
from utils.metrics import probabilities
from utils.report import Block, Heading, Paragraph, Picture, Table, write_report
from utils.run_folder import RunFolder, log
from utils.stopping import StopFlag


def learn(job: Job, run: RunFolder, flag: StopFlag) -> None:
    """Learn the set, from the run's last state if there is one, and write its report."""
    teachers = ensure_teachers(job, flag)
    condenser = make_condenser(job, teachers)
    result = condenser.condense(job.cfg.optimization, run, flag, held_out_score(job), job.cfg.debug)
    if job.world.main:
        report(job, run)
    log.info(f"condensed set: {run.folder / 'distilled_data'}")
    run.finish(result)


def held_out_score(job: Job) -> Score:
    """Validation micro-F1 of one fresh student trained on a set."""
    cfg, device = job.cfg, job.world.device
    parts = job.parts(job.val)

    def score(found: SyntheticSet) -> float:
        net = job.fresh(cfg.seed, "held-out student")
        stream = (cfg.seed, "held-out student", 0)
        e = cfg.evaluation
        data = job.student_view(found, Path("syn_data"))
        train_student(net, data, e, e.steps, cfg.multilabel, device, stream, augment=job.augmenter(teachers=False))
        probs = probabilities(logits_of(net, job.val, parts, device), cfg.multilabel)
        return held_out_micro(probs, job.val.targets, cfg.multilabel)

    return score


def report(job: Job, run: RunFolder) -> None:
    """report.md and report.html: curves and what a few samples look like."""
    cfg = job.cfg
    found = load_synthetic(run.folder / "distilled_data" / "syn_data_best.pth")
    lines = [line for line in run.metrics() if "val_micro" in line]
    blocks: list[Block] = [
        Paragraph(f"{cfg.data_name}, samples per class: {cfg.condense.ipc}, {cfg.condense.dis_metrics}."),
        Heading("Curves"),
        *([Picture(run.folder / "images" / "loss_curve.png", "mean over classes")] if cfg.condense.niter else []),
        Heading("Held-out score"),
        Table(
            ("iteration", "validation micro-F1"),
            tuple((str(int(x["iteration"])), f"{x['val_micro']:.1f}") for x in lines),
        ),
        *job.pictures(found, run.folder, run.folder / "images"),
    ]
    write_report(run.folder, f"Condensed: {cfg.data_name}", blocks)
