"""Train the teachers that image condensation matches features under.

    torchrun --nproc_per_node=2 condense/pretrain_script.py --config_path config/ipc10/digits.yaml

Each rank trains its share of the members. To resume, run the same command again.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

from pathlib import Path

from condense.dry_run_image import dry_run
from condense.image_job import OPTIONS, ImageConfig, open_images
from condense.teaching import teach
from config import CommandLine, Resolved
from utils.init_script import init_script
from utils.program import leave, run_program
from utils.stopping import stop_flag


def pretrain(resolved: Resolved[ImageConfig], command: CommandLine) -> None:
    """Train what is missing and log the members' validation scores."""
    cfg = resolved.config
    if command.dry_run:
        dry_run(resolved)
        return
    with init_script(command.gpu, cfg.tf32, cfg.seed, cfg.debug) as world, stop_flag() as flag:
        teach(open_images(cfg, world), flag, command.overwrite)


TAKES = (ImageConfig, OPTIONS)


def main() -> int:
    """Exit status."""
    return run_program(__doc__ or "", Path(__file__).resolve().parent, *TAKES, pretrain)


if __name__ == "__main__":
    leave(main())
