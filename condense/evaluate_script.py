"""Judge a condensed image set beside the sets it has to beat: fresh students of each, tested on real images.

    torchrun --nproc_per_node=2 condense/evaluate_script.py --config_path config/ipc10/digits.yaml

The condensed rows are those of the condensation runs of the same configuration. Students are shared out over the
ranks, and the numbers of each are kept in the run folder. To resume, run the same command again.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

from pathlib import Path

from condense.dry_run_image import dry_run
from condense.image_job import OPTIONS, ImageConfig, open_images
from condense.job import evaluate_folder
from condense.judging import judge_rows, show
from config import CommandLine, Resolved, nested
from utils.init_script import init_script
from utils.program import leave, run_program
from utils.run_folder import RunFolder
from utils.stopping import stop_flag


def evaluate(resolved: Resolved[ImageConfig], command: CommandLine) -> None:
    """Train the students of every row, then show the table."""
    cfg = resolved.config
    if command.dry_run:
        dry_run(resolved)
        return
    with init_script(command.gpu, cfg.tf32, cfg.seed, cfg.debug) as world, stop_flag() as flag:
        run = RunFolder(evaluate_folder(cfg), nested(cfg), world, command.overwrite)
        if not run.said_finished():
            judge_rows(open_images(cfg, world), run, flag)
        show(run)


TAKES = (ImageConfig, OPTIONS)


def main() -> int:
    """Exit status."""
    return run_program(__doc__ or "", Path(__file__).resolve().parent, *TAKES, evaluate)


if __name__ == "__main__":
    leave(main())
