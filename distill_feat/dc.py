"""Learn a few images per class, each with a feature label (x, y, F), by gradient matching (DC, DSA), and judge them.

    torchrun --nproc_per_node=2 distill_feat/dc.py --config_path config/distill_feat/dc/digits_ipc1.yaml

Each rank owns some of the classes. To resume, run the same command again. --generate_pretrained only writes the set as
it starts. The table has the four numbers {no F, F} x {no views, views}, and what else the same bytes could hold.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

from pathlib import Path

from pydantic import model_validator

from condenser.gradient_condenser import GradientCondenser, GradientConfig
from config import Option
from distill_feat.feat_job import FeatConfig, FeatJob
from distill_feat.feat_names import OPTIONS
from distill_feat.feat_run import Method
from utils.ddp import World, distribute_class
from utils.program import leave, run_program
from utils.stopping import StopFlag

HERE = Path(__file__).resolve().parent
DEFAULT = HERE.parent / "config" / "distill_feat" / "dc" / "cifar10_ipc9.yaml"
DC_OPTIONS = (
    *OPTIONS,
    Option("dis_metric", "condense.dis_metric", "value", "distance of gradients", ("ours", "mse", "cos")),
    Option("batch_real", "dataset.batch_real", "value", "real images of a class and step"),
    Option("batch_train", "condense.batch_train", "value", "images of a step of the inner loop"),
)


class DcConfig(FeatConfig):
    """A run of DC."""

    condense: GradientConfig

    @model_validator(mode="after")
    def something(self) -> "DcConfig":
        """Something is learned."""
        if self.condense.niter and not self.condense.learn_images and not (self.feature and self.feature.learn):
            raise ValueError(
                "condense.learn_images: false, and no feature labels are learned either; set it true, feature.learn: "
                "true, or condense.niter: 0 to judge the start"
            )
        return self


def job_of(cfg: DcConfig, world: World, flag: StopFlag) -> FeatJob[DcConfig]:
    """Data and networks."""
    return FeatJob(cfg, world, flag)


def learner(job: FeatJob[DcConfig], seed: int) -> GradientCondenser:
    """The condenser of this rank's classes."""
    cfg, world = job.cfg, job.world
    return GradientCondenser(
        nclass_list=[
            distribute_class(cfg.dataset.nclass, cfg.debug, rank=rank, size=world.size) for rank in range(world.size)
        ],
        settings=cfg.condense, feature=cfg.feature, images=job.train, start=job.start(seed),
        network=lambda iteration: job.fresh(seed, "outer network", iteration), map_shape=job.map_shape,
        batch_real=cfg.dataset.batch_real, seed=seed, world=world, meta=job.notes(),
    )  # fmt: skip


def plan(cfg: DcConfig) -> str:
    """The iterations in words."""
    outer, inner = cfg.condense.loops
    return f"{cfg.condense.niter} x {outer} steps, {inner} epochs between"


DC = Method("dc", job_of, learner, plan)
TAKES = (DcConfig, DC_OPTIONS)


def main() -> int:
    """Exit status."""
    return run_program(__doc__ or "", HERE, *TAKES, DC.run, DEFAULT)


if __name__ == "__main__":
    leave(main())
