"""Judge a condensed image set as the memory of a learner whose classes arrive in stages.

    python condense/continual_script.py --config_path config/ipc10/digits.yaml continual.stages=5

After each stage a fresh student is trained on what is kept of all classes so far and tested on them. The condensed
rows are those of the condensation run of the same configuration. To resume, run the same command again.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

import json
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from condense.arms import NAMES, Arms
from condense.dry_run_image import dry_run
from condense.image_job import OPTIONS, ImageConfig, ImageJob, open_images
from condense.job import evaluate_folder
from condense.judging import check_runs
from condenser.evaluator import Part, RowName, TrainingSet, logits_of, train_student
from config import CommandLine, Resolved, Section, nested
from utils.checkpoint import atomic_write
from utils.init_script import init_script
from utils.program import leave, run_program
from utils.progress import Progress
from utils.report import Block, Paragraph, Picture, Table, loss_curve, plain_table, write_report
from utils.run_folder import RunFolder
from utils.stopping import StopFlag, stop_flag
from utils.streams import generator


class StagesConfig(Section):
    """In how many stages classes arrive, in how many orders, and what is kept of them."""

    stages: int = Field(5, ge=1)
    orders: int = Field(3, ge=1)  # random orders of the classes, a student each
    rows: tuple[RowName, ...] = ("condensed", "random", "herding", "full")


class ContinualConfig(ImageConfig):
    """An image run and its stages."""

    continual: StagesConfig = StagesConfig()


Task = tuple[str, int, int]  # row, number of the order, stage


def continual_folder(cfg: ContinualConfig) -> Path:
    """Folder of the run."""
    return Path(*("continual" if part == "evaluate" else part for part in evaluate_folder(cfg).parts))


def learn_in_stages(resolved: Resolved[ContinualConfig], command: CommandLine) -> None:
    """Train the students of every row, order and stage, then show the table."""
    cfg = resolved.config
    if command.dry_run:
        dry_run(resolved)
        return
    with init_script(command.gpu, cfg.tf32, cfg.seed, cfg.debug) as world, stop_flag() as flag:
        run = RunFolder(continual_folder(cfg), nested(cfg), world, command.overwrite)
        if not run.said_finished():
            job = open_images(cfg, world)
            train_stages(cfg, job, run, flag)
            if world.main:
                write(cfg, run)
            run.finish({"rows": len(cfg.continual.rows)})
        if world.main:
            print(plain_table(table(cfg, run)))
            print(f"report: {run.folder / 'report.html'}", flush=True)


def train_stages(cfg: ContinualConfig, job: ImageJob, run: RunFolder, flag: StopFlag) -> None:
    """The students that have no number yet, each rank its share."""
    check_runs(job, cfg.continual.rows)
    c = cfg.continual
    tasks = [(row, order, stage) for row in c.rows for order in range(c.orders) for stage in range(c.stages)]
    open_tasks = job.world.broadcast([task for task in tasks if not score_file(run, task).exists()])
    arms, augment = Arms(job, flag, c.rows), job.augmenter(teachers=False)
    mine = job.world.share([1.0] * len(open_tasks))
    progress = Progress("students", len(mine) * cfg.evaluation.steps, shown=job.world.main)

    def step(done: int) -> None:
        progress.step()
        flag.check()

    for i in mine:
        row, order, stage = open_tasks[i]
        seen = classes_so_far(cfg.nclass, c.stages, stage, order, cfg.seed)
        net = job.fresh(cfg.seed, "continual student", order, stage)
        stream, device = (cfg.seed, "continual student", order * c.stages + stage), job.world.device
        memory = of_classes(arms.get(row, cfg.seed).data, seen)
        train_student(net, memory, cfg.evaluation, cfg.evaluation.steps, False, device, stream, step, augment)
        test = of_classes(job.test, seen)
        hit = logits_of(net, test, job.parts(test), device).argmax(1) == test.targets.argmax(1)
        value = {"accuracy": 100 * float(hit.float().mean()), "classes": len(seen)}
        atomic_write(score_file(run, (row, order, stage)), json.dumps(value).encode())
    progress.close()
    job.world.barrier()


def classes_so_far(nclass: int, stages: int, stage: int, order: int, seed: int) -> Tensor:
    """Classes of stages 0 ... `stage`: equal parts of a random order, the same whatever is kept of them."""
    shuffled = torch.randperm(nclass, generator=generator(seed, "class order", order))
    return shuffled[: -(-nclass * (stage + 1) // stages)].sort().values


def of_classes(data: TrainingSet, classes: Tensor) -> Part:
    """The samples of these classes."""
    return Part(data, torch.isin(data.targets.argmax(1), classes).nonzero().flatten())


def score_file(run: RunFolder, task: Task) -> Path:
    """Where a student's accuracy is kept."""
    return run.folder / "students" / f"{task[0]}_order{task[1]}_stage{task[2]}.json"


def curves(cfg: ContinualConfig, run: RunFolder) -> dict[str, list[tuple[int, float, float]]]:
    """Of every row: (classes seen, mean accuracy, deviation over orders) after each stage."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for row in cfg.continual.rows:
        for stage in range(cfg.continual.stages):
            files = [score_file(run, (row, order, stage)) for order in range(cfg.continual.orders)]
            values = [json.loads(file.read_text()) for file in files]
            scores = torch.tensor([value["accuracy"] for value in values])
            spread = float(scores.std()) if len(scores) > 1 else 0.0
            found.setdefault(row, []).append((int(values[0]["classes"]), float(scores.mean()), spread))
    return found


def table(cfg: ContinualConfig, run: RunFolder) -> Table:
    """A row for every memory, a column for every stage."""
    found = curves(cfg, run)
    header = ("memory", *(f"{classes} classes" for classes, _, _ in next(iter(found.values()))))
    lines = tuple((NAMES[row], *(f"{mean:.1f} ± {std:.1f}" for _, mean, std in line)) for row, line in found.items())
    return Table(header, lines, "accuracy on the classes so far, mean ± deviation over class orders")


def write(cfg: ContinualConfig, run: RunFolder) -> None:
    """report.json, report.md and report.html."""
    found = curves(cfg, run)
    atomic_write(run.folder / "report.json", json.dumps({"rows": found}, indent=1).encode())
    picture = run.folder / "images" / "accuracy.png"
    series = {NAMES[row]: [(classes, mean) for classes, mean, _ in line] for row, line in found.items()}
    loss_curve(picture, series, "classes so far", "accuracy", same_scale=True)
    title = f"{cfg.data_name}, {cfg.condense.ipc} samples per class kept, {cfg.continual.stages} stages."
    blocks: list[Block] = [Paragraph(title), table(cfg, run), Picture(picture, "accuracy on the classes so far")]
    write_report(run.folder, f"Class-incremental learning: {cfg.data_name}", blocks)


TAKES = (ContinualConfig, OPTIONS)


def main() -> int:
    """Exit status."""
    return run_program(__doc__ or "", Path(__file__).resolve().parent, *TAKES, learn_in_stages)


if __name__ == "__main__":
    leave(main())
