"""Students of a table: shared out over the ranks, each one's numbers kept in a file as it ends."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.checkpoint import atomic_write
from utils.ddp import World
from utils.progress import Progress
from utils.stopping import StopFlag

OnStep = Callable[..., None]


def judge_students(
    folder: Path, names: Sequence[str], steps: int, judge: Callable[[int, OnStep], Mapping[str, Any]], world: World,
    flag: StopFlag,
) -> list[dict[str, Any]]:  # fmt: skip
    """What `judge(i, on_step)` says of student `names[i]`, from folder/students where it is there; rank 0's on all.

    Raises Stopped after a signal, which loses no finished student.
    """
    files = [folder / "students" / f"{name}.json" for name in names]
    missing = world.broadcast([i for i, file in enumerate(files) if not file.exists()])
    mine = world.share([1.0] * len(missing))
    progress = Progress("students", len(mine) * steps, shown=world.main)

    def on_step(count: int = 1) -> None:
        progress.step(count)
        flag.check()  # not only between students: the launcher does not wait long

    for i in mine:
        atomic_write(files[missing[i]], json.dumps(judge(missing[i], on_step)).encode())
    progress.close()
    world.barrier()
    return world.broadcast([json.loads(file.read_text()) for file in files] if world.main else None)
