"""A pretraining run of any modality: the teachers and how good they are."""

import shutil

from condense.job import Job, bank_folder, ensure_teachers, fresh_teacher, read_teachers
from condenser.evaluator import logits_of
from utils.metrics import best_threshold, probabilities, score
from utils.run_folder import log
from utils.stopping import StopFlag


def teach(job: Job, flag: StopFlag, overwrite: bool) -> None:
    """Train the teachers that are missing and log every one's validation scores."""
    cfg, world = job.cfg, job.world
    if overwrite and world.main:
        shutil.rmtree(bank_folder(cfg), ignore_errors=True)
    world.barrier()
    folder = ensure_teachers(job, flag)
    if not world.main:
        return
    net, targets = fresh_teacher(job, 0), job.val.targets
    bank = read_teachers(job, folder, net)
    for member in range(len(bank)):
        bank.interpolate(net, member, 0.0)
        probs = probabilities(logits_of(net, job.val, job.parts(job.val), world.device), cfg.multilabel)
        found = score(probs, targets, cfg.multilabel, best_threshold(probs, targets))
        log.info(f"teacher {member}: validation micro-F1 {found.micro:.1f}, macro-F1 {found.macro:.1f}")
    log.info(f"teachers: {folder}")
