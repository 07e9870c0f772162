"""One run is one folder, named by its resolved config: config, log, metrics, artefacts, report."""

import fcntl
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from pydantic import TypeAdapter

from config import ConfigError
from utils.checkpoint import atomic_write, load_json
from utils.ddp import World, environment_size
from utils.stopping import StopFlag

REPOSITORY = Path(__file__).resolve().parents[1]
RESULT = "result.json"  # written last: its presence means that the run is finished
ENVIRONMENT = "environment.json"  # written at the start
PACKAGES = ("torch", "torchvision", "transformers", "numpy")
log = logging.getLogger("distill_lab")


@dataclass(frozen=True)
class Start:
    """How a process was started, as shell lines, what it is made of and where it runs."""

    command: str
    environment: dict[str, str]


STARTS = TypeAdapter(tuple[Start, ...])


def this_start() -> Start:
    """Of this process."""
    words = [word for word in sys.orig_argv[1:] if word != "-u"]  # torchrun's
    size = environment_size()
    launcher = f"torchrun --nproc_per_node={size}" if size > 1 else "python"
    asked = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""  # no git here
    threads = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY") if name in os.environ}
    environment = {
        "code": commit or "no repository",
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "processes": str(size),
        "threads of each": f"{torch.get_num_threads()}" + "".join(f", {k}={v}" for k, v in threads.items()),
    }
    return Start(f"cd {shlex.quote(str(Path.cwd()))}\n{launcher} {shlex.join(words)}", environment)


def starts_of(folder: Path) -> tuple[Start, ...]:
    """The different starts of a run, the last one last; none where it did not say. ConfigError: the file is damaged."""
    path = folder / ENVIRONMENT
    try:
        return STARTS.validate_json(path.read_bytes()) if path.exists() else ()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: not a list of starts ({reason}): delete it; what it said is lost") from error


def note_start(folder: Path) -> None:
    """Put this process last among a run's starts: one that goes on elsewhere was made in every one of these places."""
    here = this_start()
    starts = [*(start for start in starts_of(folder) if start != here), here]
    atomic_write(folder / ENVIRONMENT, STARTS.dump_json(tuple(starts), indent=1))


def short_hash(values: Mapping[str, Any]) -> str:
    """Eight hex digits that name a mapping of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:8]


def claim(folder: Path, origin: dict[str, str], remedy: str = "start again with --overwrite") -> None:
    """Note what a folder's contents are made from. Raises ConfigError where they are made from something else."""
    path = folder / "origin.json"
    if not path.exists():
        atomic_write(path, json.dumps(origin).encode())
    elif load_json(path) != origin:
        raise ConfigError(
            f"{folder}: made from other data (was it changed, or for docstrings a package upgraded?): {remedy}"
        )


def keep_batch(folder: Path, iteration: int, batch: object) -> Path:
    """Write not_finite.json, what an iteration saw whose numbers were not finite, by name; returns its path."""
    path = folder / "not_finite.json"
    atomic_write(path, json.dumps({"iteration": iteration, "batch": batch}).encode())
    return path


class QuietFile(logging.FileHandler):
    """A log file that a full disk ends without a word: the next file that is needed says it."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing."""


def take_lock(folder: Path, wait: StopFlag | None) -> TextIO:
    """The open file whose lock keeps other processes out of a folder until it is closed; waits for them if asked to.

    Raises ConfigError where the folder cannot be used, or is another's and nobody waits.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be used ({error.strerror}): choose another save_dir") from error
    said = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError as error:
            if wait is None:
                raise ConfigError(
                    f"{folder}: another process is working on this run; wait for it or stop it"
                ) from error
        except OSError as error:  # waiting would not end
            raise ConfigError(f"{folder}: cannot be locked ({error.strerror}): choose another save_dir") from error
        wait.check()
        if not said:
            log.info(f"waiting for the process that works on {folder}")
        said = True
        time.sleep(0.5)


@contextmanager
def alone_in(folder: Path, world: World, flag: StopFlag) -> Iterator[None]:
    """Keep others out of a folder that several runs fill, after they have left it. All ranks together."""
    file = take_lock(folder, flag) if world.main else None
    world.barrier()
    try:
        yield
    finally:
        if file:
            file.close()


class RunFolder:
    """A run's folder, until the run is finished its own. Every rank holds one; only rank 0 writes.

    With `wait` it is waited for if another process has it.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], world: World, overwrite: bool = False,
        wait: StopFlag | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.world = Path(world.broadcast(str(folder))), world
        self.lock: TextIO | None = None
        self.writer: Any = None
        if world.main:
            self.open(config, overwrite, wait)
        world.barrier()

    def open(self, config: Mapping[str, Any], overwrite: bool, wait: StopFlag | None) -> None:
        """Rank 0: make the folder, claim it, write args.log and how it was started, send the log to print.log."""
        self.lock = take_lock(self.folder, wait)
        for half in self.folder.glob(".*.*"):  # of a write that was killed
            half.unlink()
        if overwrite:
            for child in self.folder.iterdir():
                if child.is_dir():
                    shutil.rmtree(child)
                elif child.name != ".lock":
                    child.unlink()
        atomic_write(
            self.folder / "args.log",
            yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).encode(),
        )
        if not (self.folder / RESULT).exists():  # a finished one is not worked on
            note_start(self.folder)
        self.handler = QuietFile(self.folder / "print.log")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(self.handler)

    def finished(self) -> dict[str, Any] | None:
        """The result of a finished run, else None; the same on every rank."""
        path = self.folder / RESULT
        return self.world.broadcast(load_json(path) if self.world.main and path.exists() else None)

    def said_finished(self) -> bool:
        """Whether the run is finished; says so."""
        if not self.finished():
            return False
        log.info(f"finished already: {self.folder} (--overwrite starts again)")
        self.end_log()
        return True

    def finish(self, result: Mapping[str, Any]) -> None:
        """Mark the run as finished."""
        if self.writer:
            self.writer.close()
        if self.world.main:
            atomic_write(self.folder / RESULT, json.dumps(result, indent=1).encode())
        self.end_log()

    def end_log(self) -> None:
        """What is logged from now on is not of this run, and others may have its folder."""
        if self.world.main:
            log.removeHandler(self.handler)
            self.handler.close()
        if self.lock:
            self.lock.close()

    def metric(self, **values: float) -> None:
        """Append one line to metrics.jsonl (rank 0), and to TensorBoard where it is installed."""
        if not self.world.main:
            return
        with (self.folder / "metrics.jsonl").open("a") as file:  # what a full disk cuts off is dropped by `rewind`
            file.write(json.dumps(values) + "\n")
        if self.writer is None:
            self.writer = tensorboard_writer(self.folder)
        if self.writer:
            step = int(values.get("iteration", 0))
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def metrics(self) -> list[dict[str, float]]:
        """All whole lines of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        try:
            return [json.loads(line) for line in lines[:-1]]
        except ValueError as error:
            raise ConfigError(f"{path}: damaged ({error}): remove the line, or start again with --overwrite") from error

    def rewind(self, iteration: int) -> None:
        """Drop metrics from after a checkpoint at `iteration`, which the resumed run will write again."""
        if self.world.main:
            kept = [line for line in self.metrics() if line["iteration"] <= iteration]
            atomic_write(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())


def tensorboard_writer(folder: Path) -> Any:
    """A SummaryWriter into `folder`/tensorboard, or False where TensorBoard is not installed."""
    from importlib.util import find_spec

    if find_spec("tensorboard") is None:
        return False
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))
