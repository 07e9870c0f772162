"""Programs side by side, each in a slot: a GPU or several, or a share of the cores."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from config import ConfigError
from utils.launch import MAX_THREADS
from utils.stopping import StopFlag

OF_RANKS = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")  # what a launcher sets
PEAKS_A_MIB = 2**10 if sys.platform == "linux" else 2**20  # ru_maxrss counts in KiB or bytes
OF_LAUNCHER = re.compile(r"^[EWI]\d{4} .*torch/distributed/", re.MULTILINE)
WAIT = 0.05  # seconds between looks

Slot = Mapping[str, str]  # variables of the environment


class Job(NamedTuple):
    """A program to run: its words after `python`, and the file that all it says is added to."""

    name: str
    words: tuple[str, ...]
    log: Path


class Ended(NamedTuple):
    """How a job ended: exit status (negative: the signal that killed it), seconds, MiB of its largest process."""

    job: Job
    status: int
    seconds: float
    peak: float

    @property
    def died_of(self) -> str:
        """The status and its last words; empty where it is 0."""
        return f"exit status {self.status}: {last_words(self.job.log)}" if self.status else ""


def last_words(log: Path) -> str:
    """The last line of what a job said, but for the launcher's own words after a crash."""
    said = ("\n" + log.read_text("utf-8", "replace")).rpartition("\n== ")[2].partition("\n")[2]
    lines = OF_LAUNCHER.split(said)[0].strip().splitlines()
    return lines[-1] if lines else "without a word"


def slots_of(count: int | None, ranks: int) -> list[Slot]:
    """Slots of programs with so many ranks: a GPU a rank where there are any, else cores; None: all GPUs, or one slot.

    What the user set in CUDA_VISIBLE_DEVICES and OMP_NUM_THREADS holds. Raises ConfigError: not enough GPUs.
    """
    if torch.cuda.is_available():
        numbers = ",".join(map(str, range(torch.cuda.device_count())))
        gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or numbers).split(",")
        count = count or max(1, len(gpus) // ranks)
        if count * ranks > len(gpus):
            raise ConfigError(
                f"--slots: {count} of --ranks: {ranks} take {count * ranks} GPUs, and {len(gpus)} are visible"
            )
        return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i : i + ranks])} for i in range(0, count * ranks, ranks)]
    count = count or 1
    threads = max(1, min(len(os.sched_getaffinity(0)) // (count * ranks), MAX_THREADS))
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}] * count


def run_jobs(jobs: Sequence[Job], slots: Sequence[Slot], flag: StopFlag, ended: Callable[[Ended], None]) -> None:
    """Run every job as soon as a slot is free, and tell `ended` of each.

    A stop signal is passed on; what runs then is waited for, nothing more is started, and Stopped is raised.
    """
    waiting, free, told = [*jobs], [*slots], False
    busy = dict[int, tuple[Job, Slot, float, subprocess.Popen[bytes]]]()
    while busy or (waiting and not flag.number):
        while waiting and free and not flag.number:
            job, slot = waiting.pop(0), free.pop(0)
            child = start(job, slot)
            busy[child.pid] = (job, slot, time.monotonic(), child)
        if flag.number and not told:
            for pid in busy:
                os.kill(pid, flag.number)
            told = True
        time.sleep(WAIT)
        for pid, (job, slot, began, child) in [*busy.items()]:
            over, status, usage = os.wait4(pid, os.WNOHANG)  # of this child: getrusage takes all together
            if over:
                child.returncode = os.waitstatus_to_exitcode(status)
                del busy[pid]
                free.append(slot)
                seconds = time.monotonic() - began
                ended(Ended(job, child.returncode, seconds, usage.ru_maxrss / PEAKS_A_MIB))
    flag.check()


def start(job: Job, slot: Slot) -> subprocess.Popen[bytes]:
    """Start a job, which is no rank of ours even if we are one."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(OF_RANKS)}
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as out:
        out.write(f"== {' '.join(job.words)}\n".encode())
        out.flush()
        return subprocess.Popen([sys.executable, *job.words], stdout=out, stderr=subprocess.STDOUT, env=own | {**slot})
