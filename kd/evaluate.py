"""Score a checkpoint of a student or a teacher: top-1, top-5, NLL, ECE, the last two at a fitted temperature as well.

    python kd/evaluate.py --cfg config/kd/cifar100/sdd_kd_lskd/res32x4_res8x4.yaml --checkpoint FILE
    python kd/evaluate.py --cfg RUN/args.log --checkpoint RUN/student.safetensors DATASET.VAL_FRACTION=0.1
    python kd/evaluate.py --cfg RUN/args.log --checkpoint RUN/student.safetensors --against TEACHER.safetensors

The network is DISTILLER.STUDENT; the file is ours (.safetensors) or a public .pth. --against is a file of
DISTILLER.TEACHER: agreement, KL, JS and CKA say how far the network does on the test images what that one does. A
temperature is fitted to the part of the training images that DATASET.VAL_FRACTION holds out: only if the run held out
the same is it fair.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

import torch
from pydantic import model_validator

from config import CommandLine, LocalPath, Option, Resolved
from kd.closing import tested
from kd.kd_config import KdConfig
from kd.kd_data import load_kd_data
from kd.methods.fidelity import fidelity
from kd.scoring import result_table
from kd.teacher import Teacher
from utils.dry_run import print_values
from utils.init_script import init_script
from utils.kd_networks import kd_network, load_public
from utils.program import leave, run_program
from utils.report import plain_table
from utils.run_folder import REPOSITORY, log

OPTIONS = (
    Option("checkpoint", "CHECKPOINT", "path", "the network's file"),
    Option("against", "AGAINST", "path", "file of DISTILLER.TEACHER, to which the network is compared"),
)


class EvaluateConfig(KdConfig):
    """A run's configuration, and a file or two."""

    CHECKPOINT: LocalPath
    AGAINST: LocalPath | None = None

    @model_validator(mode="after")
    def whose(self) -> "EvaluateConfig":
        """The second file is of a network that has a name."""
        if self.AGAINST and not self.DISTILLER.TEACHER:
            raise ValueError(f"AGAINST: {self.AGAINST} is of DISTILLER.TEACHER, which is not set; name the network")
        return self


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
        nets = {cfg.CHECKPOINT.name: net.to(world.device).eval()}
        if cfg.AGAINST:
            teacher = Teacher(cfg.DISTILLER.TEACHER or "", cfg.AGAINST, data, False, world.device)
            nets[f"against {cfg.AGAINST.name}"] = teacher.net
        if data.held_out:
            log.info("a temperature is fitted to what DATASET.VAL_FRACTION holds out: fair only if the run held it out")
        else:
            log.info("no temperature is fitted: DATASET.VAL_FRACTION is 0")
        found = {name: result for name, one in nets.items() if (result := tested(one, data, cfg, world))}
        if found:
            (own, scores), *others = found.values()
            for other, _ in others:
                scores.update(fidelity(own, other, data.test.labels).pair)
            print(plain_table(result_table([(name, numbers) for name, (_, numbers) in found.items()])))


TAKES = (EvaluateConfig, OPTIONS)


def main() -> int:
    """Exit status."""
    return run_program(__doc__ or "", REPOSITORY, *TAKES, evaluate)


if __name__ == "__main__":
    leave(main())
