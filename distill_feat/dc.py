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

from condenser.export import export
from condenser.gradient_condenser import GradientCondenser, GradientConfig
from condenser.loop import learning_loop
from condenser.synthetic_set import SyntheticSet, load_synthetic
from config import CommandLine, Option, Resolved, named, nested
from distill_feat.feat_job import OPTIONS, FeatConfig, FeatJob
from distill_feat.feat_plan import dry_run
from distill_feat.feat_rows import FeatRows, held_out_numbers, show
from utils.ddp import distribute_class
from utils.init_script import init_script
from utils.program import leave, run_program
from utils.run_folder import RunFolder, claim, log, short_hash
from utils.stopping import stop_flag

HERE = Path(__file__).resolve().parent
DEFAULT = HERE.parent / "config" / "distill_feat" / "dc" / "cifar10_ipc9.yaml"
DC_OPTIONS = (
    *OPTIONS,
    Option("learn_images", "condense.learn_images", "flag", "learn the images, not only F"),
    Option("dis_metric", "condense.dis_metric", "value", "distance of gradients", ("ours", "mse", "cos")),
    Option("aug_type", "condense.aug_type", "value", "DSA's operations, as in color/crop/cutout/flip/scale/rotate"),
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


def learn_folder(cfg: DcConfig, seed: int) -> Path:
    """Folder of one learned set."""
    values = named(cfg, ("dataset.", "network.", "pretrain.", "feature", "condense.", "tf32", "debug"))
    if cfg.condense.val_every:
        values |= named(cfg, ("evaluation.",))
    form = "noF" if cfg.feature is None else f"{cfg.feature.form}_lbd{cfg.feature.lbd:g}"
    name = f"{cfg.condense.init}_{form}_seed{seed}_{short_hash(values)}"
    return cfg.save_dir / "distill_feat" / "dc" / cfg.dataset.dataset / f"ipc{cfg.condense.ipc}" / name


def judge_folder(cfg: DcConfig) -> Path:
    """Folder of the table over all learned sets."""
    values = named(cfg, ("dataset.", "network.", "pretrain.", "feature", "condense.", "evaluation.", "tf32", "debug"))
    first = learn_folder(cfg, cfg.seed)
    return first.parent / f"table_{first.name.rsplit('_', 1)[0]}_{short_hash(values | {'num_exp': cfg.num_exp})}"


def distill(resolved: Resolved[DcConfig], command: CommandLine) -> None:
    """Learn the sets, one after another, then judge them."""
    cfg = resolved.config
    if command.dry_run:
        outer, inner = cfg.condense.loops
        work = f"{cfg.condense.niter} x {outer} steps, {inner} epochs between"
        dry_run(resolved, learn_folder(cfg, cfg.seed), cfg.condense.ipc, work)
        return
    with init_script(command.gpu, cfg.tf32, cfg.seed, cfg.debug) as world, stop_flag() as flag:
        if cfg.generate_pretrained:
            job = FeatJob(cfg, cfg.condense.ipc, world, flag)
            for seed in cfg.seeds:
                job.start(cfg.condense.init, cfg.condense.load_path, seed)
            return
        table = RunFolder(judge_folder(cfg), nested(cfg), world, command.overwrite)
        if not table.said_finished():
            job = FeatJob(cfg, cfg.condense.ipc, world, flag)
            if world.main:
                claim(table.folder, job.origin)
            runs = {seed: learn(cfg, job, seed, command.overwrite) for seed in cfg.seeds}
            FeatRows(job, runs).judge(table)
        show(table)


def learn(cfg: DcConfig, job: FeatJob, seed: int, overwrite: bool) -> Path:
    """Learn one set, from its last state if there is one; its folder."""
    world = job.world
    run = RunFolder(learn_folder(cfg, seed), nested(cfg), world, overwrite)
    if run.said_finished():
        return run.folder
    if world.main:
        claim(run.folder, job.origin)

    def score(found: SyntheticSet) -> float:
        numbers = held_out_numbers(job, found, seed)
        log.info("validation: " + ", ".join(f"{name} {value:.1f}" for name, value in numbers.items()))
        return list(numbers.values())[-2]  # with F where there is one, without views

    result = learning_loop(make_condenser(cfg, job, seed), run, job.flag, score, cfg.debug)
    if world.main:
        export(load_synthetic(run.folder / "distilled_data" / "syn_data_best.pth"), run.folder / "export")
    log.info(f"learned set: {run.folder / 'distilled_data'}; for other programs: {run.folder / 'export'}")
    run.finish(result)
    return run.folder


def make_condenser(cfg: DcConfig, job: FeatJob, seed: int) -> GradientCondenser:
    """The condenser of this rank's classes."""
    c, world = cfg.condense, job.world
    return GradientCondenser(
        nclass_list=[
            distribute_class(cfg.dataset.nclass, cfg.debug, rank=rank, size=world.size) for rank in range(world.size)
        ],
        settings=c, feature=cfg.feature, images=job.train, start=job.start(c.init, c.load_path, seed),
        network=lambda iteration: job.fresh(seed, "outer network", iteration), map_shape=job.map_shape,
        batch_real=cfg.dataset.batch_real, seed=seed, world=world, meta=job.notes(),
    )  # fmt: skip


def main() -> int:
    """Exit status."""
    return run_program(__doc__ or "", HERE, DcConfig, DC_OPTIONS, distill, DEFAULT)


if __name__ == "__main__":
    leave(main())
