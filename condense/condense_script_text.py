"""Learn a few documents per class, as word embeddings, whose features match those of the real documents (NCFM).

    torchrun --nproc_per_node=6 condense/condense_script_text.py --config_path config/ipc10/reuters.yaml

Each rank owns some of the classes. To resume, run the same command again. Missing teachers are trained first.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

from pathlib import Path

from condense.dry_run_text import dry_run
from condense.job import OPTIONS, condense_folder
from condense.learning import learn
from condense.text_job import TextConfig, open_text
from config import CommandLine, Resolved, nested
from utils.init_script import init_script
from utils.program import leave, run_program
from utils.run_folder import RunFolder, claim
from utils.stopping import stop_flag


def condense(resolved: Resolved[TextConfig], command: CommandLine) -> None:
    """One condensation run, from teachers to report."""
    cfg = resolved.config
    if command.dry_run:
        dry_run(resolved)
        return
    with init_script(command.gpu, cfg.tf32, cfg.seed, cfg.debug) as world, stop_flag() as flag:
        run = RunFolder(condense_folder(cfg), nested(cfg), world, command.overwrite)
        if not run.said_finished():
            job = open_text(cfg, world)
            if world.main:
                claim(run.folder, job.origin)
            learn(job, run, flag)


TAKES = (TextConfig, OPTIONS)


def main() -> int:
    """Exit status."""
    return run_program(__doc__ or "", Path(__file__).resolve().parent, *TAKES, condense)


if __name__ == "__main__":
    leave(main())
