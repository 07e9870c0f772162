"""Start of every program: device, process group, precision, seeds, logging."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from utils.ddp import World, choose_device, process_group
from utils.streams import stream_seed

log = logging.getLogger("distill_lab")


def set_logging(rank: int, debug: bool) -> None:
    """Rank 0 speaks on standard error, other ranks only warn."""
    log.handlers.clear()
    log.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.WARNING if rank else logging.DEBUG if debug else logging.INFO)


@contextmanager
def init_script(gpu: str | None, tf32: bool, seed: int, debug: bool = False) -> Iterator[World]:
    """Join the ranks on their devices; `seed` also seeds torch's global generator for library code."""
    device = choose_device(gpu)
    with process_group(device) as world:
        set_logging(world.rank, debug)
        if gpu is not None and device.type == "cpu":
            log.info(f"--gpu={gpu} is ignored: no CUDA device here, {world.size} process(es) on the CPU with gloo")
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        torch.manual_seed(stream_seed(seed, "library"))
        yield world
