"""Run everything that a sweep file lists, side by side where there is room, and end in a table.

    python -m scripts.sweep config/sweeps/text.txt --seeds 0,1,2 --slots 2
    python -m scripts.sweep config/kd/manifests/cifar100_small.txt --only kd DATASET.ROOT=DIR
    python -m scripts.sweep config/sweeps/text.txt --seeds 0,1,2 --sbatch scripts/slurm.sbatch

A line is a name, a configuration (from config/) and overrides. `condense.ipc={1,5,10}` makes three runs of it, and
SEEDS one that is told all seeds. [words] in brackets say where the runs below come from; behind stand their program and
overrides of them all.
What is below --- starts when all above has ended. What is finished is skipped, what was begun goes on, a crash is
listed and ends in exit status 1. Other words go to the programs: overrides, and options such as --tf32.
"""

import logging
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from config import ConfigError, add_args_from_yaml, parse_command_line
from config.cli import Parser, positive
from scripts.programs import PROGRAMS, Program
from scripts.slots import Ended, Job, last_words, run_jobs, slots_of
from scripts.table import check, collect, collected
from utils.checkpoint import load_json
from utils.progress import clock
from utils.report import Paragraph, Table, plain_table, spread, write_report
from utils.run_folder import REPOSITORY, RESULT, log
from utils.stopping import Stopped, stop_flag

SCORES = ("micro", "accuracy", "last", "test_micro")  # of students, by the program that trained them
BRACES = re.compile(r"([^{}]*)\{([^{}:]*)\}([^{}]*)")


@dataclass(frozen=True)
class Planned:
    """A run of the sweep with a seed."""

    name: str
    origin: str  # the words in brackets
    block: int  # how many --- stand above it
    script: str  # from the repository
    config: str  # what --config_path gets
    seed: int
    cfg: Any

    @property
    def program(self) -> Program:
        """Its program."""
        return PROGRAMS[self.script]

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.program.folder(self.cfg)

    @property
    def finished(self) -> bool:
        """Whether it is over."""
        return self.program.finished(self.folder, self.cfg)

    @property
    def result(self) -> Mapping[str, float]:
        """Its final numbers, as far as a table knows their names."""
        path = self.folder / RESULT
        found = load_json(path) if self.finished and path.exists() else {}
        return {key: found[key] for key in self.program.columns if key in found}

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


def choices(name: str, words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Every choice of what stands in braces: the name with the words that were chosen, and all words."""
    found = [BRACES.fullmatch(word) for word in words]
    options = [[m[1] + v + m[3] for v in m[2].split(",")] if m else [w] for m, w in zip(found, words, strict=True)]
    for some in product(*options):
        yield " ".join([name, *(word for word, m in zip(some, found, strict=True) if m)]), [*some]


def read_sweep(path: Path, seeds: Sequence[int], more: Sequence[str]) -> list[Planned]:
    """The runs of every seed, each once, in order of blocks. Raises ConfigError for a line that is not a run."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    runs: dict[tuple[str, Path], Planned] = {}
    named: dict[tuple[str, int], Path] = {}
    for seed in seeds:
        origin, script, block, common = "", "", 0, list[str]()
        for number, text in enumerate(lines, 1):
            line, where = text.split("#")[0].strip(), f"{path}:{number}"
            words = line.split()
            if line.startswith("["):
                origin, _, behind = line[1:].partition("]")
                script, *common = behind.split() or [""]
                if script not in PROGRAMS:
                    raise ConfigError(f"{where}: '{script}' after the brackets: expected one of {', '.join(PROGRAMS)}")
            elif words == ["---"]:
                block += 1
            elif words and (len(words) == 1 or not script):
                raise ConfigError(f"{where}: '{line}': expected a name, a configuration and overrides, below [words]")
            elif words and (seed == seeds[0] or "SEEDS" not in line):
                program = PROGRAMS[script]
                schema, options = program.takes
                for name, (config, *own) in choices(words[0], words[1:]):
                    own = [word.replace("SEEDS", ",".join(map(str, seeds))) for word in (*common, *own)]
                    place = shlex.quote(str(REPOSITORY / "config" / config))
                    file = " ".join([place, f"{program.seed}={seed}", *own])
                    command = parse_command_line([f"--config_path={file}", *more], "", options)
                    yaml, last = command.configs[0]
                    base = REPOSITORY if program.at_root else (REPOSITORY / script).parent
                    cfg = add_args_from_yaml(schema, yaml, (*command.overrides, *last), base).config
                    run = Planned(name, origin, block, script, file, seed, cfg)
                    if named.setdefault((name, seed), run.folder) != run.folder:
                        raise ConfigError(f"{where}: '{name}': another run has this name: give it one of its own")
                    runs.setdefault((script, run.folder), run)
    return sorted(runs.values(), key=lambda run: run.block)


def parts_of(runs: Sequence[Planned], size: int) -> list[list[Planned]]:
    """What a process does each: a run, or up to `size` that can share, finished or not."""
    groups: dict[object, list[Planned]] = {}
    for run in runs:
        key = run.program.group(run.cfg) or run.folder
        groups.setdefault((run.block, run.script, key), []).append(run)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


def job_of(part: Sequence[Planned], more: Sequence[str], ranks: int, logs: Path) -> Job:
    """The process for what is not finished of a part."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", f"--nproc_per_node={ranks}")
    files = (f"--config_path={run.config}" for run in part if not run.finished)
    words = (*(launch if ranks > 1 else ()), str(REPOSITORY / part[0].script), *files, *more)
    return Job(", ".join(map(str, part)), words, log_of(part[0], logs))


def log_of(run: Planned, logs: Path) -> Path:
    """The file of what its process says."""
    return logs / (re.sub(r"[^\w.=@+-]+", "_", f"{run.name}_seed{run.seed}") + ".log")


def sweep_table(runs: Sequence[Planned]) -> Table:
    """A row for every name: how many of its seeds are finished, and mean ± deviation of their numbers."""
    rows: dict[tuple[str, str], list[Planned]] = {}
    for run in runs:
        rows.setdefault((run.name, run.origin), []).append(run)
    found = {key: [run.result for run in some] for key, some in rows.items()}
    columns = {k: title for run in runs for k, title in run.program.columns.items()}
    columns = {k: title for k, title in columns.items() if any(k in one for some in found.values() for one in some)}
    body = []
    for (name, origin), some in rows.items():
        cells = (
            spread([one[k] for one in found[name, origin] if k in one], 3 if "nll" in k or "_to_" in k else 2) or "-"
            for k in columns
        )
        body.append((name, origin, f"{sum(run.finished for run in some)}/{len(some)}", *cells))
    return Table(("run", "from", "finished", *columns.values()), tuple(body))


def score_table(runs: Sequence[Planned]) -> Table | None:
    """A row for everything that finished runs judged by students: mean ± deviation over these and the seeds."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for run in runs:
        judged = (run.folder / RESULT).exists() and not run.program.columns
        for record in collected(run.folder) if judged else []:
            for score in SCORES:
                found.setdefault((run.name, record.row, score), []).extend(record.values.get(score, []))
    rows = tuple((*key, str(len(values)), spread(values)) for key, values in found.items() if values)
    return Table(("run", "row", "score", "students", "test, %"), rows) if rows else None


def chosen(runs: Sequence[Planned]) -> list[Planned]:
    """Of names such as kd@0.05 and kd@0.1 those with the best mean top-1 on held-out images, without what follows @."""
    found: dict[str, dict[str, list[Planned]]] = {}
    for run in runs:
        found.setdefault(run.name.split("@")[0], {}).setdefault(run.name, []).append(run)

    def held_out(variant: Sequence[Planned]) -> float:
        rows = [run.result["held_out_top1"] for run in variant if "held_out_top1" in run.result]
        return mean(rows) if rows else -1.0

    return [run for variants in found.values() for run in max(variants.values(), key=held_out)]


def sweep(parts: Sequence[Sequence[Planned]], more: Sequence[str], ranks: int, count: int | None, logs: Path) -> None:
    """Run what is not finished, block after block. Raises Stopped."""
    todo = [part for part in parts if not all(run.finished for run in part)]
    slots = slots_of(count, ranks)
    log.info(f"{len(todo)} of {len(parts)} processes to run, {len(slots)} at a time; what they say is in {logs}")
    spent: list[float] = []

    def ended(one: Ended) -> None:
        spent.append(one.seconds)
        left = mean(spent) * (len(todo) - len(spent)) / len(slots)
        words = one.died_of or "done"
        log.info(f"{len(spent)}/{len(todo)} {one.job.name}: {words}; {one.seconds:.0f} s, about {clock(left)} left")

    with stop_flag() as flag:
        for block in sorted({part[0].block for part in todo}):
            left = [part for part in todo if part[0].block == block and not all(run.finished for run in part)]
            run_jobs([job_of(part, more, ranks, logs) for part in left], slots, flag, ended)


def submit(
    parts: Sequence[Sequence[Planned]], template: Path, given: Sequence[str], count: int | None, logs: Path, dry: bool
) -> None:
    """Hand every block to SLURM as an array, each after the one above, and the table after the last.

    Raises ConfigError where SLURM refuses.
    """
    if not template.is_file():
        raise ConfigError(f"--sbatch: {template}: no such file; scripts/slurm.sbatch is one to begin with")
    if not dry and shutil.which("sbatch") is None:
        raise ConfigError("--sbatch: no sbatch on this machine: use a login node, or --dry_run to see the jobs")
    todo = [number for number, part in enumerate(parts) if not all(run.finished for run in part)]
    most = f"%{count}" if count else ""
    blocks = sorted({parts[number][0].block for number in todo})
    arrays = [",".join(str(number) for number in todo if parts[number][0].block == block) for block in blocks]
    own = [sys.executable, str(REPOSITORY / "scripts" / "sweep.py"), *given]
    if not dry:
        logs.mkdir(parents=True, exist_ok=True)
    after = ""
    for array in (*arrays, ""):
        words = ["sbatch", "--parsable", f"--output={logs}/slurm_%j.out"]
        words += [f"--array={array}{most}"] if array else []
        words += [f"--dependency=afterany:{after}"] if after else []
        words += [str(template), *own, *([] if array else ["--summary"])]
        if dry:
            after = after + "+" if after else "JOB"
            print(shlex.join(words))
            continue
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"sbatch: exit status {done.returncode}: {done.stderr.strip()}")
        after = done.stdout.strip().split(";")[0]
        log.info(f"job {after}: " + (f"processes {array}" if array else "the table"))


def summary(runs: Sequence[Planned], parts: Sequence[Sequence[Planned]], logs: Path, records: Path | None) -> int:
    """Show the table, put the numbers into a room's tables; 1 if a run is not finished."""
    tables = [sweep_table(runs)]
    searched = any("@" in run.name for run in runs)
    if searched:
        tables.append(sweep_table(chosen(runs)))
    if scores := score_table(runs):
        tables.append(scores)
    left = [(run, log_of(part[0], logs)) for part in parts for run in part if not run.finished]
    lines = [f"NOT FINISHED  {run}: {last_words(file) if file.exists() else 'not begun'}" for run, file in left]
    note = "Mean ± deviation over seeds; shares in percent, NLL in nats."
    note += " `top-1, best` was chosen on the test images." if "top-1, best" in tables[0].header else ""
    note += " Of names with @, the second table has those best on held-out images." if searched else ""
    write_report(logs, "Sweep", [Paragraph(note), *tables, *map(Paragraph, lines)])
    print("\n\n".join(map(plain_table, tables)), flush=True)
    print("\n".join(lines), end="\n" * bool(lines), file=sys.stderr)
    if records and not lines:
        collect(records, [run.folder for run in runs])
        log.info(f"{records}: {len(runs)} runs; " + "; ".join(check(REPOSITORY, write=True) or ["tables are written"]))
    return 1 if lines else 0


def command_line() -> Parser:
    """What reads it."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="the sweep")
    add("--seeds", metavar="LIST", default="0", help="every run with each, as in 0,1,2 (default: 0)")
    add("--logs", metavar="DIR", type=Path, help="what the programs say goes there (default: logs/FILE)")
    add("--slots", metavar="N", type=positive, help="processes side by side (default: what the GPUs take, or 1)")
    add("--ranks", metavar="N", type=positive, default=1, help="ranks of a process (default: 1)")
    add("--group_size", metavar="N", type=positive, default=16, help="most runs that share a process (default: 16)")
    add("--only", metavar="TEXT", default="", help="runs whose name has this text")
    add("--dry_run", action="store_true", help="list the runs and what is finished")
    add("--collect", metavar="FILE", type=Path, help="at the end: a room's results.jsonl that takes the numbers")
    add("--sbatch", metavar="TEMPLATE", type=Path, help="hand the runs to SLURM, --slots at a time, and leave")
    add("--task", metavar="N", type=int, help="only process N, as an array of SLURM does")
    add("--summary", action="store_true", help="only the table of what is finished")
    return parser


def main() -> int:
    """Exit status."""
    given, more = command_line().parse_known_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    logs = (given.logs or Path("logs") / given.file.stem).absolute()
    try:
        if not all(word.isdecimal() for word in given.seeds.split(",")):
            raise ConfigError(f"--seeds: '{given.seeds}' is not a list such as 0,1,2")
        if "--overwrite" in more:
            raise ConfigError("--overwrite: a sweep goes on; remove the folders of the runs that it shall make anew")
        seeds = [int(word) for word in given.seeds.split(",")]
        runs = [run for run in read_sweep(given.file, seeds, more) if given.only in run.name]
        if not runs:
            raise ConfigError(f"{given.file}: no run" + (f" has '{given.only}' in its name" if given.only else ""))
        parts = parts_of(runs, given.group_size)
        if given.sbatch:
            ours = Parser("")
            ours.add_argument("--sbatch")
            ours.add_argument("--dry_run", action="store_true")
            submit(parts, given.sbatch, ours.parse_known_args()[1], given.slots, logs, given.dry_run)
            return 0
        if given.dry_run:
            for run in runs:
                print(f"{'finished' if run.finished else 'to do':8}  {run}  {run.origin}  {run.folder}")
            return 0
        if given.summary:
            return summary(runs, parts, logs, given.collect)
        if given.task is None:
            sweep(parts, more, given.ranks, given.slots, logs)
            return summary(runs, parts, logs, given.collect)
        if not 0 <= given.task < len(parts):
            raise ConfigError(f"--task: {given.task} of processes 0 to {len(parts) - 1}")
        sweep([parts[given.task]], more, given.ranks, 1, logs)
        return int(not all(run.finished for run in parts[given.task]))
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except Stopped as error:
        print(error, file=sys.stderr)
        return error.status


if __name__ == "__main__":
    sys.exit(main())
