"""Learn a few documents per class, as word embeddings, whose features match those of the real documents (NCFM).

    torchrun --nproc_per_node=6 --nnodes=1 condense_script_text.py --gpu="0,2,3,4,5,6" \
        --config_path=../config/ipc10/reuters.yaml

Each rank owns some of the classes. To resume, run the same command again. Missing teachers are trained first.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

import sys
from pathlib import Path

from condense.dry_run_text import class_costs, dry_run
from condense.text_job import (
    OPTIONS,
    TextConfig,
    TextJob,
    condense_folder,
    ensure_teachers,
    fresh_teacher,
    open_text,
)
from condense.words import nearest_words
from condenser.Condenser_text import Condenser
from condenser.evaluator import held_out_micro, logits_of, train_student
from condenser.loop import Score
from condenser.synthetic_set import SyntheticSet, load_synthetic
from condenser.synthetic_text import student_view
from config import CommandLine, Resolved
from config.loader import flatten
from utils.ddp import World, distribute_class
from utils.init_script import init_script
from utils.metrics import probabilities
from utils.program import run_program
from utils.report import Block, Heading, Paragraph, Picture, Table, write_report
from utils.run_folder import RunFolder, log
from utils.sampling import buckets
from utils.stopping import stop_flag
from utils.teachers import load_bank


def condense(resolved: Resolved[TextConfig], command: CommandLine) -> None:
    """One condensation run, from teachers to report."""
    cfg = resolved.config
    if command.dry_run:
        dry_run(resolved)
        return
    with init_script(command.gpu, cfg.tf32, cfg.seed, cfg.debug) as world, stop_flag() as flag:
        run = RunFolder(condense_folder(cfg), nested(cfg), world, command.overwrite)
        if run.finished():
            log.info(f"finished already: {run.folder} (--overwrite starts again)")
            return
        job = open_text(cfg, world)
        teachers = ensure_teachers(cfg, job, world, flag)
        condenser = make_condenser(cfg, job, world, teachers)
        result = condenser.condense(cfg.optimization, run, flag, held_out_score(cfg, job, world), cfg.debug)
        if world.main:
            report(cfg, job, run)
        run.finish(result)
        log.info(f"condensed set: {run.folder / 'distilled_data'}")


def nested(cfg: TextConfig) -> dict[str, object]:
    """The resolved configuration as it stands in args.log, which --config_path reads again."""
    tree: dict[str, object] = {}
    for key, value in flatten(cfg).items():
        section, _, name = key.rpartition(".")
        inner = tree.setdefault(section, {}) if section else tree
        if isinstance(inner, dict):
            inner[name] = value
    return tree


def make_condenser(cfg: TextConfig, job: TextJob, world: World, teachers: Path) -> Condenser:
    """The condenser of this rank's classes."""
    costs = class_costs(cfg, [len(ids) for ids in job.train.members()])
    classes = [
        distribute_class(cfg.dataset.nclass, cfg.debug, costs=costs, rank=rank, size=world.size)
        for rank in range(world.size)
    ]
    if world.main and any(not part for part in classes):
        log.info(f"{world.size} ranks share {sum(map(len, classes))} classes: some ranks own none and only help")
    networks = (fresh_teacher(cfg, job, 0), fresh_teacher(cfg, job, 0))
    bank = load_bank(
        teachers,
        cfg.condense.num_premodel,
        cfg.condense.teacher_model_epoch,
        networks[0].to(world.device),
        world.device,
    )
    return Condenser(
        nclass_list=classes,
        device=world.device,
        settings=cfg.condense,
        documents=job.train,
        networks=networks,
        bank=bank,
        table=job.factory.word_table,
        frame=(int(job.tokenizer.cls_token_id), int(job.tokenizer.sep_token_id)),
        max_length=cfg.network.max_length,
        batch_real=cfg.dataset.batch_real,
        multilabel=cfg.dataset.is_multilabel,
        seed=cfg.seed,
        world=world,
        dataset=cfg.dataset.dataset,
    )


def held_out_score(cfg: TextConfig, job: TextJob, world: World) -> Score:
    """Validation micro-F1 of one fresh student trained on a set."""
    parts = buckets(job.val.lengths.tolist(), cfg.condense.token_budget)

    def score(found: SyntheticSet) -> float:
        net = job.factory.fresh(cfg.seed, "held-out student")
        stream = (cfg.seed, "held-out student", 0)
        e, multilabel = cfg.evaluation, cfg.dataset.is_multilabel
        train_student(net, student_view(found), e, e.steps, multilabel, world.device, stream)
        return held_out_micro(
            probabilities(logits_of(net, job.val, parts, world.device), multilabel),
            job.val.targets,
            multilabel,
        )

    return score


def report(cfg: TextConfig, job: TextJob, run: RunFolder) -> None:
    """report.md and report.html: curves and the nearest words of a few rows."""
    found = load_synthetic(run.folder / "distilled_data" / "syn_data_best.pth")
    rows = nearest_words(found, job.factory.word_table, job.tokenizer, job.corpus.classes)
    lines = [line for line in run.metrics() if "val_micro" in line]
    blocks: list[Block] = [
        Paragraph(f"{cfg.dataset.dataset}, {cfg.condense.ipc} documents per class, {cfg.condense.dis_metrics}."),
        Heading("Curves"),
        *([Picture(run.folder / "images" / "loss_curve.png", "mean over classes")] if cfg.condense.niter else []),
        Heading("Held-out score"),
        Table(
            ("iteration", "validation micro-F1"),
            tuple((str(int(x["iteration"])), f"{x['val_micro']:.1f}") for x in lines),
        ),
        Heading("Nearest words of the learned rows"),
        Table(("class", "labels", "words"), rows),
    ]
    write_report(run.folder, f"Condensed text: {cfg.dataset.dataset}", blocks)


def main() -> int:
    """Exit status."""
    return run_program(__doc__ or "", Path(__file__).resolve().parent, TextConfig, OPTIONS, condense)


if __name__ == "__main__":
    sys.exit(main())
