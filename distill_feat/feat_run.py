"""A run of any method with feature labels: learn the sets, one after another, then judge them in one table."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from condenser.export import export
from condenser.loop import Learner, learning_loop
from condenser.synthetic_set import SyntheticSet, load_synthetic
from config import CommandLine, Resolved, named, nested
from distill_feat.feat_job import FeatConfig, FeatJob
from distill_feat.feat_plan import dry_run
from distill_feat.feat_rows import FeatRows, held_out_numbers, show
from utils.ddp import World
from utils.init_script import init_script
from utils.run_folder import RunFolder, claim, log, short_hash
from utils.stopping import StopFlag, stop_flag

C = TypeVar("C", bound=FeatConfig)
J = TypeVar("J", bound=FeatJob[FeatConfig])
SECTIONS = ("dataset.", "network.", "pretrain.", "feature", "condense.", "zca", "tf32", "debug")


@dataclass(frozen=True)
class Method(Generic[C, J]):
    """What a method adds to a run."""

    name: str
    job: Callable[[C, World, StopFlag], J]
    learner: Callable[[J, int], Learner]  # of a seed
    plan: Callable[[C], str]  # the iterations in words

    def run(self, resolved: Resolved[C], command: CommandLine) -> None:
        """All of it."""
        cfg = resolved.config
        if command.dry_run:
            dry_run(resolved, self.learn_folder(cfg, cfg.seed), self.plan(cfg))
            return
        with init_script(command.gpu, cfg.tf32, cfg.seed, cfg.debug) as world, stop_flag() as flag:
            if cfg.generate_pretrained:
                job = self.job(cfg, world, flag)
                for seed in cfg.seeds:
                    job.start(seed)
                return
            table = RunFolder(self.judge_folder(cfg), nested(cfg), world, command.overwrite)
            if not table.said_finished():
                job = self.job(cfg, world, flag)
                if world.main:
                    claim(table.folder, job.origin)
                runs = {seed: self.learn(cfg, job, seed, command.overwrite) for seed in cfg.seeds}
                FeatRows(job, runs).judge(table)
            show(table)

    def learn(self, cfg: C, job: J, seed: int, overwrite: bool) -> Path:
        """Learn one set, from its last state if there is one; its folder."""
        world = job.world
        run = RunFolder(self.learn_folder(cfg, seed), nested(cfg), world, overwrite)
        if world.main:
            claim(run.folder, job.origin)
        if run.said_finished():
            return run.folder

        def score(found: SyntheticSet) -> float:
            numbers = held_out_numbers(job, found, seed)
            log.info("validation: " + ", ".join(f"{name} {value:.1f}" for name, value in numbers.items()))
            return list(numbers.values())[-2]  # with F where there is one, without views

        result = learning_loop(self.learner(job, seed), run, job.flag, score, cfg.debug)
        if world.main:
            export(load_synthetic(run.folder / "distilled_data" / "syn_data_best.pth"), run.folder / "export")
        log.info(f"learned set: {run.folder / 'distilled_data'}; for other programs: {run.folder / 'export'}")
        run.finish(result)
        return run.folder

    def learn_folder(self, cfg: C, seed: int) -> Path:
        """Folder of one learned set."""
        values = named(cfg, (*SECTIONS, "evaluation.") if cfg.condense.val_every else SECTIONS)
        form = "noF" if cfg.feature is None else f"{cfg.feature.form}_lbd{cfg.feature.lbd:g}"
        name = f"{cfg.condense.init}_{form}_seed{seed}_{short_hash(values)}"
        return cfg.save_dir / "distill_feat" / self.name / cfg.dataset.dataset / f"ipc{cfg.condense.ipc}" / name

    def judge_folder(self, cfg: C) -> Path:
        """Folder of the table over all learned sets."""
        values = named(cfg, (*SECTIONS, "evaluation."))
        first = self.learn_folder(cfg, cfg.seed)
        return first.parent / f"table_{first.name.rsplit('_', 1)[0]}_{short_hash(values | {'num_exp': cfg.num_exp})}"
