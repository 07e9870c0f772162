"""Learn a few images per class whose features match those of the real images (NCFM).

    torchrun --nproc_per_node=2 condense/condense_script.py --config_path config/ipc10/cifar10.yaml

Each rank owns some of the classes. To resume, run the same command again. Missing teachers are trained first.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

from pathlib import Path

from condense.dry_run_image import dry_run
from condense.image_job import OPTIONS, ImageConfig, open_images
from condense.job import condense_folder
from condense.learning import learn
from config import CommandLine, Resolved, nested
from utils.init_script import init_script
from utils.program import leave, run_program
from utils.run_folder import RunFolder, claim
from utils.stopping import stop_flag


def condense(resolved: Resolved[ImageConfig], command: CommandLine) -> None:
    """One condensation run, from teachers to report."""
    cfg = resolved.config
    if command.dry_run:
        dry_run(resolved)
        return
    with init_script(command.gpu, cfg.tf32, cfg.seed, cfg.debug) as world, stop_flag() as flag:
        run = RunFolder(condense_folder(cfg), nested(cfg), world, command.overwrite)
        if not run.said_finished():
            job = open_images(cfg, world)
            if world.main:
                claim(run.folder, job.origin)
            learn(job, run, flag)


TAKES = (ImageConfig, OPTIONS)


def main() -> int:
    """Exit status."""
    return run_program(__doc__ or "", Path(__file__).resolve().parent, *TAKES, condense)


if __name__ == "__main__":
    leave(main())
