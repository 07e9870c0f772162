"""The end of a run: final scores, fidelity to its teacher, weights, an export without our code, the report."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd.exported import export_student
from kd.kd_config import KdConfig
from kd.kd_data import KdData
from kd.methods.fidelity import fidelity, linear_cka
from kd.methods.probe import linear_probe
from kd.methods.terms import HsakdTeacherTerm
from kd.places import HEADS, LAST, teacher_folder
from kd.scoring import all_logits, final_scores
from kd.student_run import StudentRun
from kd.teacher import Teacher
from utils.checkpoint import save_tensors
from utils.ddp import World
from utils.image_networks import ImageNetwork
from utils.report import Block, Heading, Paragraph, Picture, Table, loss_curve, write_report
from utils.run_folder import log
from utils.utils_image import ImageSet

CKA_IMAGES = 2000  # at most, all over the test set
PANELS = 6  # runs in one picture, at most


@dataclass(frozen=True)
class Said:
    """What a teacher says of the test images: logits [N, K], and what its head reads [n, D] of those for CKA."""

    logits: Tensor
    rows: Tensor


def rows_of(
    net: ImageNetwork, data: KdData, part: ImageSet, which: Tensor, cfg: KdConfig, world: World
) -> Tensor | None:
    """What a network's head reads [n, D] of the centres of some images, on the CPU of rank 0."""

    def read(ids: Tensor) -> Tensor:
        return net.get_feature_single(data.test_input(part, which[ids], world.device))

    return all_logits(read, len(which), cfg.DATASET.TEST.BATCH_SIZE, world)


def for_cka(data: KdData) -> Tensor:
    """Test images all over the set."""
    return torch.linspace(0, len(data.test) - 1, min(len(data.test), CKA_IMAGES)).long()


def finish_all(runs: Sequence[StudentRun], teachers: Sequence[Teacher]) -> list[tuple[str, dict[str, float]]]:
    """Names and numbers of runs of one teacher; of several, fidelity is to the largest. All ranks together."""
    said = None
    if teachers and runs:
        data, world, cfg = runs[0].data, runs[0].world, runs[0].cfg

        def read(which: Tensor) -> Tensor:
            return teachers[0].logits(data.test_input(data.test, which, world.device))

        logits = all_logits(read, len(data.test), cfg.DATASET.TEST.BATCH_SIZE, world)
        rows = rows_of(teachers[0].net, data, data.test, for_cka(data), cfg, world)
        said = None if logits is None or rows is None else Said(logits, rows)
    return [(run.label, finish(run, said, runs)) for run in runs]


def fit_head(run: StudentRun) -> None:
    """Give a student that saw no labels the best linear classifier of its standardised features. All ranks together."""
    train, world, found = run.data.train, run.world, None
    rows = rows_of(run.net, run.data, train, torch.arange(len(train)), run.cfg, world)
    if rows is not None:
        mean, spread = rows.double().mean(0), rows.double().std(0, correction=0)
        scale = torch.where(spread > 0, spread, 1)
        probe = linear_probe((rows - mean) / scale, train.labels, len(run.data.classes))
        found = {"weight": probe.weight / scale, "bias": probe.bias - probe.weight @ (mean / scale)}
    run.net.head.load_state_dict(world.broadcast(found))


def finish(run: StudentRun, said: Said | None, group: Sequence[StudentRun]) -> dict[str, float]:
    """Write what a run of a group ends with; its numbers on rank 0. All ranks together."""
    run.net.eval()
    data, batch, world = run.data, run.cfg.DATASET.TEST.BATCH_SIZE, run.world
    if run.cfg.views == "bags":
        fit_head(run)
    own = all_logits(lambda which: run.logits(data.test, which), len(data.test), batch, world)
    rows = rows_of(run.net, data, data.test, for_cka(data), run.cfg, world) if run.cfg.distils else None
    held, held_out = None, data.held_out
    if held_out:
        of_held = all_logits(lambda which: run.logits(held_out, which), len(held_out), batch, world)
        held = None if of_held is None else (of_held, held_out.labels)
    result: dict[str, float] = {}
    if own is not None:
        result = final_scores(own, data.test.labels, held)
        if said is not None and rows is not None:
            found = fidelity(own, said.logits, data.test.labels)
            result |= {"agreement": found.agreement, "kl_to_teacher": found.kl, "js_to_teacher": found.js}
            result |= {"cka": 100 * linear_cka(rows, said.rows)}
            result |= {f"teacher_{name}": value for name, value in found.teacher.as_dict().items()}
        result |= {"best_top1": run.best, "best_epoch": run.best_epoch, "epochs": run.cfg.epochs}
        result |= {"seconds": round(run.seconds, 1), "epoch_seconds": run.seconds / run.cfg.epochs}
        result |= {"parameters": sum(p.numel() for p in run.net.parameters())}
        write_files(run, result, group)
    run.folder.finish(result)
    return result


def write_files(run: StudentRun, result: dict[str, float], group: Sequence[StudentRun]) -> None:
    """Weights, export, teacher's file and report (rank 0)."""
    folder, d = run.folder.folder, run.cfg.DISTILLER
    save_tensors(folder / LAST, run.weights())
    export_student(run.net, run.data.train.normaliser, run.data.size, folder / "student.pt2")
    run.net.to(run.world.device)
    heads = {
        name: value
        for term in run.learner.modules() if isinstance(term, HsakdTeacherTerm)
        for name, value in term.heads.state_dict().items()
    }  # fmt: skip
    if run.cfg.EXPERIMENT.SAVE_AS_TEACHER and not run.cfg.distils and not run.cfg.QUICK:
        name = d.STUDENT.removesuffix("_sdd")
        path = teacher_folder(run.cfg, name)
        path = path / f"{path.name.rpartition('_')[0]}.safetensors"
        if path.exists():
            log.info(f"{run.label}: the teacher in {path} is kept; remove it to have this one")
        else:
            if heads:
                save_tensors(path.with_name(HEADS), heads)
            save_tensors(path, run.weights(), {"run": run.label, "top1": f"{result['top1']:.2f}"})
            log.info(f"{run.label}: teacher written: {path}")
    lines = run.folder.metrics()
    curves = folder / "images" / "curves.png"
    names = [n for n in ("train_ce", "train_kd", "test_top1", "lr") if n != "train_kd" or d.TYPE != "NONE"]
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
    if others := [other for other in group if other is not run][: PANELS - 1]:
        beside = folder / "images" / "beside.png"
        shown = {one.label: [(int(x["epoch"]), x["test_top1"]) for x in one.folder.metrics()] for one in (run, *others)}
        loss_curve(beside, shown, "epoch", "test_top1")
        blocks += [Heading("Beside the runs of its group"), Picture(beside, "test_top1 by epoch")]
    write_report(folder, run.label, blocks)
    log.info(f"{run.label}: " + ", ".join(f"{name} {value}" for name, value in rows))
