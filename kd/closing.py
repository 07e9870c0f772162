"""The end of a run: final scores, fidelity to its teacher, weights, an export without our code, the report."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kd.exported import export_student
from kd.kd_config import KdConfig
from kd.kd_data import KdData
from kd.methods.fidelity import Said, fidelity
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
CURVES = ("train_ce", "train_kd", "test_top1", "lr")
# Of every method; what a line of metrics says besides is of a mechanism.
USUAL = (*CURVES, "iteration", "epoch", "train_top1", "test_top5", "test_nll", "best_top1", "best_epoch")


def rows_of(
    net: ImageNetwork, data: KdData, part: ImageSet, which: Tensor, cfg: KdConfig, world: World
) -> Tensor | None:
    """What a network's head reads [n, D] of the centres of some images, on the CPU of rank 0."""

    def read(ids: Tensor) -> Tensor:
        return net.get_feature_single(data.test_input(part, which[ids], world.device))

    return all_logits(read, len(which), cfg.DATASET.TEST.BATCH_SIZE, world)


def logits_of(
    net: ImageNetwork, data: KdData, part: ImageSet, cfg: KdConfig, world: World, bf16: bool = False
) -> Tensor | None:
    """A network's logits [N, K] of the centres of a part of the images, on the CPU of rank 0; `bf16`: by autocast."""

    def read(which: Tensor) -> Tensor:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            return net(data.test_input(part, which, world.device)).logits

    return all_logits(read, len(part), cfg.DATASET.TEST.BATCH_SIZE, world)


def said_of(net: ImageNetwork, data: KdData, cfg: KdConfig, world: World, bf16: bool = False) -> Said | None:
    """What a network says of the test images, on rank 0; rows for CKA are of CKA_IMAGES at most, all over them."""
    some = torch.linspace(0, len(data.test) - 1, min(len(data.test), CKA_IMAGES)).long()
    logits = logits_of(net, data, data.test, cfg, world, bf16)
    rows = rows_of(net, data, data.test, some, cfg, world)
    return None if logits is None or rows is None else Said(logits, rows)


def tested(
    net: ImageNetwork, data: KdData, cfg: KdConfig, world: World, bf16: bool = False
) -> tuple[Said, dict[str, float]] | None:
    """What a network says of the test images and its final scores, on rank 0. All ranks together."""
    own = said_of(net, data, cfg, world, bf16)
    held = logits_of(net, data, data.held_out, cfg, world, bf16) if data.held_out else None
    if own is None:
        return None
    fitted = (held, data.held_out.labels) if held is not None and data.held_out else None
    return own, final_scores(own.logits, data.test.labels, fitted)


def finish_all(runs: Sequence[StudentRun], teacher: Teacher | None) -> list[tuple[str, dict[str, float]]]:
    """Names and numbers of runs whose DISTILLER.TEACHER it is, whoever taught them. All ranks together."""
    said = None
    if teacher and runs:
        said = said_of(teacher.net, runs[0].data, runs[0].cfg, runs[0].world)
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
    cfg, data = run.cfg, run.data
    if cfg.views == "bags":
        fit_head(run)
    result: dict[str, float] = {}
    if found := tested(run.net, data, cfg, run.world, cfg.SOLVER.AMP):
        own, result = found
        if said and cfg.distils:
            result |= fidelity(own, said, data.test.labels).as_dict()
        if cfg.views != "bags":  # whose head is fitted at the end
            result |= {"best_top1": run.best, "best_epoch": run.best_epoch}
        result |= {"epochs": cfg.epochs}
        result |= {"seconds": round(run.seconds, 1), "epoch_seconds": run.seconds / cfg.epochs}
        result |= {"parameters": sum(p.numel() for p in run.net.parameters())}
        write_files(run, result, group)
    run.folder.finish(result)
    return result


def described(cfg: KdConfig) -> str:
    """What a report begins with: method, mechanisms and networks of a run, and what its accuracies are."""
    d, between = cfg.DISTILLER, cfg.ASSISTANTS
    parts = ["+".join([d.TYPE, *(name for name in ("CTKD", "KCD") if getattr(cfg, name))]), d.STUDENT]
    if cfg.distils:
        parts[1] = f"{d.TEACHER} to {d.STUDENT}"
        if between.NETWORKS:
            taught = "all that are larger (DGKD)" if between.DENSE else "the next larger only (TAKD)"
            parts[1] += f" over ASSISTANTS {', '.join(between.NETWORKS)}, each taught by {taught}"
        parts.append(f"M {list(cfg.regions)}")
    tops = "top1 is of the last epoch; best_top1 was chosen on the test images."
    if cfg.views == "bags":
        tops = "top1 is that of a linear classifier fitted to the labels at the end; in training there is none."
    return f"{', '.join([*parts, cfg.DATASET.TYPE])}, seed {cfg.SEED}. {tops}"


def write_files(run: StudentRun, result: dict[str, float], group: Sequence[StudentRun]) -> None:
    """Weights, export, teacher's file and report (rank 0)."""
    folder, cfg, d = run.folder.folder, run.cfg, run.cfg.DISTILLER
    save_tensors(folder / LAST, run.weights())
    export_student(run.net, run.data.train.normaliser, run.data.size, folder / "student.pt2")
    run.net.to(run.world.device)
    heads = {
        name: value
        for term in run.learner.modules() if isinstance(term, HsakdTeacherTerm)
        for name, value in term.heads.state_dict().items()
    }  # fmt: skip
    if cfg.EXPERIMENT.SAVE_AS_TEACHER and not cfg.distils and not cfg.QUICK:
        name = d.STUDENT.removesuffix("_sdd")
        path = teacher_folder(cfg, name)
        path = path / f"{path.name.rpartition('_')[0]}.safetensors"
        if path.exists():
            log.info(f"{run.label}: the teacher in {path} is kept; remove it to have this one")
        else:
            if heads:
                save_tensors(path.with_name(HEADS), heads)
            save_tensors(path, run.weights(), {"run": run.label, "top1": f"{result['top1']:.2f}"})
            log.info(f"{run.label}: teacher written: {path}")
    lines, images = run.folder.metrics(), folder / "images"
    pictures = {"curves": [name for name in CURVES if name != "train_kd" or d.TYPE != "NONE"]}
    if cfg.views == "bags":
        pictures = {"curves": ["train_kd", "lr"]}
    pictures |= {name: [name] for line in lines for name in line if name not in USUAL}  # of CTKD, KCD
    for file, names in pictures.items():
        drawn = {name: [(int(x["epoch"]), x[name]) for x in lines if name in x] for name in names}
        loss_curve(images / f"{file}.png", drawn, "epoch", "value")
    rows = tuple((name, f"{value:.4g}") for name, value in result.items())
    blocks: list[Block] = [
        Paragraph(described(cfg)), Table(("number", "value"), rows), Heading("Training"),
        *(Picture(images / f"{file}.png", f"{', '.join(names)} by epoch") for file, names in pictures.items()),
    ]  # fmt: skip
    if others := [other for other in group if other is not run][: PANELS - 1]:
        beside = images / "beside.png"
        shown = {one.label: [(int(x["epoch"]), x["test_top1"]) for x in one.folder.metrics()] for one in (run, *others)}
        loss_curve(beside, shown, "epoch", "test_top1", same_scale=True)
        blocks += [Heading("Beside the runs of its group"), Picture(beside, "test_top1 by epoch")]
    write_report(folder, run.label, blocks)
    log.info(f"{run.label}: " + ", ".join(f"{name} {value}" for name, value in rows))
