"""The end of a run: final scores, weights, an export without our code, the report."""

from torch import Tensor

from kd.exported import export_student
from kd.kd_config import teacher_folder
from kd.scoring import all_logits, final_scores
from kd.student_run import StudentRun
from kd.teacher import Teacher
from utils.checkpoint import save_tensors
from utils.report import Block, Heading, Paragraph, Picture, Table, loss_curve, write_report
from utils.run_folder import log

LAST = "student.safetensors"


def teacher_logits(teacher: Teacher, run: StudentRun) -> Tensor | None:
    """The teacher's logits [N, K] of the test images, on the CPU of rank 0."""
    data, world = run.data, run.world

    def read(which: Tensor) -> Tensor:
        return teacher.logits(data.test_input(data.test, which, world.device))

    return all_logits(read, len(data.test), run.cfg.DATASET.TEST.BATCH_SIZE, world)


def finish(run: StudentRun, of_teacher: Tensor | None) -> dict[str, float]:
    """Write what a run ends with; its numbers on rank 0. All ranks together."""
    run.net.eval()
    data, batch, world = run.data, run.cfg.DATASET.TEST.BATCH_SIZE, run.world
    own = all_logits(lambda which: run.logits(data.test, which), len(data.test), batch, world)
    held, held_out = None, data.held_out
    if held_out:
        rows = all_logits(lambda which: run.logits(held_out, which), len(held_out), batch, world)
        held = None if rows is None else (rows, held_out.labels)
    result: dict[str, float] = {}
    if own is not None:
        result = final_scores(own, data.test.labels, held, of_teacher if run.cfg.distils else None)
        result |= {"best_top1": run.best, "best_epoch": run.best_epoch, "epochs": run.cfg.epochs}
        result |= {"seconds": round(run.seconds, 1), "parameters": sum(p.numel() for p in run.net.parameters())}
        write_files(run, result)
    run.folder.finish(result)
    return result


def write_files(run: StudentRun, result: dict[str, float]) -> None:
    """Weights, export, teacher's file and report (rank 0)."""
    folder, d = run.folder.folder, run.cfg.DISTILLER
    save_tensors(folder / LAST, run.weights())
    export_student(run.net, run.data.train.normaliser, run.data.size, folder / "student.pt2")
    run.net.to(run.world.device)
    if run.cfg.EXPERIMENT.SAVE_AS_TEACHER and not run.cfg.distils and not run.cfg.QUICK:
        name = d.STUDENT.removesuffix("_sdd")
        path = teacher_folder(run.cfg, name)
        path = path / f"{path.name.removesuffix('_vanilla')}.safetensors"
        if path.exists():
            log.info(f"{run.label}: the teacher in {path} is kept; remove it to have this one")
        else:
            save_tensors(path, run.weights(), {"run": run.label, "top1": f"{result['top1']:.2f}"})
            log.info(f"{run.label}: teacher written: {path}")
    lines = run.folder.metrics()
    curves = folder / "images" / "curves.png"
    names = [n for n in ("train_ce", "train_kd", "test_top1", "lr") if n != "train_kd" or run.cfg.distils]
    loss_curve(curves, {n: [(int(x["epoch"]), x[n]) for x in lines] for n in names}, "epoch", "value")
    rows = tuple((name, f"{value:.4g}") for name, value in result.items())
    networks = f"{d.TEACHER} to {d.STUDENT}, M {list(run.cfg.regions)}" if run.cfg.distils else d.STUDENT
    blocks: list[Block] = [
        Paragraph(
            f"{d.TYPE}, {networks}, {run.cfg.DATASET.TYPE}, seed {run.cfg.SEED}. top1 is of the last epoch; "
            "best_top1 was chosen on the test images."
        ),
        Table(("number", "value"), rows), Heading("Training"), Picture(curves, "by epoch"),
    ]  # fmt: skip
    write_report(folder, run.label, blocks)
    log.info(f"{run.label}: " + ", ".join(f"{name} {value}" for name, value in rows))
