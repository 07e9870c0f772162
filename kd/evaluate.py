"""Score a checkpoint of a student or a teacher: top-1, top-5, NLL, ECE, the last two at a fitted temperature as well.

    python kd/evaluate.py --cfg config/kd/cifar100/sdd_kd_lskd/res32x4_res8x4.yaml --checkpoint FILE
    python kd/evaluate.py --cfg RUN/args.log --checkpoint RUN/student.safetensors DATASET.VAL_FRACTION=0.1

The network is DISTILLER.STUDENT; the file is ours (.safetensors) or a public .pth. A temperature is fitted to the part
of the training images that DATASET.VAL_FRACTION holds out: only if the run held out the same is it fair.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

from functools import partial

import torch
from torch import Tensor

from config import CommandLine, LocalPath, Option, Resolved
from kd.kd_config import KdConfig
from kd.kd_data import KdData, load_kd_data
from kd.scoring import all_logits, final_scores, result_table
from utils.ddp import World
from utils.dry_run import print_values
from utils.image_networks import ImageNetwork
from utils.init_script import init_script
from utils.kd_networks import kd_network, load_public
from utils.program import leave, run_program
from utils.report import plain_table
from utils.run_folder import REPOSITORY, log
from utils.utils_image import ImageSet

OPTIONS = (Option("checkpoint", "CHECKPOINT", "path", "the network's file"),)


class EvaluateConfig(KdConfig):
    """A run's configuration, and a file."""

    CHECKPOINT: LocalPath


def part_logits(net: ImageNetwork, data: KdData, part: ImageSet, batch: int, world: World) -> Tensor | None:
    """Logits [N, K] of a part of the images, on the CPU of rank 0."""

    def read(which: Tensor) -> Tensor:
        return net(data.test_input(part, which, world.device)).logits

    return all_logits(read, len(part), batch, world)


@torch.no_grad()
def evaluate(resolved: Resolved[EvaluateConfig], command: CommandLine) -> None:
    """Print the table."""
    cfg = resolved.config
    if command.dry_run:
        print_values(resolved, cfg.CHECKPOINT)
        return
    with init_script(command.gpu, cfg.tf32, cfg.SEED, cfg.debug) as world:
        data = load_kd_data(cfg.DATASET)
        net = kd_network(cfg.DISTILLER.STUDENT, len(data.classes), data.train.channels, data.size, 0, "evaluate")
        load_public(cfg.DISTILLER.STUDENT, cfg.CHECKPOINT, net)
        logits = partial(part_logits, net.to(world.device).eval(), data, batch=cfg.DATASET.TEST.BATCH_SIZE, world=world)
        rows, held = logits(data.test), logits(data.held_out) if data.held_out else None
        if not data.held_out:
            log.info("no temperature is fitted: DATASET.VAL_FRACTION is 0")
        if rows is not None:
            fitted = (held, data.held_out.labels) if held is not None and data.held_out else None
            found = final_scores(rows, data.test.labels, fitted)
            print(plain_table(result_table([(cfg.CHECKPOINT.name, found)])))


TAKES = (EvaluateConfig, OPTIONS)


def main() -> int:
    """Exit status."""
    return run_program(__doc__ or "", REPOSITORY, *TAKES, evaluate)


if __name__ == "__main__":
    leave(main())
