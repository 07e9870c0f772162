"""What must happen before torch is imported. Imports nothing heavy."""

import ctypes
import os
import signal
import sys
from pathlib import Path

MAX_THREADS = 4  # more threads do not help the small networks of one process, more ranks do


def prepare() -> None:
    """Set thread count, passive waiting and the allocator for this process; the user's own settings win.

    Ctrl-C ends the process without a traceback until the program can save something (utils.stopping). A program whose
    imports come from another checkout ends here: it would read and write there.
    """
    own, here = Path(sys.argv[0]).resolve().parent.parent, Path(__file__).resolve().parents[1]
    if own != here and (own / "utils" / "launch.py").exists():
        sys.exit(f"{sys.argv[0]}: it would import from {here}: install this checkout (python -m pip install -e {own})")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "torch" in sys.modules:
        raise RuntimeError("utils.launch.prepare() must run before torch is imported")
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = max(1, min(len(os.sched_getaffinity(0)) // local_ranks, MAX_THREADS))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # A thread that spins while it waits starves its neighbours on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        keep_large_blocks()


def keep_large_blocks() -> None:
    """Let glibc reuse large freed blocks instead of returning them: no page faults for every activation."""
    m_trim_threshold, m_mmap_max = -1, -4
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
