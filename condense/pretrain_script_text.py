"""Train the teachers that text condensation matches features under.

    torchrun --nproc_per_node=2 condense/pretrain_script_text.py --config_path config/ipc5/docstrings.yaml

Each rank trains its share of the members; the same command goes on where it was stopped.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

import shutil
import sys
from pathlib import Path

from condense.dry_run_text import dry_run
from condense.text_job import OPTIONS, TextConfig, bank_folder, ensure_teachers, fresh_teacher, open_text
from condenser.evaluator import logits_of
from config import CommandLine, Resolved
from utils.init_script import init_script
from utils.metrics import best_threshold, probabilities, score
from utils.program import run_program
from utils.run_folder import log
from utils.sampling import buckets
from utils.stopping import stop_flag
from utils.teachers import load_bank


def pretrain(resolved: Resolved[TextConfig], command: CommandLine) -> None:
    """Train what is missing and log the members' validation scores."""
    cfg = resolved.config
    if command.dry_run:
        dry_run(resolved)
        return
    with init_script(command.gpu, cfg.tf32, cfg.seed, cfg.debug) as world, stop_flag() as flag:
        if command.overwrite and world.main:
            shutil.rmtree(bank_folder(cfg), ignore_errors=True)
        world.barrier()
        job = open_text(cfg, world)
        folder = ensure_teachers(cfg, job, world, flag)
        if not world.main:
            return
        net = fresh_teacher(cfg, job, 0).to(world.device)
        bank = load_bank(folder, cfg.condense.num_premodel, cfg.condense.teacher_model_epoch, net, world.device)
        parts = buckets(job.val.lengths.tolist(), cfg.condense.token_budget)
        for member in range(len(bank)):
            bank.interpolate(net, member, 0.0)
            probs = probabilities(logits_of(net, job.val, parts, world.device), cfg.dataset.is_multilabel)
            found = score(probs, job.val.targets, cfg.dataset.is_multilabel, best_threshold(probs, job.val.targets))
            log.info(f"teacher {member}: validation micro-F1 {found.micro:.1f}, macro-F1 {found.macro:.1f}")
        log.info(f"teachers: {folder}")


def main() -> int:
    """Exit status."""
    return run_program(__doc__ or "", Path(__file__).resolve().parent, TextConfig, OPTIONS, pretrain)


if __name__ == "__main__":
    sys.exit(main())
