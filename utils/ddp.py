"""One process or many: the only file that reads RANK, WORLD_SIZE or LOCAL_RANK and names a backend.

A lone `python program.py` gets a real process group of size one, so there is no second code path. Tensors on
the CPU travel through gloo, tensors on a GPU through nccl.
"""

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from config import ConfigError

TIMEOUT = "RANK_TIMEOUT_MINUTES"
LONGEST = 7 * 24 * 60  # minutes
# What torch says where another rank does not come, does not answer, or has gone.
LOST = re.compile("timed? ?out|by peer|broken pipe|no route|unreachable|refused|remote process|failed to recv", re.I)


@dataclass(frozen=True)
class World:
    """This process among its peers, and the device that it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the rank that speaks and writes."""
        return self.rank == 0

    def share(self, costs: Sequence[float]) -> list[int]:
        """Indices of this rank's share of items with the given costs, in order; see `assign`."""
        return assign(costs, self.size)[self.rank]

    def sum(self, value: Tensor) -> Tensor:
        """Sum of one tensor over all ranks, in place."""
        dist.all_reduce(value)
        return value

    def broadcast(self, value: Any) -> Any:
        """Rank 0's plain value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_values(self, value: Any) -> list[Any]:
        """Every rank's plain value, in rank order, on every rank."""
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box

    def gather_rows(self, rows: Tensor, owners: Sequence[Sequence[int]]) -> Tensor | None:
        """Rows [n_r, ...] of every rank r, put at positions owners[r]: [N, ...] on the CPU of rank 0, else None."""
        mine = rows.detach().cpu().contiguous()
        if not self.main:
            if len(mine):
                dist.send(mine, dst=0)
            return None
        whole = mine.new_empty((sum(map(len, owners)), *mine.shape[1:]))
        whole[list(owners[0])] = mine
        for rank in range(1, self.size):
            if owners[rank]:
                part = mine.new_empty((len(owners[rank]), *mine.shape[1:]))
                dist.recv(part, src=rank)
                whole[list(owners[rank])] = part
        return whole

    def barrier(self) -> None:
        """Wait for every rank (over gloo, which needs no device)."""
        dist.all_reduce(torch.zeros(1))


def environment_rank() -> int:
    """Global rank as the launcher set it, before any process group exists."""
    return int(os.environ.get("RANK", 0))


def environment_local_rank() -> int:
    """Rank on this machine as the launcher set it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def environment_size() -> int:
    """Number of ranks as the launcher set it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def environment_timeout() -> timedelta:
    """How long a rank waits for the others: RANK_TIMEOUT_MINUTES, or an hour. Raises ConfigError for no such time."""
    text = os.environ.get(TIMEOUT, "60")
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes <= LONGEST:
        raise ConfigError(f"{TIMEOUT}={text}: expected minutes above 0, {LONGEST} (a week) at most")
    return timedelta(minutes=minutes)


def choose_device(gpu: str | None) -> torch.device:
    """The device of this rank: cuda:{gpu[LOCAL_RANK]}, cuda:LOCAL_RANK without --gpu, or the CPU.

    Raises ConfigError for an id that is absent or a list shorter than the local ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, local_size = environment_local_rank(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    count = torch.cuda.device_count()
    words = [word for word in (gpu or "").replace(" ", "").split(",") if word]
    if not all(word.isdigit() for word in words):
        raise ConfigError(f"--gpu={gpu}: expected device numbers such as 0,2,3")
    ids = [int(word) for word in words] or list(range(count))
    absent = [i for i in ids if i >= count]
    if absent:
        raise ConfigError(f"--gpu={gpu}: no device {absent[0]}, this machine shows 0 to {count - 1}")
    if len(set(ids)) < len(ids):
        raise ConfigError(f"--gpu={gpu}: a device is named twice; each process needs its own")
    if len(ids) < local_size:
        raise ConfigError(f"{local_size} processes share {len(ids)} GPUs: lower --nproc_per_node or list more in --gpu")
    return torch.device("cuda", ids[local_rank])


@contextmanager
def process_group(device: torch.device) -> Iterator[World]:
    """Join the process group, leave it together on the way out. Raises ConfigError when other ranks do not answer."""
    rank, size, timeout = environment_rank(), environment_size(), environment_timeout()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store = own_store(rank, size, timeout) if "RANK" in os.environ else dist.HashStore()
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        try:
            world = World(rank, size, device)
            yield world
            world.barrier()  # a rank that raised skips this, and the launcher ends the others
        finally:
            dist.destroy_process_group()
    except RuntimeError as error:
        reason = re.sub(r"^\[[^]]*\] ", "", str(error).split("\n")[0]).split(". ")[0]
        if not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()) or not LOST.search(reason):
            raise
        waited = f"{TIMEOUT} is {timeout.total_seconds() / 60:.3g}"
        raise ConfigError(
            f"rank {rank} of {size}: another rank is lost ({reason}; {waited}): see what its host says; the same "
            "command goes on from the last state"
        ) from error


def own_store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The launcher's store, which outlives a start (`--max_restarts`), under a name that only its ranks know."""
    # Rank 0 says its name and whom it sees; another believes a word that has its own name, and says so under rank 0's.
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
    own, others, until = uuid4().hex, range(1, size), time.monotonic() + timeout.total_seconds()
    if rank:
        store.set(f"name of {rank}", own)
    while time.monotonic() < until:
        if rank == 0:
            store.set("seen", json.dumps([own, *(store.get(f"name of {other}").decode() for other in others)]))
            if store.check([f"{own} {other}" for other in others]):
                return dist.PrefixStore(own, store)
        else:
            first, *seen = json.loads(store.get("seen"))
            if own in seen:
                store.set(f"{first} {rank}", "")
                return dist.PrefixStore(first, store)
        time.sleep(0.02)
    raise dist.DistStoreError("timed out while the ranks were to find each other")


def assign(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Items to ranks, dearest first to the least loaded rank (LPT: at most 4/3 of the optimum); each list ascending."""
    load, parts = [0.0] * ranks, [[] for _ in range(ranks)]  # type: tuple[list[float], list[list[int]]]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        # Equal loads are split by count, so that items of no cost spread too.
        rank = min(range(ranks), key=lambda r: (load[r], len(parts[r]), r))
        load[rank] += costs[item]
        parts[rank].append(item)
    return [sorted(part) for part in parts]


def kept_classes(nclass: int, debug: bool) -> int:
    """Number of classes that a run works on: all, or with `debug` the first max(nclass // 100, 10)."""
    return min(nclass, max(nclass // 100, 10)) if debug else nclass


def distribute_class(
    nclass: int, debug: bool = False, *, costs: Sequence[float] | None = None, rank: int = 0, size: int = 1
) -> list[int]:
    """Class ids of rank `rank` of `size`, balanced by cost; a rank beyond the classes gets none and idles."""
    kept = kept_classes(nclass, debug)
    return assign([1.0] * kept if costs is None else list(costs)[:kept], size)[rank]


def sync_distributed_metric(sums: Mapping[str, float]) -> dict[str, float]:
    """Sums over all ranks of named sums and counts; divide afterwards, never average averages."""
    packed = torch.tensor(list(sums.values()), dtype=torch.float64)
    dist.all_reduce(packed)
    return dict(zip(sums, packed.tolist(), strict=True))
