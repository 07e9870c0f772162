"""Train every run of a manifest, those with one teacher side by side, and end in a table: python -m scripts.sweep_kd

    python -m scripts.sweep_kd config/kd/manifests/cifar100.txt --seeds 0,1,2 --logs logs/sdd_kd_lskd_full/cifar100
    python -m scripts.sweep_kd config/kd/manifests/cifar100_small.txt --only kd DATASET.ROOT=DIR

A line of a manifest is a name, a configuration (from config/kd) and overrides; [words] in brackets say where the runs
below come from. What is finished is skipped, what was begun goes on, a crash is listed and ends in exit status 1. Other
words go to kd/train.py: overrides and options such as --gpu 0.
"""

import argparse
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from config import ConfigError, add_args_from_yaml, flatten, parse_command_line
from kd.kd_config import OF_TEACHER, OPTIONS, SHARED, KdConfig
from kd.places import run_folder
from kd.scoring import COLUMNS
from utils.report import Paragraph, Table, plain_table, write_report
from utils.run_folder import REPOSITORY, RESULT

log = logging.getLogger("distill_lab")


@dataclass(frozen=True)
class Planned:
    """A run of the manifest with a seed."""

    name: str
    origin: str  # the words in brackets
    config: str  # what --cfg gets
    cfg: KdConfig

    @property
    def result(self) -> Path:
        """Its file of final numbers."""
        return run_folder(self.cfg) / RESULT

    @property
    def group(self) -> str:
        """The same for runs that can go side by side."""
        if self.cfg.apart:
            return str(self.result)
        keys = (*SHARED, *OF_TEACHER) if self.cfg.distils else SHARED
        return json.dumps({key: str(value) for key, value in flatten(self.cfg).items() if key.startswith(keys)})


def read_manifest(path: Path, seeds: Sequence[int], more: Sequence[str]) -> list[Planned]:
    """The runs of every seed, each once. Raises ConfigError for a line that is not a run."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    runs: dict[Path, Planned] = {}
    for seed in seeds:
        origin = ""
        for number, line in enumerate(lines, 1):
            words = line.split("#")[0].split()
            if line.startswith("["):
                origin = line.strip("[] ")
            elif len(words) == 1:
                raise ConfigError(f"{path}:{number}: '{line}': expected a name, a configuration and overrides")
            elif words:
                file = " ".join([str(REPOSITORY / "config" / "kd" / words[1]), f"SEED={seed}", *words[2:]])
                command = parse_command_line([f"--cfg={file}", *more], "", OPTIONS)
                place, own = command.configs[0]
                cfg = add_args_from_yaml(KdConfig, place, (*command.overrides, *own), REPOSITORY).config
                runs.setdefault(run_folder(cfg), Planned(words[0], origin, file, cfg))
    return list(runs.values())


def train_group(group: Sequence[Planned], more: Sequence[str], ranks: int, file: Path) -> tuple[int, str]:
    """Exit status and last words of one process for runs that share a teacher; all that it says goes to a log file."""
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    words = [sys.executable, *launch, str(REPOSITORY / "kd" / "train.py"), *(f"--cfg={run.config}" for run in group)]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as out:
        print(f"== {' '.join(run.name for run in group)}", file=out, flush=True)
        child = subprocess.Popen([*words, *more], stdout=out, stderr=subprocess.STDOUT)
        for stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stop, lambda caught, _: child.send_signal(caught))  # it saves its state and leaves
        status = child.wait()
        out.seek(0)
        return status, out.read().strip().splitlines()[-1]


def cell(values: Sequence[float], digits: int) -> str:
    """Mean and deviation over seeds."""
    if not values:
        return "-"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def sweep_table(runs: Sequence[Planned]) -> Table:
    """A row for every name of the manifest: mean ± deviation over the seeds that are finished."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for run in runs:
        rows = found.setdefault((run.name, run.origin), [])
        rows += [json.loads(run.result.read_text())] if run.result.exists() else []
    names = [name for name in COLUMNS if any(name in row for rows in found.values() for row in rows)]
    body = []
    for (label, origin), rows in found.items():
        cells = (cell([row[n] for row in rows if n in row], 3 if "nll" in n else 2) for n in names)
        body.append((label, origin, str(len(rows)), *cells))
    return Table(("run", "from", "seeds", *(COLUMNS[name] for name in names)), tuple(body))


def chosen(runs: Sequence[Planned]) -> list[Planned]:
    """Of names such as kd@0.05 and kd@0.1 those with the best mean top-1 on held-out images, without what follows @."""
    found: dict[str, dict[str, list[Planned]]] = {}
    for run in runs:
        found.setdefault(run.name.split("@")[0], {}).setdefault(run.name, []).append(run)

    def held_out(variant: Sequence[Planned]) -> float:
        rows = [json.loads(run.result.read_text()) for run in variant if run.result.exists()]
        return mean(row["held_out_top1"] for row in rows) if rows and "held_out_top1" in rows[0] else -1.0

    return [run for variants in found.values() for run in max(variants.values(), key=held_out)]


def sweep(runs: Sequence[Planned], more: Sequence[str], ranks: int, logs: Path, size: int) -> int:
    """Exit status: 0, 1 if a run is not finished, a stopped run's own."""
    groups: dict[str, list[Planned]] = {}
    for run in runs:
        if not run.result.exists():
            groups.setdefault(run.group, []).append(run)
    log.info(f"{len(runs)} runs, {sum(map(len, groups.values()))} to train in {len(groups)} groups; logs in {logs}")
    parts = [part[i : i + size] for part in groups.values() for i in range(0, len(part), size)]
    crashed: list[str] = []
    for number, group in enumerate(parts, 1):
        began = time.monotonic()
        status, words = train_group(group, more, ranks, logs / f"{group[0].name}_seed{group[0].cfg.SEED}.log")
        unfinished = [run for run in group if not run.result.exists()]
        log.info(
            f"group {number}/{len(parts)} ({', '.join(run.name for run in group)}): exit status {status}, "
            f"{time.monotonic() - began:.0f} s"
        )
        if status >= 128 or status < 0:
            return status if status > 0 else 128 - status
        crashed += [f"{run.name}, seed {run.cfg.SEED}, exit status {status}: {words}" for run in unfinished]
    tables = [sweep_table(runs)]
    if any("@" in run.name for run in runs):
        tables.append(sweep_table(chosen(runs)))
    note = "top-1, last is of the last epoch; best was chosen on the test images. Percent; NLL in nats."
    note += " Of names with @, the second table has those best on held-out training images." if tables[1:] else ""
    write_report(
        logs, "Sweep", [Paragraph(note), *tables, *([Paragraph(f"Crashed: {', '.join(crashed)}")] if crashed else [])]
    )
    print("\n\n".join(map(plain_table, tables)))
    for line in crashed:
        print(f"CRASHED  {line}", file=sys.stderr)
    return 1 if crashed else 0


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--seeds", default="0", help="every run with each, as in 0,1,2 (default: 0)")
    parser.add_argument("--logs", type=Path, help="folder (default: logs/MANIFEST)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run")
    parser.add_argument("--group_size", type=int, default=16, help="most runs side by side; 1 = each alone")
    parser.add_argument("--only", metavar="TEXT", default="", help="runs whose name has this text")
    parser.add_argument("--dry_run", action="store_true", help="list the runs and what is finished")
    given, more = parser.parse_known_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    logs = given.logs or Path("logs") / given.manifest.stem
    try:
        if not all(word.isdecimal() for word in given.seeds.split(",")):
            raise ConfigError(f"--seeds: '{given.seeds}' is not a list such as 0,1,2")
        seeds = [int(word) for word in given.seeds.split(",")]
        runs = [run for run in read_manifest(given.manifest, seeds, more) if given.only in run.name]
        if given.dry_run:
            for run in runs:
                print(
                    f"{'finished' if run.result.exists() else 'to do':8}  {run.name}  seed {run.cfg.SEED}  {run.origin}"
                )
            return 0
        return sweep(runs, more, given.ranks, logs, given.group_size)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
