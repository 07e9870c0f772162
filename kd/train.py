"""Train a student with a teacher, or (DISTILLER.TYPE NONE) a teacher or student alone.

    python kd/train.py --cfg config/kd/cifar100/sdd_kd_lskd/res32x4_res8x4.yaml --gpu 0 --M "[1,2,4]"
    torchrun --nproc_per_node=4 kd/train.py --cfg FILE SOLVER.EPOCHS 5 KD.TEMPERATURE=2
    python kd/train.py --cfg "A.yaml M=[1]" --cfg "A.yaml M=[1,2]" --cfg B.yaml SEED=1

Several --cfg with one teacher, data set, batch size and seed are trained side by side on one teacher forward, each with
the result that it has alone; overrides in the quotes are of that run only, the others of all. --quick is 5 epochs. To
resume, run the same command again. Batch sizes are of all ranks together; paths in files start at the repository.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

import torch

from config import CommandLine, ConfigError, Resolved, flatten, nested
from kd.closing import finish_all, rows_of
from kd.kd_batches import Batches
from kd.kd_config import OF_TEACHER, OPTIONS, SHARED, KdConfig
from kd.kd_data import load_kd_data
from kd.losses import suggested_temperature
from kd.methods.contrast import bags
from kd.places import links, run_folder, run_name
from kd.scoring import result_table
from kd.student_run import StudentRun, train_group
from kd.teacher import KeptLogits, Teacher, sha256, teacher_file, teacher_files, teacher_heads
from utils.ddp import World, environment_rank
from utils.dry_run import print_values
from utils.init_script import init_script
from utils.program import leave, run_group
from utils.report import plain_table
from utils.run_folder import REPOSITORY, RESULT, RunFolder, claim, log
from utils.stopping import StopFlag, stop_flag


def check_group(configs: list[KdConfig]) -> None:
    """Raise ConfigError unless the runs can share batches and teacher, in different folders."""
    for prefixes, those in ((SHARED, configs), (OF_TEACHER, [cfg for cfg in configs if cfg.distils])):
        for cfg in those[1:]:
            values = flatten(those[0])
            for key, value in flatten(cfg).items():
                if key.startswith(prefixes) and value != (other := values[key]):
                    raise ConfigError(f"{key}: {other} and {value} in one group; run them apart, or give both the same")
    apart = [cfg for cfg in configs if cfg.apart]
    if apart and len(configs) > 1:
        raise ConfigError(
            f"{run_name(apart[0])}: its batches or teachers are its own, so it cannot share a group; run it apart"
        )
    folders = [run_folder(cfg) for cfg in configs]
    twice = [folder for folder in folders if folders.count(folder) > 1]
    if twice:
        raise ConfigError(f"{twice[0].name}: the same run twice; leave one out, or let M or the method differ")


def hint(cfg: KdConfig, classes: int) -> str:
    """A line where the temperature looks wrong for standardised logits of so many classes, else nothing."""
    if not cfg.standardise or cfg.CTKD:
        return ""
    key = {"kd": "KD.TEMPERATURE", "dkd": "DKD.T", "nkd": "NKD.T"}[cfg.base_loss]
    given, suggested = cfg.loss.temperature, suggested_temperature(classes)
    if suggested / 1.5 <= given <= suggested * 1.5:
        return ""
    return (
        f"{key}: {given:g} with {classes} classes: standardised logits suggest {suggested:.2f}, where a sure teacher "
        "gives its class 0.6, as with 100 classes at 2"
    )


def stages_hint(cfg: KdConfig) -> str:
    """A line where no stage of the learning rate's decay lies within the run, else nothing."""
    s = cfg.SOLVER
    if not s.LR_DECAY_STAGES or min(s.LR_DECAY_STAGES) < s.EPOCHS:
        return ""
    stages = ", ".join(f"{stage:g}" for stage in s.LR_DECAY_STAGES)
    return f"SOLVER.LR_DECAY_STAGES: {stages}, but the run ends after epoch {s.EPOCHS}: the learning rate never falls"


def needs(cfg: KdConfig) -> list[str]:
    """Lines on the teacher's file, or where it is missing, and on the runs of the assistants."""
    lines = [f"before it: {run_folder(link)}" for link in links(cfg)[:-1]]
    if cfg.distils:
        try:
            lines.append(f"teacher: {teacher_file(cfg)}")
        except ConfigError as error:
            lines.append(str(error))
    return lines


def train(every: list[Resolved[KdConfig]], command: CommandLine) -> None:
    """All runs of the command line, those of their assistants before them."""
    configs = [resolved.config for resolved in every]
    check_group(configs)
    if command.dry_run:
        for resolved in every:
            print_values(resolved, run_folder(resolved.config))
            if environment_rank() == 0:
                print("\n".join(needs(resolved.config)))
        return
    first = configs[0]
    if to_do := [cfg for cfg in configs if cfg.distils and not (run_folder(cfg) / RESULT).exists()]:
        teacher_file(to_do[0])  # before a folder is made
    with init_script(command.gpu, first.tf32, first.SEED, any(c.debug for c in configs)) as world, stop_flag() as flag:
        for group in [[link] for link in links(first)[:-1]] + [configs]:
            wait = None if group is configs else flag  # runs may share an assistant
            folders = [RunFolder(run_folder(cfg), nested(cfg), world, command.overwrite, wait) for cfg in group]
            left = [(c, f) for c, f in zip(group, folders, strict=True) if not f.said_finished()]
            if left:
                train_left(left, world, flag)


def train_left(left: list[tuple[KdConfig, RunFolder]], world: World, flag: StopFlag) -> None:
    """Train the runs that are not finished."""
    first = next((cfg for cfg, _ in left if cfg.distils), left[0][0])
    files = teacher_files(first) if first.distils else []  # before the data, which may take long
    data = load_kd_data(first.DATASET)
    origin = {"images": data.fingerprint}
    said = {f"teacher {name}" if number else "teacher": sha256(path) for number, (name, path) in enumerate(files)}
    bf16 = first.KD.TEACHER_DTYPE == "bfloat16"
    teachers = [Teacher(name, path, data, bf16, world.device) for name, path in files]
    for (_, path), digest in zip(files, said.values(), strict=True):
        log.info(f"teacher: {path} (sha256 {digest})")
    heads = teacher_heads(files[0][1]) if first.views == "turned" and files else {}
    batches = Batches(data, first, world, max(cfg.epochs for cfg, _ in left))
    if first.views == "bags":
        rows = rows_of(teachers[0].net, data, data.train, torch.arange(len(data.train)), first, world)
        batches.neighbours = bags(world.broadcast(rows), first.BINGO.BAG)
    runs = []
    for cfg, folder in left:
        if world.main:
            remedy = "start again with --overwrite, or name the teacher it was begun with as DISTILLER.TEACHER_PATH"
            claim(folder.folder, origin | (said if cfg.distils else {}), remedy)
        for line in filter(None, (hint(cfg, len(data.classes)), stages_hint(cfg))):
            log.info(line)
        runs.append(StudentRun(cfg, folder, data, batches, teachers, world, heads))
    wanted = [run.regions for run in runs if run.teachers]
    kept = KeptLogits(teachers[0], batches, wanted, world.main) if teachers and first.KD.CACHE_VIEWS else None
    failed = train_group(runs, batches, teachers, kept, flag)
    teacher = teachers[0] if teachers else None
    if teachers and (named := (first.DISTILLER.TEACHER or "", teacher_file(first))) not in files:  # TAKD
        teacher = Teacher(*named, data, bf16, world.device)
    results = finish_all([run for run in runs if run.label not in failed], teacher)
    if world.main and results:
        print(plain_table(result_table(results)))
    if failed:
        raise ConfigError("\n".join(map(str, failed.values())))


TAKES = (KdConfig, OPTIONS)


def main() -> int:
    """Exit status."""
    return run_group(__doc__ or "", REPOSITORY, *TAKES, train)


if __name__ == "__main__":
    leave(main())
