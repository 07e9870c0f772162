"""Programs as users start them: processes, ranks, and how they ended."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    status: int
    out: str
    err: str

    @property
    def last(self) -> str:
        return self.err.strip().splitlines()[-1]


def start(words: Sequence[str | Path], cwd: Path = ROOT) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(word) for word in words], cwd=cwd, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait(process: subprocess.Popen[str], status: int | None = 0) -> Ended:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert status is None or process.returncode == status, f"{process.args}\n{out}\n{err}"
    return Ended(process.returncode, out, err)


def torchrun(ranks: int) -> list[str]:
    """The words before a program's path: python for one rank, else torchrun on a free port."""
    if ranks == 1:
        return [sys.executable]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"]
