"""Every condensation method on one data set, with as many images and in as many bytes, judged by the same students.

    python -m scripts.compare_condensation --config_path config/compare/digits.yaml --quick
    torchrun --nproc_per_node=2 -m scripts.compare_condensation --config_path config/compare/digits.yaml

Random, herding and k-center subsets beside the methods of the manifest, whose programs learn what is missing; ranks
share out programs and students. What is finished is skipped, what was begun goes on. A crash is a marked row with its
last words, and ends in exit status 1; the same command tries again. --overwrite judges again: learned sets stay.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

import json
from collections.abc import Sequence
from pathlib import Path

from condense.image_job import ImageConfig
from config import CommandLine, ConfigError, Option, Resolved, add_args_from_yaml, named, nested
from scripts.compare_judge import Judge, judge
from scripts.compare_plan import LAUNCH, CompareConfig, Line, lines_of
from scripts.slots import Ended, Job, run_jobs
from utils.checkpoint import atomic_write, load_json
from utils.ddp import World
from utils.init_script import init_script
from utils.program import leave, run_program
from utils.run_folder import REPOSITORY, RunFolder, claim, log, short_hash
from utils.stopping import StopFlag, stop_flag

OPTIONS = (
    Option("quick", "quick", "flag", "take the first seed, and no method with feature labels"),
    Option("data_path", "data_dir", "path", "folder of the data set"),
)


def launch(words: Sequence[str], file: Path, world: World, flag: StopFlag) -> Ended:
    """Run a program alone, its words going to `file`. Raises Stopped when it has left after a stop signal."""
    gpu = [f"--gpu={world.device.index or 0}"] if world.device.type == "cuda" else []
    log.info(f"{file.stem}: {' '.join([*words, *gpu])}")
    found: list[Ended] = []
    run_jobs([Job(file.stem, (*words, *gpu), file)], [{}], flag, found.append)
    return found[0]


def learn(m: CompareConfig, lines: Sequence[Line], logs: Path, world: World, flag: StopFlag) -> dict[str, str]:
    """Learn the sets that are missing, each rank its share; what died of what, by the name of its log."""
    every = {f"{line.key}_seed{run.cfg.seed}": run for line in lines for run in line.runs}
    missing, died = world.broadcast([name for name, run in every.items() if not run.finished]), dict[str, str]()
    for one in m.prepare if world.main and missing else ():
        words = [str(REPOSITORY / one.script), f"--config_path={one.config}", *m.shared]
        name = f"{Path(one.script).stem}_{one.config.stem}"
        died[name] = launch(words, logs / f"{name}.log", world, flag).died_of
    world.barrier()
    for name in (missing[i] for i in world.share([1.0] * len(missing))):
        ended = launch(every[name].words, logs / f"{name}.log", world, flag)
        died[name] = ended.died_of
        if every[name].finished:
            atomic_write(every[name].folder / LAUNCH, json.dumps({"peak": ended.peak}).encode())
    return {name: words for part in world.gather_values(died) for name, words in part.items() if words}


def compare(resolved: Resolved[CompareConfig], command: CommandLine) -> None:
    """Learn, judge, show. Raises ConfigError with what crashed."""
    m = resolved.config
    cfg = add_args_from_yaml(ImageConfig, m.judge, m.shared, REPOSITORY / "condense").config
    lines = lines_of(m)
    values = named(cfg, ("dataset.", "network.", "pretrain.", "seed", "tf32")) | named(m, ("students.", "seeds"))
    values |= {line.key: [run.folder.name for run in line.runs] for line in lines}
    name = f"{'quick' if m.quick else 'full'}_{short_hash(values)}"
    folder = cfg.save_dir / "compare" / cfg.data_name / f"scales{'_'.join(map(str, m.scales))}" / name
    if command.dry_run:
        for one in (one for line in lines for one in line.runs):
            print(f"{'finished' if one.finished else 'to do':8}  {' '.join(one.words)}")
        print(f"run folder: {folder}")
        return
    with init_script(command.gpu, cfg.tf32, cfg.seed, cfg.debug) as world, stop_flag() as flag:
        run = RunFolder(folder, nested(m), world, command.overwrite)
        if not run.said_finished():
            died = learn(m, lines, folder / "logs", world, flag)
            judges = Judge(m, cfg, world, flag)
            if world.main:
                claim(folder, judges.job.origin)
            judge(judges, lines, died, run)
        if world.main:
            found = load_json(folder / "report.json")
            print(f"{found['table']}\nreport: {folder / 'report.html'}", flush=True)
            if found["crashed"]:
                raise ConfigError("\n".join(f"CRASHED {words}" for words in found["crashed"]))


TAKES = (CompareConfig, OPTIONS)


def main() -> int:
    """Exit status."""
    return run_program(__doc__ or "", Path(__file__).resolve().parent, *TAKES, compare)


if __name__ == "__main__":
    leave(main())
